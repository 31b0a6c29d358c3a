"""The target kubernetes: manifests that fit each other, the API's schemas and the restricted profile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from container_facts import FORMATS, ODD_NAME, files_of, make_facts, text_of, write

from deploy import dashboard
from deploy.containers import serve_arguments
from deploy.facts import Facts
from deploy.render import File

IMAGE = "registry.example.org/team/expert:1"
MODELS = ("baked", "volume")
CASES = [(format_name, model) for format_name in FORMATS for model in MODELS]
VERSIONS = ("1.27", "1.34")
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "m": 1e-3, "": 1}

cases = pytest.mark.parametrize(("format_name", "model"), CASES)


def made(format_name: str = "gguf", *, facts: Facts | None = None, **given: str) -> dict[str, File]:
    return files_of("kubernetes", facts or make_facts(format_name), **{"image": IMAGE, **given})


def manifests(files: dict[str, File]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every document that is one of Kubernetes, by the path of its file."""
    for path in files:
        if path.endswith(".yaml"):
            for plain in yaml.safe_load_all(text_of(files, path)):
                yield path, plain


def only(files: dict[str, File], path: str) -> dict[str, Any]:
    found = yaml.safe_load(text_of(files, path))
    assert isinstance(found, dict)
    return found


def quantity(text: object) -> float:
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    assert match, text
    return float(match[1]) * UNITS[match[2]]


def pods(files: dict[str, File]) -> Iterator[dict[str, Any]]:
    """Yield the specification of every pod."""
    for path, plain in manifests(files):
        if plain["kind"] == "Deployment":
            yield plain["spec"]["template"]["spec"]
        elif plain["kind"] == "Pod":
            yield plain["spec"]
        elif plain["kind"] == "InferenceService":
            yield plain["spec"]["predictor"]
        else:
            assert "containers" not in plain.get("spec", {}), path


@cases
def test_every_manifest_is_listed_and_in_the_namespace(format_name: str, model: str) -> None:
    files = made(format_name, model=model, namespace="space")
    for path, plain in manifests(files):
        if path == "namespace.yaml":
            assert plain["metadata"]["name"] == "space"
        elif plain["kind"] == "Kustomization":
            folder = path.rpartition("/")[0]
            there = {
                p.rpartition("/")[2] for p in files if p.startswith(f"{folder}/") and p.endswith(".yaml")
            }
            assert set(plain["resources"]) == there - {"kustomization.yaml"}
            assert plain["namespace"] == "space"
            for generator in plain.get("configMapGenerator", ()):
                assert all(f"{folder}/{name}" in files for name in generator["files"])
        else:
            assert plain["metadata"]["namespace"] == "space"
    assert ("kserve/inferenceservice.yaml" in files) == (format_name == "vllm")


