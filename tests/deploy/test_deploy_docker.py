"""The target docker: images that are closed, Compose that grants what was planned, keys that stay secret."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import dockerfiles
import pytest
import yaml
from container_facts import FORMATS, ODD_NAME, files_of, make_facts, text_of, write

from cusprun.errors import UserError
from deploy import dashboard
from deploy.containers import check_image, near_image

MODELS = ("baked", "volume")
SECRET_WORDS = re.compile(r"(?i)\b(ARG|ENV)\b.*(key|token|password|secret)")


def image_of(format_name: str, place: str, **changes: Any) -> str:
    return text_of(files_of("docker", make_facts(format_name, **changes), model=place), "Dockerfile")


def compose_of(**given: Any) -> dict[str, Any]:
    facts = given.pop("facts", None) or make_facts()
    found = yaml.safe_load(text_of(files_of("docker", facts, **given), "compose.yaml"))
    assert isinstance(found, dict)
    return found


def bin_of(name: str) -> str:
    """Return a program beside this interpreter or on PATH; skip where there is none."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_an_image_is_closed(format_name: str, model: str) -> None:
    text = image_of(format_name, model)
    before, stages = dockerfiles.read(text)
    assert {each.name for each in before} == {"ARG"}
    assert [stage.name for stage in stages] == ["build", "runtime", *(["baked"] if model == "baked" else [])]
    for stage in stages:
        image = re.sub(r"\$\{\w+\}", "", stage.base)
        if image in {known.name for known in stages}:
            continue
        tag = image.partition(":")[2]
        assert re.search(r"\d+\.\d+\.\d+", tag), f"{image} is not pinned"
        assert stage.base.endswith("_DIGEST}")
    runtime = stages[1]
    names = [each.name for each in runtime.instructions]
    user = max(i for i, name in enumerate(names) if name == "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", runtime.instructions[user].rest)
    assert user < names.index("ENTRYPOINT") < names.index("CMD")
    assert "RUN" not in names[user:]
    for name in ("HEALTHCHECK", "ENTRYPOINT", "CMD"):
        assert len(runtime.all(name)) == 1
        assert runtime.last(name).words, f"{name} is in shell form"
    assert runtime.last("STOPSIGNAL").rest == "SIGTERM"
    assert "curl" not in text
    assert not SECRET_WORDS.search(text)
    assert not [each for stage in stages for each in stage.instructions if each.name == "ADD"]


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_health_check_is_python_that_asks_the_health_route(format_name: str) -> None:
    _, stages = dockerfiles.read(image_of(format_name, "volume"))
    words = stages[1].last("HEALTHCHECK").words
    assert words is not None
    compile(words[2], "healthcheck", "exec")
    assert "/health'" in words[2]


