"""Names and labels of Kubernetes: what is allowed, why not, and what is near."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cusprun.errors import UserError

_MAX = 63
_MAX_PREFIX = 253
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?)?")
_KEY_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")
_RESERVED = ("kubernetes.io", "k8s.io")


def check_namespace(text: str) -> None:
    """Raise ``UserError``, with the reason and a name near it, when ``text`` is no name of a namespace.

    A DNS label: https://kubernetes.io/docs/concepts/overview/working-with-objects/names/
    """
    if text.startswith("kube-"):
        raise UserError(f"the namespace {text!r} is Kubernetes' own; choose one without kube-")
    if len(text) > _MAX or not _NAME.fullmatch(text):
        raise UserError(
            f"the namespace {text!r} is not valid ({_fault(text)}); for example {near_name(text)!r}"
        )


def check_subdomain(text: str, what: str) -> None:
    """Raise ``UserError`` when ``text`` is no name of a resource with dots, such as a storage class."""
    if len(text) > _MAX_PREFIX or not _SUBDOMAIN.fullmatch(text):
        raise UserError(f"the {what} {text!r} is not valid; for example {near_name(text)!r}")


def near_name(text: str) -> str:
    """Return a valid name near ``text``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_MAX].rstrip("-") or "experts"


def parse_labels(text: str | None) -> Mapping[str, str]:
    """Return labels written ``team=search,tier=gold``.

    Raises:
        UserError: a key or a value is not valid, or is Kubernetes' own.
    """
    found: dict[str, str] = {}
    for item in text.split(",") if text else ():
        key, equals, value = item.strip().partition("=")
        if not equals:
            raise UserError(f"the label {item!r} has no value; write labels=team=search,tier=gold")
        if key in found:
            raise UserError(f"the label {key!r} is given twice; give it once")
        _check_key(key)
        if len(value) > _MAX or not _VALUE.fullmatch(value):
            near = re.sub(r"[^A-Za-z0-9_.-]+", "-", value).strip("-_.")[:_MAX].strip("-_.")
            raise UserError(
                f"the value {value!r} of the label {key!r} is not valid (at most {_MAX} letters, digits, "
                f"hyphens, underscores and dots, the first and the last a letter or digit); "
                f"for example {near or 'yes'!r}"
            )
        found[key] = value
    return found


def _check_key(key: str) -> None:
    prefix, slash, name = key.rpartition("/")
    if any(prefix == own or prefix.endswith(f".{own}") for own in _RESERVED):
        raise UserError(f"the label {key!r} is Kubernetes' own; choose another prefix than {prefix!r}")
    is_bad_prefix = slash and (len(prefix) > _MAX_PREFIX or not _SUBDOMAIN.fullmatch(prefix))
    if is_bad_prefix or len(name) > _MAX or not _KEY_NAME.fullmatch(name):
        near = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-_.")[:_MAX].strip("-_.")
        raise UserError(
            f"the label {key!r} is not valid (a name of at most {_MAX} letters, digits, hyphens, underscores "
            f"and dots, before it at most a domain and a slash); for example {near or 'team'!r}"
        )


def _fault(text: str) -> str:
    if not text:
        return "it is empty"
    if len(text) > _MAX:
        return f"it has {len(text)} characters, of {_MAX} allowed"
    if text != text.lower():
        return "only lower-case letters are allowed"
    odd = re.search(r"[^a-z0-9-]", text)
    return f"it holds {odd.group()!r}" if odd else "it begins or ends with a hyphen"
