"""Bad names, labels and options of the target kubernetes: refused with the reason and what is near."""

from __future__ import annotations

import re

import pytest
from container_facts import files_of, make_facts

from cusprun.errors import UserError
from deploy.kubernetes_names import check_namespace, near_name, parse_labels


def made(**given: str) -> None:
    files_of("kubernetes", make_facts(), **{"image": "registry.example.org/team/expert:1", **given})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ("My-Space", "lower-case"),
        ("my space", "' '"),
        ("my_space", "'_'"),
        ("-space", "hyphen"),
        ("space-", "hyphen"),
        ("x" * 64, "64 characters"),
        ("a.b", "'.'"),
        ("räume", "'ä'"),
    ],
)
def test_a_bad_namespace_is_refused_with_a_reason_and_a_good_one(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        made(namespace=text)
    found = re.search(r"for example '([^']+)'", str(caught.value))
    assert found
    check_namespace(found[1])


def test_near_names_are_valid() -> None:
    for text in ("", "-", "x" * 62 + "--y", "ÄÖ", "A" * 99):
        check_namespace(near_name(text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("team", "has no value"),
        ("team=a,team=b", "given twice"),
        ("app.kubernetes.io/name=x", "Kubernetes' own"),
        ("k8s.io/x=y", "Kubernetes' own"),
        ("te am=x", "for example 'te-am'"),
        ("team=a b", "for example 'a-b'"),
        ("team=" + "x" * 64, "at most 63"),
        ("=x", "for example 'team'"),
        ("UPPER.example/x=y", "at most a domain"),
        ("/x=y", "at most a domain"),
        ("team=-x", "first and the last"),
    ],
)
def test_bad_labels_are_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        made(labels=text)


def test_good_labels() -> None:
    assert parse_labels("a=b, example.org/C_d=1.0-x,e=") == {"a": "b", "example.org/C_d": "1.0-x", "e": ""}
    assert parse_labels(None) == {}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"image": "Expert:1"}, "lower-case"),
        ({"image": "expert"}, "tag of its own"),
        ({"namespace": "kube-system"}, "Kubernetes' own"),
        ({"min_replicas": "5"}, "over max_replicas=4"),
        ({"min_replicas": "0"}, "from 1 to"),
        ({"max_replicas": "many"}, "whole number"),
        ({"storage_class": "fast"}, "model=volume"),
        ({"storage_class": "Fast", "model": "volume"}, "for example 'fast'"),
        ({"gpus": "2"}, "on the CPU"),
        ({"namspace": "x"}, "did you mean 'namespace'"),
        ({"model": "volumes"}, "did you mean 'volume'"),
    ],
)
def test_bad_options_are_refused(given: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        made(**given)


def test_an_image_must_be_named() -> None:
    with pytest.raises(UserError, match=re.escape("--option image=REGISTRY/my-expert:1")):
        files_of("kubernetes", make_facts())
