"""Odd but possible input: refused in one sentence like any bad one, or taken, and nothing is left behind."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from test_cli_bad_input import PRUNE, WEIGHTS, edit_config, leftovers, poison, snapshot, write

from cusprun.checkpoint.output import atomic_file, atomic_folder
from cusprun.codec import dump_json
from cusprun.errors import OutputError
from cusprun.records import Message

UP = "model.layers.0.mlp.up_proj.weight"
PLANNED = (*PRUNE, "--plan", "plan.json")
DOMAIN = "domain: {sources: [%s]}\n"


def edit_header(change: Callable[[dict], object]) -> Callable[[], None]:
    """Change the header of the weights; bytes that ``change`` returns take its place."""

    def edit() -> None:
        data = Path(WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        Path(WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return edit


def entry(**values: object) -> Callable[[], None]:
    return edit_header(lambda header: header[UP].update(values))


def overlap(header: dict) -> None:
    header[UP]["data_offsets"] = header[UP.replace("0", "1")]["data_offsets"]


def bad_utf8_in_parquet() -> None:
    buffers = [None, pyarrow.py_buffer(struct.pack("<2i", 0, 2)), pyarrow.py_buffer(b"\xff\xfe")]
    parquet.write_table(
        pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)}), "bad.parquet"
    )
    Path("expert.yaml").write_text(DOMAIN % "{path: bad.parquet}")


Case = namedtuple("Case", "change arguments words")
CASES = {
    "type that is a list": Case(entry(dtype=["F32"]), PRUNE, (UP, "corrupt")),
    "integer weights": Case(entry(dtype="I32"), PRUNE, (UP, "I32", "F32")),
    "overlapping tensors": Case(edit_header(overlap), PRUNE, ("model.safetensors", "does not begin")),
    "header nested too deeply": Case(edit_header(lambda _: b"[" * 100_000), PRUNE, ("model.safetensors",)),
    "a billion blocks": Case(edit_config(num_hidden_layers=10**9), PRUNE, ("config.json", "blocks")),
    "biases that are not there": Case(
        edit_config(attention_bias=True), PRUNE, ("config.json", "q_proj.bias")
    ),
    "unknown activation": Case(edit_config(hidden_act="bogus"), PRUNE, ("config.json", "bogus")),
    "unknown rotary kind": Case(
        edit_config(rope_parameters={"rope_type": "bogus", "rope_theta": 1e4}),
        PRUNE,
        ("config.json", "bogus"),
    ),
    "config that transformers refuses": Case(
        edit_config(rms_norm_eps="x"), PRUNE, ("config.json", "rms_norm_eps")
    ),
    "padding outside the vocabulary": Case(edit_config(pad_token_id=10**6), PRUNE, ("config.json",)),
    "config nested too deeply": Case(write("model/config.json", "[" * 100_000), PRUNE, ("config.json",)),
    "Parquet with broken text": Case(bad_utf8_in_parquet, PRUNE, ("bad.parquet",)),
    "corpus path that is too long": Case(
        write("expert.yaml", DOMAIN % f"{{path: {'x' * 5000}}}"), PRUNE, ("does not exist",)
    ),
    "corpus of a user who does not exist": Case(
        write("expert.yaml", DOMAIN % "{path: ~nobody-of-that-name/x.jsonl}"), PRUNE, ("nobody-of-that-name",)
    ),
    "pattern without files": Case(write("expert.yaml", DOMAIN % "{path: '*.md'}"), PRUNE, ("*.md",)),
    "half a character in the expert": Case(
        write("expert.yaml", 'name: "\\ud800"\n' + DOMAIN % "{path: domain.jsonl}"), PRUNE, ("expert.yaml:1",)
    ),
    "plan nested too deeply": Case(write("plan.json", "[" * 100_000), PLANNED, ("plan.json",)),
    "endless size": Case(lambda: None, (*PRUNE, "--shard-size", "9" * 400), ("size",)),
    "output name that is too long": Case(lambda: None, (*PRUNE[:-1], "x" * 300), ("too long",)),
    "model name that is too long": Case(lambda: None, ("inspect", "x" * 300), ("too long",)),
    "model name that is not UTF-8": Case(lambda: None, ("inspect", "gr\udcf6n"), ("UTF-8",)),
    "ratio, with folders to be made": Case(
        lambda: None, (*PRUNE[:-1], "new/folder/out", "--ratio", "0.95"), ("ratio",)
    ),
    "NaN, with folders to be made": Case(poison(float("nan")), (*PRUNE[:-1], "new/folder/out"), ("NaN",)),
    "output below a file": Case(lambda: None, (*PRUNE[:-1], "expert.yaml/out"), ("no folder",)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_odd_input_is_refused_in_one_sentence(work, cusprun, case) -> None:
    case.change()
    before = snapshot(work)
    outcome = cusprun(*case.arguments)
    assert outcome.code == 2, outcome
    assert sum(line.startswith("error: ") for line in outcome.err.splitlines()) == 1
    assert "Traceback" not in outcome.err
    for word in case.words:
        assert word in outcome.err
    assert snapshot(work) == before
    assert not leftovers(work)


@pytest.fixture
def planned(work, cusprun) -> dict:
    assert cusprun("score", "model", "--expert", "expert.yaml", "--out", "store").code == 0
    assert cusprun("plan", "model", "--scores", "store", "--for", "gguf:f16", "--out", "plan.json").code == 0
    plan: dict = json.loads(Path("plan.json").read_text())
    return plan


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ('"ratio": 0.25', '"ratio": NaN', "NaN"),
        ('"ratio": 0.25', f'"ratio": {"9" * 400}', "ratio"),
        ('"ratio": 0.25', f'"ratio": {"9" * 5000}', "plan.json"),
        ('"kv_groups": "0-1"', '"kv_groups": "0-9999999999"', "kv_groups"),
        ('"kv_groups": "0-1"', '"kv_groups": [0, 1]', "text like"),
        ('"kv_groups": "0-1"', '"kv_groups": "²"', "kv_groups"),
        ('"schema_version": 2', '"schema_version": 99', "schema_version"),
        ('"rule": "surgeon"', '"rule": "surgoen"', "did you mean 'surgeon'"),
        ('"ratio": 0.25', '"ratio": 0.85', "says ratio 0.85"),
        ('"kept_blocks": "0-1"', '"kept_blocks": "0"', "keeps 1 of the model's 2 blocks"),
        ('"gguf:f16"', '"gguf:q4_k_m"', "multiple of 256"),
        ('"ffn_channel",', '"ffn_chanel",', "did you mean 'ffn_channel'"),
    ],
)
def test_an_edited_plan_with_nonsense_is_refused(work, cusprun, planned, old, new, word) -> None:
    text = Path("plan.json").read_text()
    assert old in text
    Path("plan.json").write_text(text.replace(old, new))
    outcome = cusprun(*PLANNED)
    assert outcome.code == 2, outcome
    assert word in outcome.err
    assert not Path("out").exists()


def test_an_edited_plan_is_applied_as_it_stands(work, cusprun, planned) -> None:
    for layer in planned["layers"]:
        layer["ffn_channels"] = "3 5-10"
    # As an editor of Windows saves it.
    Path("plan.json").write_text(json.dumps(planned), encoding="utf-8-sig")
    assert cusprun(*PLANNED).code == 0
    assert json.loads(Path("out/config.json").read_text())["intermediate_size"] == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_store_with_impossible_impacts_is_refused(work, cusprun, planned, value) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    arrays = load_file("store/layer-00001.safetensors")
    arrays["ffn_channel"][0, 0] = value
    with safe_open("store/layer-00001.safetensors", framework="pt") as stream:
        metadata = stream.metadata()
    save_file(arrays, "store/layer-00001.safetensors", metadata)
    outcome = cusprun("plan", "model", "--scores", "store", "--for", "gguf:f16")
    assert outcome.code == 2, outcome
    assert "layer-00001.safetensors" in outcome.err


def test_activations_that_overflow_are_refused_and_not_stored(work, cusprun) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(WEIGHTS)
    weights["model.layers.0.mlp.up_proj.weight"] *= 1e30
    weights["model.layers.0.mlp.gate_proj.weight"] *= 1e30
    save_file(weights, WEIGHTS)
    outcome = cusprun(*PRUNE, "--for", "gguf:f16")
    assert outcome.code == 2, outcome
    assert "overflow" in outcome.err
    assert not list((work / "cache" / "scores").iterdir())


def test_a_pattern_names_several_files(work, cusprun) -> None:
    notes = work / "my [notes]"  # signs of a pattern in a folder that is there
    notes.mkdir()
    for number in range(12):
        (notes / f"{number}.md").write_text(f"river stone apple {number} " * 20)
    Path("expert.yaml").write_text(DOMAIN % "{path: 'my [notes]/*.md'}")
    assert cusprun(*PRUNE, "--for", "gguf:f16").code == 0
    manifest = json.loads(Path("out/cusprun.json").read_text())
    assert manifest["calibration_documents"] + manifest["held_out_documents"] == 12
    assert str(work) not in Path("out/cusprun.json").read_text()


def test_a_limit_beyond_any_source_takes_all(work, cusprun) -> None:
    Path("expert.yaml").write_text(DOMAIN % f"{{path: domain.jsonl, limit: {10**30}}}")
    assert cusprun(*PRUNE, "--for", "gguf:f16").code == 0


def test_an_export_interrupted_in_its_proof_can_be_run_again(work, cusprun, monkeypatch) -> None:
    from cusprun.pipeline import artifacts, proof

    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(proof.ArtifactRuntime, "require", lambda _runtime: None)
    monkeypatch.setattr(artifacts, "prove", interrupted)
    before = snapshot(work)
    assert cusprun("export", "model", "--out", "a.gguf").code == 130
    assert snapshot(work) == before


def test_an_output_that_another_process_makes_meanwhile_is_kept(tmp_path) -> None:
    def folder() -> None:
        with atomic_folder(tmp_path / "a") as ours:
            (ours / "ours").touch()
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "theirs").touch()

    def file() -> None:
        with atomic_file(tmp_path / "b") as ours:
            ours.write_text("ours")
            (tmp_path / "b").write_text("theirs")

    for make in (folder, file):
        with pytest.raises(OutputError, match="another process"):
            make()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["theirs"]
    assert (tmp_path / "b").read_text() == "theirs"
    assert not leftovers(tmp_path)


def test_a_record_that_cannot_be_committed_leaves_nothing(tmp_path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        dump_json(Message("user", "x"), tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_reader_that_has_seen_enough_is_no_error(work) -> None:
    command = [sys.executable, "-m", "cusprun", "inspect", "model"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(written)
    assert (done.returncode, done.stderr) == (0, b"")
    closed = f"{sys.executable} -m cusprun inspect model >&-"
    done = subprocess.run(["sh", "-c", closed], stderr=subprocess.PIPE, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