@cases
def test_selectors_ports_and_names_fit(format_name: str, model: str) -> None:
    files = made(format_name, model=model, labels="team=search")
    deployment = only(files, "base/deployment.yaml")
    spec = deployment["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert labels["team"] == "search"

    def selects(selector: dict[str, str]) -> bool:
        return bool(selector) and selector.items() <= labels.items()

    service = only(files, "base/service.yaml")["spec"]
    policy = only(files, "base/networkpolicy.yaml")["spec"]
    assert selects(spec["selector"]["matchLabels"])
    assert selects(service["selector"])
    assert selects(policy["podSelector"]["matchLabels"])
    assert selects(only(files, "base/pdb.yaml")["spec"]["selector"]["matchLabels"])
    monitor = only(files, "monitoring/podmonitor.yaml")["spec"]
    assert selects(monitor["selector"]["matchLabels"])
    assert "app.kubernetes.io/version" not in spec["selector"]["matchLabels"], "selectors cannot be changed"
    (container,) = spec["template"]["spec"]["containers"]
    (port,) = container["ports"]
    assert service["ports"][0]["targetPort"] == port["name"]
    assert len(port["name"]) <= 15
    assert [each["port"] for each in policy["ingress"][0]["ports"]] == [port["containerPort"]]
    assert policy["egress"] == []
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] == port["name"]
    scaler = only(files, "base/hpa.yaml")["spec"]
    target = scaler["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in spec, "the autoscaler and the manifest would fight over the number"
    metric = scaler["metrics"][0]["pods"]["metric"]["name"]
    assert metric == dashboard.QUEUE_METRICS[FORMATS[format_name]]
    secret = next(v["secret"]["secretName"] for v in spec["template"]["spec"]["volumes"] if "secret" in v)
    assert endpoint["authorization"]["credentials"]["name"] == secret
    words = container["args"]
    key_file = words[words.index("--api-key-file") + 1]
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert mounts[key_file.rpartition("/")[0]] == "api-key"
    assert endpoint["authorization"]["credentials"]["key"] == key_file.rpartition("/")[2]
    assert int(words[words.index("--port") + 1]) == port["containerPort"]


@cases
def test_probes_ask_a_route_that_is_there(format_name: str, model: str) -> None:
    from serve.front.app import Front, build_app
    from serve.front.settings import FrontSettings

    front = Front(None, FrontSettings("model"))  # type: ignore[arg-type]
    routes = {getattr(route, "path", None) for route in build_app(front).routes}
    for pod in pods(made(format_name, model=model)):
        for container in pod["containers"]:
            if container["name"] == "loader":
                continue
            names = {port["name"] for port in container["ports"]}
            for name in ("startupProbe", "readinessProbe", "livenessProbe"):
                asked = container[name]["httpGet"]
                assert asked["path"] == "/health"
                assert asked["path"] in routes
                assert asked["port"] in names
            words = container["args"]
            wait_s = 5
            drain_s = int(words[words.index("--drain") + 1])
            assert pod["terminationGracePeriodSeconds"] > wait_s + drain_s


@cases
def test_pods_keep_to_the_restricted_profile(format_name: str, model: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/"""
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
    }
    for pod in pods(made(format_name, model=model)):
        whole = pod["securityContext"]
        assert whole["runAsNonRoot"] is True
        assert whole["runAsUser"] > 0
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for volume in pod["volumes"]:
            assert set(volume) - {"name"} <= allowed | {"secret"}
        assert "initContainers" not in pod
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert "privileged" not in own
            assert not any("hostPort" in port for port in container.get("ports", ()))
            assert not container["image"].endswith(":latest")
            names = {volume["name"] for volume in pod["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == names


@cases
def test_resources_are_those_that_were_planned(format_name: str, model: str) -> None:
    measured = make_facts(format_name)
    measured = replace(measured, sizing=replace(measured.sizing, source="measured"))
    for facts in (make_facts(format_name), measured):
        for pod in pods(made(format_name, facts=facts, model=model)):
            for container in pod["containers"]:
                requests, limits = container["resources"]["requests"], container["resources"]["limits"]
                assert {"cpu", "memory"} <= set(requests)
                for name, granted in limits.items():
                    assert quantity(granted) >= quantity(requests[name]), name
                if container["name"] == "loader":
                    continue
                assert requests["memory"] == "340Mi"
                is_known = format_name != "vllm" or facts is measured
                assert limits.get("memory") == ("374Mi" if is_known else None)
                assert (requests["cpu"], limits["cpu"]) == ("3", "4"), "threads, and one for the front"
                assert (limits.get("nvidia.com/gpu") == "1") == (format_name == "vllm")


def test_nothing_is_granted_that_is_not_known() -> None:
    facts = make_facts()
    facts = replace(facts, sizing=replace(facts.sizing, num_threads=None))
    (pod,) = pods(made(facts=facts))
    (container,) = pod["containers"]
    assert "cpu" not in container["resources"]["limits"]
    assert "--threads" not in container["args"]


@cases
def test_the_model_is_where_the_server_looks(format_name: str, model: str) -> None:
    facts = make_facts(format_name)
    files = made(facts=facts, model=model)
    place = "model" if model == "volume" else "image/model"
    assert {path for path in files if path.startswith(("model/", "image/model/"))} == {
        f"{place}/{facts.artifact_name}/{name}" if facts.artifact_is_folder else f"{place}/{name}"
        for name in facts.sha256
    }
    for pod in pods(files):
        (container,) = pod["containers"]
        claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        mounted = [m for m in container["volumeMounts"] if m["mountPath"] == "/model"]
        assert len(claims) == len(mounted) == (model == "volume")
        if model == "volume":
            claim = only(files, "loader/pvc.yaml")
            assert claims[0]["claimName"] == claim["metadata"]["name"]
            assert quantity(claim["spec"]["resources"]["requests"]["storage"]) > facts.artifact_bytes
            assert bool(mounted[0].get("readOnly")) == (container["name"] != "loader")


@cases
def test_odd_names_arrive_whole(format_name: str, model: str) -> None:
    facts = make_facts(format_name, model=ODD_NAME, artifact_name=ODD_NAME)
    for pod in pods(made(facts=facts, model=model)):
        for container in pod["containers"]:
            if container["name"] == "loader":
                continue
            words = container["args"]
            assert not re.search(r"(?<!\$)(?:\$\$)*\$(?!\$)", " ".join(words)), "a variable would be put in"
            wanted = serve_arguments(facts, "/run/secrets/cusprun/keys")
            assert [word.replace("$$", "$") for word in words] == wanted


@cases
def test_manifests_are_valid_for_the_api(format_name: str, model: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    own = {"Kustomization", "PodMonitor", "InferenceService"}  # not of the API itself
    seen: set[str] = set()
    given = {"storage_class": "fast"} if model == "volume" else {}
    for path, plain in manifests(made(format_name, model=model, labels="team=search", **given)):
        if plain["kind"] == "InferenceService":
            predictor = {k: v for k, v in plain["spec"]["predictor"].items() if not k.endswith("Replicas")}
            checked = {"apiVersion": "v1", "kind": "Pod", "metadata": plain["metadata"], "spec": predictor}
        elif plain["kind"] in own:
            continue
        else:
            checked = plain
        for version in VERSIONS:
            validator.validate(checked, version, strict=True)
        seen.add(path)
    assert len(seen) >= 6


@cases
def test_kustomize_builds_every_folder(format_name: str, model: str, tmp_path: Path) -> None:
    program = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if shutil.which(program[0]) is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    files = made(format_name, model=model)
    out = write(files, tmp_path)
    folders = [path.rpartition("/")[0] for path in files if path.endswith("/kustomization.yaml")]
    assert {"base", "monitoring"} <= set(folders)
    for folder in folders:
        done = subprocess.run([*program, str(out / folder)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        built = {(each["kind"], each["metadata"]["name"]) for each in yaml.safe_load_all(done.stdout)}
        listed = only(files, f"{folder}/kustomization.yaml")["resources"]
        written = [only(files, f"{folder}/{name}") for name in listed]
        assert {(each["kind"], each["metadata"]["name"]) for each in written} <= built


FAKE_KUBECTL = """#!/bin/sh
printf 'kubectl %s\\n' "$*" >> "$LOG"
case "$*" in
    *"create secret"*) cat > "$STATE/secret" ;;
    *"get secret"*) test -e "$STATE/secret" ;;
    *"get namespace"*) test -e "$STATE/namespace" ;;
    *"apply --filename namespace.yaml"*) : > "$STATE/namespace" ;;
    *"get persistentvolumeclaim"*) cat "$STATE/loaded" 2> /dev/null || true ;;
    *"annotate"*) printf '%s' "$*" | sed 's/.*cusprun-loaded=//' > "$STATE/loaded" ;;
    *"exec --stdin"*) tar -C "$STATE/volume" -xf - ;;