@pytest.mark.parametrize("target", ["docker", "kubernetes"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_the_context_has_all_that_is_copied(format_name: str, model: str, target: str) -> None:
    given = {"model": model} | ({"image": "registry.example/team/expert:1"} if target == "kubernetes" else {})
    files = files_of(target, make_facts(format_name), **given)
    under = "image/" if target == "kubernetes" else ""
    _, stages = dockerfiles.read(text_of(files, f"{under}Dockerfile"))
    ignored, *allowed = text_of(files, f"{under}.dockerignore").split()
    assert ignored == "*"
    for stage in stages:
        for step in stage.all("COPY"):
            if step.rest.startswith("--from=build"):
                continue
            source = step.rest.split()[0].rstrip("/")
            assert f"!{source}" in allowed
            assert [p for p in files if p == f"{under}{source}" or p.startswith(f"{under}{source}/")], source
    assert ("!model" in allowed) == (model == "baked")
    assert not [path for path in files if "secrets" in path]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_hadolint_finds_nothing(format_name: str, model: str, tmp_path: Path) -> None:
    hadolint = bin_of("hadolint")
    file = tmp_path / "Dockerfile"
    # Without the backslash at the end: hadolint takes an escaped one before a quotation mark for its escape.
    file.write_text(image_of(format_name, model, model=ODD_NAME.rstrip("\\")))
    done = subprocess.run([hadolint, "--no-color", str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_the_user_of_the_image_can_be_made(tmp_path: Path) -> None:
    program = shutil.which("useradd")
    if program is None or os.geteuid() != 0:
        pytest.skip("no useradd, or not root")
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group", "shadow", "gshadow"):
        (tmp_path / "etc" / name).write_text("")
    _, stages = dockerfiles.read(image_of("gguf", "volume"))
    (step,) = [each for each in stages[1].all("RUN") if each.rest.startswith("useradd")]
    words = step.rest.split()
    done = subprocess.run([program, "--prefix", str(tmp_path), *words[1:]], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    entry = (tmp_path / "etc" / "passwd").read_text().split(":")
    assert entry[0] == "cusprun"
    assert stages[1].last("USER").rest == f"{entry[2]}:{entry[2]}"
    assert entry[6].strip() == "/usr/sbin/nologin"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_compose_is_closed_and_grants_what_was_planned(format_name: str, model: str) -> None:
    facts = make_facts(format_name)
    plain = compose_of(facts=facts, model=model)
    for service in plain["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service["user"].startswith(("0", "root"))
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert not service.get("privileged")
        assert ":latest" not in service["image"]
        assert set(service["secrets"]) <= set(plain["secrets"])
    expert = plain["services"]["expert"]
    limits = expert["deploy"]["resources"]["limits"]
    if format_name == "vllm":
        assert "memory" not in limits, "what vLLM needs beside a GPU is not known before it is measured"
        measured = replace(facts, sizing=replace(facts.sizing, source="measured"))
        limits = compose_of(facts=measured)["services"]["expert"]["deploy"]["resources"]["limits"]
        assert limits["memory"] == "374M"
        (device,) = expert["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
    else:
        assert limits["memory"] == "374M"
        assert "reservations" not in expert["deploy"]["resources"]
    assert "cpus" not in limits, "Docker refuses more cores than the machine has"
    assert expert["build"]["target"] == ("baked" if model == "baked" else "runtime")
    assert expert.get("volumes", []) == ([] if model == "baked" else ["./model:/model:ro"])
    words = expert["command"]
    assert words[words.index("--context") + 1] == "2048"
    assert words[words.index("--parallel") + 1] == "2"
    assert words[words.index("--api-key-file") + 1] == "/run/secrets/api_key"
    assert int(expert["stop_grace_period"].rstrip("s")) > int(words[words.index("--drain") + 1])


@pytest.mark.parametrize("model", MODELS)
def test_the_original_stands_beside(model: str) -> None:
    original = make_facts(
        artifact_name="original $1.gguf", model="original", sha256={"original $1.gguf": "0"}
    )
    facts = make_facts(original=original)
    files = files_of("docker", facts, original="/somewhere/original $1.gguf", model=model, port="9000")
    plain = yaml.safe_load(text_of(files, "compose.yaml"))
    beside = plain["services"]["original"]
    assert files["original/original $1.gguf"].content == Path("/somewhere/original $1.gguf")
    assert beside["volumes"] == ["./original:/model:ro"]
    assert beside["command"][1].replace("$$", "$") == "/model/original $1.gguf"
    assert beside["build"]["target"] == "runtime"
    assert beside["image"] != plain["services"]["expert"]["image"], "one name cannot be built twice at once"
    assert beside["ports"] == ["127.0.0.1:9001:8000"]
    scraped = yaml.safe_load(text_of(files, "monitoring/prometheus.yaml"))["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"] == ["expert:8000", "original:8000"]


def test_monitoring_is_wired_together() -> None:
    files = files_of("docker", make_facts())
    plain = yaml.safe_load(text_of(files, "compose.yaml"))
    services = plain["services"]
    assert [name for name, each in services.items() if each.get("profiles") == ["monitoring"]] == [
        "prometheus",
        "grafana",
    ]
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            known = source.removeprefix("./")
            assert known in plain["volumes"] or known in files or known == "model"
    job = yaml.safe_load(text_of(files, "monitoring/prometheus.yaml"))["scrape_configs"][0]
    assert job["authorization"]["credentials_file"] == "/run/secrets/api_key"
    assert "api_key" in services["prometheus"]["secrets"]
    (source,) = yaml.safe_load(text_of(files, "monitoring/datasource.yaml"))["datasources"]
    shown = json.loads(text_of(files, "monitoring/dashboard.json"))
    assert {panel["datasource"]["uid"] for panel in shown["panels"]} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load(text_of(files, "monitoring/dashboards.yaml"))["providers"]
    assert any(f":{provider['options']['path']}/" in volume for volume in services["grafana"]["volumes"])


@pytest.mark.parametrize("engine", sorted(dashboard.ENGINES))
def test_queries_are_valid_for_an_independent_reader(engine: str) -> None:
    """It knows the types too: a rate of what is no range is refused."""
    parser = pytest.importorskip("promql_parser")
    for match in ("", dashboard.of_pods("space", "my-expert")):
        for panel in dashboard.panels(engine, match):
            for query in panel.queries:
                parser.parse(query.expression.replace("$__rate_interval", "1m"))


def test_compose_is_valid_for_an_independent_reader() -> None:
    compose_spec = pytest.importorskip("compose_spec")
    for format_name in FORMATS:
        facts = make_facts(format_name, model=ODD_NAME)
        text = text_of(files_of("docker", facts), "compose.yaml")
        assert set(compose_spec.PyCompose.from_yaml(text).service_names()) == {
            "expert",
            "prometheus",
            "grafana",
        }


@pytest.mark.parametrize("name", ["true", "no", "null", "a1"])
def test_names_that_mean_something_in_yaml(name: str) -> None:
    assert compose_of(facts=make_facts(name=name))["name"] == name


@pytest.mark.parametrize("format_name", FORMATS)
def test_odd_names_arrive_whole(format_name: str) -> None:
    facts = make_facts(format_name, model=ODD_NAME, artifact_name=ODD_NAME, license=ODD_NAME)
    files = files_of("docker", facts)
    _, stages = dockerfiles.read(text_of(files, "Dockerfile"))
    words = stages[1].last("CMD").words
    assert words is not None
    assert words[1] == f"/model/{ODD_NAME}"
    assert f"--name={ODD_NAME}" in words
    composed = yaml.safe_load(text_of(files, "compose.yaml"))["services"]["expert"]["command"]
    assert not re.search(r"(?<!\$)(?:\$\$)*\$(?!\$)", " ".join(composed)), "Compose would put a variable in"
    assert [word.replace("$$", "$") for word in composed][: len(words)] == words
    label = stages[1].last("LABEL").rest
    written = re.findall(r'="((?:[^"\\]|\\.)*)"', label)
    assert [re.sub(r"\\(.)", r"\1", value) for value in written] == [ODD_NAME, "0.1.0", ODD_NAME]
    assert not re.search(r"(?<!\\)\$", label), "the builder would put a variable in"


def test_the_same_facts_give_the_same_bytes() -> None:
    first, second = (files_of("docker", make_facts()) for _ in range(2))
    assert {p: f.content for p, f in first.items()} == {p: f.content for p, f in second.items()}


def test_requirements_are_pinned() -> None:
    lines = text_of(files_of("docker", make_facts()), "requirements.txt").splitlines()
    assert lines
    assert all(re.fullmatch(r"[a-z0-9._-]+==[^=\s]+", line) for line in lines)
    assert "torch" not in {line.partition("==")[0] for line in lines}


def test_the_start_script_makes_keys_once_and_shows_them_to_nobody(tmp_path: Path) -> None:
    out = write(files_of("docker", make_facts()), tmp_path / "out put")
    (out / "model").mkdir(mode=0o700)
    programs = tmp_path / "bin"
    programs.mkdir()
    log = tmp_path / "log"
    (programs / "docker").write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> "{log}"\n')
    (programs / "docker").chmod(0o755)
    environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    kept = None
    for _ in range(2):
        subprocess.run(["sh", str(out / "start.sh")], check=True, env=environment, cwd=tmp_path)
        keys = [(out / "secrets" / name).read_text() for name in ("api_key", "grafana_password")]
        assert all(re.fullmatch(r"[0-9a-f]{48}", key) for key in keys)
        assert keys[0] != keys[1]
        assert kept in (None, keys)
        kept = keys
    assert log.read_text().splitlines() == ["compose up --build --detach --wait"] * 2
    assert stat.S_IMODE((out / "secrets").stat().st_mode) == 0o700
    assert stat.S_IMODE((out / "model").stat().st_mode) == 0o755, "the user in the container reads it"
    assert sorted(path.name for path in (out / "secrets").iterdir()) == ["api_key", "grafana_password"]


def test_the_readme_has_three_commands() -> None:
    for format_name in FORMATS:
        text = text_of(files_of("docker", make_facts(format_name)), "README.md")
        blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        assert [len(block.strip().splitlines()) for block in blocks] == [1, 1, 1]


VALID_IMAGES = [
    "expert:1",
    "team/expert:2026-10",
    "registry.example.org:5000/a/b_c/d__e:v1.2",
    "localhost/x:y",
    "a.b/c-d--e:1",
]
BAD_IMAGES = [
    ("", "empty"),
    ("Expert:1", "lower-case"),
    ("my expert:1", "' '"),
    ("https://registry.example.org/expert:1", "protocol"),
    ("expert:1:2", "parts"),
    ("expert;rm:1", "';'"),
    ("-expert:1", "parts"),
    ("a//b:1", "parts"),
    ("überall:1", "'ü'"),
    ("expert:" + "x" * 129, "129 characters"),
]


@pytest.mark.parametrize("text", VALID_IMAGES)
def test_image_names(text: str) -> None:
    check_image(text)


@pytest.mark.parametrize(("text", "reason"), BAD_IMAGES)
def test_a_bad_image_name_is_refused_with_a_reason_and_a_good_one(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        check_image(text)
    found = re.search(r"for example '([^']+)'", str(caught.value))
    assert found
    check_image(found[1])


def test_images_without_a_version_are_refused() -> None:
    for text in ("expert", "expert:latest", "registry:5000/expert"):
        with pytest.raises(UserError, match="tag of its own"):
            check_image(text)
    with pytest.raises(UserError, match="digest"):
        check_image("expert:1@sha256:" + "0" * 64)
    with pytest.raises(UserError, match="at most 255"):
        check_image("/".join(["a" * 100] * 3) + ":1")


def test_the_name_of_the_originals_image_is_checked_too() -> None:
    facts = make_facts(original=make_facts())
    image = "expert:" + "x" * 125
    files_of("docker", make_facts(), image=image)
    with pytest.raises(UserError, match="134 characters"):
        files_of("docker", facts, image=image, original="original.gguf")


def test_near_names_are_valid() -> None:
    for text in ("", "///", "ÄÖ:", "A B/C D:x y", "http://", "host.example:80/Ü/x", ":::", "a:-"):
        check_image(near_image(text))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"port": "0"}, "from 1 to"),
        ({"port": "65535"}, "from 1 to"),
        ({"port": "80a"}, "whole number"),
        ({"port": "9090"}, "Prometheus"),
        ({"port": "2999"}, "Grafana"),
        ({"gpus": "2"}, "on the CPU"),
        ({"gpus": "-1"}, "whole number"),
        ({"model": "bakde"}, "did you mean 'baked'"),
        ({"modl": "baked"}, "did you mean 'model'"),
        ({"image": "A:1"}, "lower-case"),
    ],
)
def test_bad_options_are_refused(given: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        files_of("docker", make_facts(), **given)


def test_several_gpus_reach_vllm() -> None:
    _, stages = dockerfiles.read(text_of(files_of("docker", make_facts("vllm"), gpus="2"), "Dockerfile"))
    words = stages[1].last("CMD").words
    assert words is not None
    assert words[-3:] == ["--", "--tensor-parallel-size", "2"]
    service = compose_of(facts=make_facts("vllm"), gpus="2")["services"]["expert"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 2
