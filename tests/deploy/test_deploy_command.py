"""``cusprun deploy``: from an artifact to a folder that is whole, checked, and the same every time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployable import CONTEXT_LIMIT, HEAD_DIM, KV_HEADS, LAYERS, TOKENS, make_gguf, manifest_of, tree

from cusprun.cli.app import run
from cusprun.errors import ConfigError, ExportError, ModelError, OutputError, UserError
from cusprun.pipeline.deploy import deploy
from cusprun.pipeline.deploy_facts import gather
from cusprun.pipeline.deploy_sizing import FRONT_BYTES, Request
from deploy import bundle
from deploy.render import docker_value, markdown, shell, yaml_scalar
from deploy.targets import TARGETS
from serve.bench import records

MIB = 2**20
CACHE_BYTES = 2 * LAYERS * KV_HEADS * HEAD_DIM * 2  # keys and values in float16
HERE_MADE = ("bundle", "ollama", "systemd")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make_gguf(tmp_path / "expert.gguf")


@pytest.fixture(autouse=True)
def no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "fetch", lambda *_: [])


@pytest.mark.parametrize("target", HERE_MADE)
def test_a_deployment_is_whole_checked_and_reproducible(target: str, artifact: Path, tmp_path: Path) -> None:
    before = (artifact.read_bytes(), artifact.stat().st_mtime_ns)
    out = deploy(artifact, target, tmp_path / "one")
    mask = os.umask(0o077)
    try:
        again = deploy(artifact, target, tmp_path / "two")
    finally:
        os.umask(mask)
    assert tree(out) == tree(again)
    assert {path.stat().st_mode & 0o777 for path in (again, *again.rglob("*")) if path.is_dir()} == {0o755}
    assert (artifact.read_bytes(), artifact.stat().st_mtime_ns) == before
    assert (
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=False).returncode
        == 0
    )
    listed = {line.split("  ", 1)[1] for line in (out / "SHA256SUMS").read_text("utf-8").splitlines()}
    assert listed | {"SHA256SUMS"} == set(tree(out))
    assert {"README.md", "manifest.json"} <= listed
    assert str(tmp_path) not in (out / "manifest.json").read_text() + (out / "README.md").read_text()
    assert hashlib.sha256(artifact.read_bytes()).hexdigest() in (out / "SHA256SUMS").read_text()


def test_the_date_is_the_one_that_is_stated(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    out = deploy(artifact, "ollama", tmp_path / "out")
    assert {time for _, _, time in tree(out).values()} == {1_700_000_000}
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UserError, match="SOURCE_DATE_EPOCH"):
        deploy(artifact, "ollama", tmp_path / "other")


@pytest.mark.parametrize("target", HERE_MADE)
def test_a_readme_has_three_commands_at_most(target: str, artifact: Path, tmp_path: Path) -> None:
    text = (deploy(artifact, target, tmp_path / "out") / "README.md").read_text("utf-8")
    assert 1 <= sum(line.startswith("    ") for line in text.splitlines()) <= 3
    assert all(word in text for word in ("Start", "Ask:", "Stop:"))


def test_the_facts_are_the_files(artifact: Path) -> None:
    facts = gather(artifact, "gguf", Request())
    assert (facts.bos_token, facts.eos_token, facts.stop_strings) == (TOKENS[1], TOKENS[2], (TOKENS[2],))
    assert (facts.license, facts.context_limit, facts.adds_bos) == ("apache-2.0", CONTEXT_LIMIT, True)
    assert facts.sizing.cache_bytes == CACHE_BYTES * 4096 * 4
    assert facts.sizing.weights_bytes == artifact.stat().st_size


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ('It\'s a "Model" Größe.gguf', "it-s-a-model-grosse"),
        ("模型.gguf", "model"),
        ("7b.gguf", "model-7b"),
        ("-.gguf", "model"),
        (f"{'long ' * 20}.gguf", "long-long-long-long-long-long-long-long"),
    ],
)
def test_a_name_becomes_plain(file: str, name: str, tmp_path: Path) -> None:
    facts = gather(make_gguf(tmp_path / file), "gguf", Request())
    assert (facts.name, facts.model) == (name, file.removesuffix(".gguf"))


def test_a_link_has_its_own_name(tmp_path: Path) -> None:
    link = tmp_path / "expert.gguf"
    link.symlink_to(make_gguf(tmp_path / "0a1b2c"))
    out = deploy(link, "ollama", tmp_path / "out")
    assert (out / "expert.gguf").read_bytes() == link.read_bytes()
    assert not (out / "expert.gguf").is_symlink()


def test_a_name_that_cannot_be_printed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be printed"):
        deploy(make_gguf(tmp_path / "a\nb.gguf"), "ollama", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_chooses_context_and_requests(artifact: Path, tmp_path: Path) -> None:
    out = deploy(artifact, "systemd", tmp_path / "out", memory=145_000_000)
    sizing = manifest_of(out)["sizing"]
    assert sizing["memory_limit_bytes"] <= 145_000_000
    assert 512 <= sizing["context_tokens"] < 4096
    with pytest.raises(UserError, match="are too little"):
        deploy(artifact, "systemd", tmp_path / "other", memory=50_000_000)
    assert not (tmp_path / "other").exists()


def interval(value: float) -> records.Interval:
    return records.Interval(value, value, value)


def bench_report(name: str, peak_bytes: float) -> records.BenchReport:
    peak = records.Comparison(
        "peak_memory_bytes", "Peak memory", "bytes", "lower",
        interval(1e9), interval(peak_bytes), interval(1), None, "less",
    )  # fmt: skip
    sides = [records.Artifact(file, 1, None, None) for file in ("original.gguf", name)]
    suite = records.Suite(
        "llamacpp", "llama-cpp-python\n1.0", sides[0], sides[1], 1000, (peak,), (), (), (), "", None, 1.0
    )
    machine = records.Environment("cpu", 6, 6, 8 << 30, None, None, None, (), "Linux", {})
    return records.BenchReport("2026", records.BenchOptions(), machine, (suite,), 1.0)


def test_a_measured_peak_is_what_the_memory_rests_on(artifact: Path, tmp_path: Path) -> None:
    from cusprun.codec import dump_json, to_plain

    results = tmp_path / "bench.json"
    dump_json(bench_report("expert.gguf", 300 * MIB), results)
    sizing = manifest_of(deploy(artifact, "systemd", tmp_path / "out", results=results))["sizing"]
    rest = 300 * MIB - artifact.stat().st_size - 1000 * CACHE_BYTES
    buffer = 4096 * 512 * 4  # llama.cpp's mask for a batch of a prompt
    assert sizing["overhead_bytes"] == FRONT_BYTES + rest + buffer
    assert (sizing["source"], sizing["measured_in"]) == ("measured", "llama-cpp-python 1.0")
    assert sizing["num_threads"] == 6
    options = {"original": str(make_gguf(tmp_path / "original.gguf"))}
    both = deploy(artifact, "docker", tmp_path / "both", results=results, options=options)
    beside = yaml.safe_load((both / "compose.yaml").read_text())["services"]
    for side in ("expert", "original"):
        command = beside[side]["command"]
        assert command[command.index("--threads") + 1] == "6", "or the two are not compared alike"
    whole = tmp_path / "results.json"
    whole.write_text(json.dumps({"bench": to_plain(bench_report("expert.gguf", 300 * MIB))}))
    again = manifest_of(deploy(artifact, "systemd", tmp_path / "again", results=whole))["sizing"]
    assert again == sizing


def test_a_measurement_of_another_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    from cusprun.codec import dump_json

    results = tmp_path / "bench.json"
    dump_json(bench_report("other.gguf", 300 * MIB), results)
    with pytest.raises(UserError, match=r"but of: original\.gguf, other\.gguf"):
        deploy(artifact, "systemd", tmp_path / "out", results=results)
    results.write_text('{"bench": null}')
    with pytest.raises(ConfigError, match="holds no benchmark"):
        deploy(artifact, "systemd", tmp_path / "out", results=results)
    with pytest.raises(UserError, match="does not exist"):
        deploy(artifact, "systemd", tmp_path / "out", results=tmp_path / "none.json")


REFUSED: list[tuple[dict[str, Any], type[UserError], str]] = [
    ({"to": "olama"}, UserError, "did you mean 'ollama'"),
    ({"to": "bundle", "platform": "linux-x86"}, UserError, "did you mean 'linux-x86_64'"),
    ({"to": "ollama", "platform": "linux-x86_64"}, UserError, "unknown option"),
    (
        {"to": "bundle", "platform": "linux-x86_64", "options": {"platform": "macos-arm64"}},
        UserError,
        "give one",
    ),
    ({"to": "ollama", "options": {"sistem": "x"}}, UserError, "did you mean 'system'"),
    ({"to": "ollama", "options": {"system": 'say """'}}, UserError, "ends it in a Modelfile"),
    ({"to": "ollama", "options": {"system": "a\u200bb"}}, UserError, r"holds '\\u200b', which Ollama drops"),
    ({"to": "systemd", "context": CONTEXT_LIMIT + 1}, UserError, "over the model's"),
    ({"to": "systemd", "parallel": 0}, UserError, "at least 1"),
]