esac
"""


@pytest.mark.parametrize("model", MODELS)
def test_the_start_script(model: str, tmp_path: Path) -> None:
    facts = make_facts("onnx", artifact_name="it's a $folder")
    files = made(facts=facts, model=model)
    out = write(files, tmp_path / "out put")
    for path, file in files.items():
        if isinstance(file.content, Path):
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (out / path).write_text(path)
    programs, state = tmp_path / "bin", tmp_path / "state"
    (state / "volume").mkdir(parents=True)
    programs.mkdir()
    for name, text in (
        ("kubectl", FAKE_KUBECTL),
        ("docker", '#!/bin/sh\nprintf "docker %s\\n" "$*" >> "$LOG"\n'),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    log = tmp_path / "log"
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "LOG": str(log), "STATE": str(state)}
    command = ["sh", str(out / "start.sh")]
    subprocess.run(command, check=True, env=environment)
    key = (state / "secret").read_text()
    assert re.fullmatch(r"[0-9a-f]{48}", key)
    first = log.read_text()
    assert key not in first
    assert f"docker build --tag {IMAGE} image\ndocker push {IMAGE}\n" in first
    applied, waited = first.splitlines()[-2:]
    assert applied == "kubectl apply --kustomize base"
    assert "rollout status deployment/my-expert" in waited
    assert (state / "volume" / "it's a $folder" / "model.onnx").exists() == (model == "volume")
    log.unlink()
    subprocess.run(command, check=True, env={**environment, "MANIFESTS": "monitoring"})
    again = log.read_text()
    assert "create secret" not in again
    assert "namespace.yaml" not in again
    assert "exec --stdin" not in again
    assert again.splitlines()[-1] == "kubectl apply --kustomize monitoring"
    assert (state / "secret").read_text() == key


@cases
def test_another_model_starts_other_servers(format_name: str, model: str) -> None:
    """The volume is written in place, and an image's name may stay."""
    one = make_facts(format_name)
    two = replace(one, sha256=dict.fromkeys(one.sha256, "0"))
    found = []
    for facts in (one, two):
        files = made(facts=facts, model=model)
        template = only(files, "base/deployment.yaml")["spec"]["template"]["metadata"]["annotations"]
        found.append(template)
        if format_name == "vllm":
            service = only(files, "kserve/inferenceservice.yaml")["metadata"]["annotations"]
            assert template.items() <= service.items()
    assert found[0].keys() == found[1].keys()
    assert found[0] != found[1]


def test_the_readme_has_three_commands() -> None:
    for format_name, model in CASES:
        text = text_of(made(format_name, model=model), "README.md")
        blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        assert [len(block.strip().splitlines()) for block in blocks] == [1, 1, 1]


def test_the_same_facts_give_the_same_bytes() -> None:
    first, second = (made("vllm", model="volume") for _ in range(2))
    assert {p: f.content for p, f in first.items()} == {p: f.content for p, f in second.items()}