@pytest.mark.parametrize(("arguments", "error", "said"), REFUSED)
def test_bad_input_is_refused_before_anything_is_written(
    arguments: dict[str, Any], error: type[UserError], said: str, artifact: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        deploy(artifact, out=tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["expert.gguf"]


def test_an_output_that_exists_is_kept(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        deploy(artifact, "ollama", artifact)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no artifact of a known format"):
        deploy(tmp_path / "empty", "ollama", tmp_path / "out")
    with pytest.raises(ModelError, match="does not exist"):
        deploy(tmp_path / "none.gguf", "ollama", tmp_path / "out")


def test_a_format_that_a_target_cannot_serve_is_refused(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    save_file({"model.embed_tokens.weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    with pytest.raises(
        ExportError, match=r"the target ollama serves no vllm artifacts .*export the model to gguf"
    ):
        deploy(folder, "ollama", tmp_path / "out")


def test_an_interrupted_deployment_leaves_nothing(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploy import ollama

    def broken(*_: object) -> Any:
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(ollama, "files", broken)
    with pytest.raises(KeyboardInterrupt):
        deploy(artifact, "ollama", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["expert.gguf"]


def test_a_modelfile_says_what_ollama_needs(artifact: Path, tmp_path: Path) -> None:
    out = deploy(artifact, "ollama", tmp_path / "out", context=1024, options={"system": "Be\nterse."})
    text = (out / "Modelfile").read_text("utf-8")
    assert text.splitlines()[0] == "FROM ./expert.gguf"
    assert (out / "expert.gguf").read_bytes() == artifact.read_bytes()
    assert "\nPARAMETER num_ctx 1024\n" in text
    assert '\nPARAMETER stop """<|im_end|>"""\n' in text
    assert '\nSYSTEM """Be\nterse."""\n' in text
    assert '\nLICENSE """apache-2.0"""\n' in text
    assert text.count('"""') == 8


def test_the_command_line_does_the_same(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["deploy", str(artifact), "--to", "systemd", "--out", str(out), "--memory", "0.5GB"]
    assert run([*arguments, "-o", "port=9000"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert "\nPORT=9000\n" in (out / "expert.env").read_text()
    assert run([*arguments, "-o", "port"]) == 2
    assert "write NAME=VALUE" in capsys.readouterr().err


ODD = 'it\'s a "$HOME" `id` \\ {{ x }} % # Größe 模型'


@pytest.mark.parametrize("read", [yaml.safe_load, json.loads], ids=["yaml", "json"])
@pytest.mark.parametrize("value", [ODD, "yes", "1e3", "2020-01-01", "", "a: b\n- c", 7])
def test_a_yaml_value_is_read_back(read: Callable[[str], object], value: object) -> None:
    assert read(yaml_scalar(value)) == value


@pytest.mark.parametrize("value", [ODD, "", "a\nb", "-n"])
def test_a_shell_word_is_itself(value: str) -> None:
    done = subprocess.run(["sh", "-c", f"printf %s {shell(value)}"], capture_output=True, check=True)
    assert done.stdout.decode() == value


def test_values_that_would_break_a_line_are_refused() -> None:
    for escape in (docker_value, markdown):
        with pytest.raises(UserError, match="cannot be printed"):
            escape("a\nb")
    assert docker_value('a "b" $c \\d') == r'"a \"b\" \$c \\d"'


def test_every_target_has_a_line_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text("utf-8")
    assert all(f"| [`{name}`](#{name})" in text for name in TARGETS)


@pytest.mark.parametrize("target", ["docker", "kubernetes"])
def test_what_a_container_is_granted_is_within_the_memory_too(
    target: str, artifact: Path, tmp_path: Path
) -> None:
    budget = 200 * MIB
    options = {"image": "registry.example/expert:1"} if target == "kubernetes" else {}
    out = deploy(artifact, target, tmp_path / "out", memory=budget, options=options)
    if target == "docker":
        service = yaml.safe_load((out / "compose.yaml").read_text())["services"]["expert"]
        granted = service["deploy"]["resources"]["limits"]["memory"].removesuffix("M")
    else:
        spec = yaml.safe_load((out / "base" / "deployment.yaml").read_text())["spec"]["template"]["spec"]
        granted = spec["containers"][0]["resources"]["limits"]["memory"].removesuffix("Mi")
    assert 0.9 * budget < int(granted) * MIB <= budget
    beside = manifest_of(out)["sizing"]["overhead_bytes"]
    alone = manifest_of(deploy(artifact, "systemd", tmp_path / "alone", context=512, parallel=1))["sizing"]
    assert beside > alone["overhead_bytes"], "a health check runs there as well"
