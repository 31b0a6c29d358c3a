"""Reading and writing model folders: safetensors as the judge, and every way a folder is broken."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import build_model, save_model

from cusprun.checkpoint.index import model_hash, open_checkpoint
from cusprun.checkpoint.output import atomic_file, atomic_folder, require_space
from cusprun.checkpoint.reader import read_tensor
from cusprun.checkpoint.safetensors_header import read_header
from cusprun.checkpoint.writer import CheckpointWriter, Declared
from cusprun.errors import CusprunError, ModelError, OutputError, UnsupportedModelError

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def _edit_config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def _edit_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def _write_index(text: str) -> Damage:
    """An index in the place of the one file."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


BROKEN: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "config not a mapping": (lambda f: (f / "config.json").write_text("[]"), "mapping"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no safetensors"),
    "pickled weights only": (_pickled, "pickled"),
    "cut off": (_cut, "damaged"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    "huge header": (_huge_header, "damaged"),
    "a tensor missing": (
        _edit_weights(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        "layers.1.mlp.up_proj",
    ),
    "a tensor of another shape": (
        _edit_weights(lambda w: w.update({"model.norm.weight": torch.ones(5)})),
        "shape",
    ),
    "a foreign tensor": (_edit_weights(lambda w: w.update({"model.extra": torch.ones(5)})), "model.extra"),
    "a missing shard": (
        _write_index('{"weight_map": {"a": "b.safetensors"}}'),
        "lacks the shard",
    ),
    "a shard outside": (
        _write_index('{"weight_map": {"a": "../b"}}'),
        "outside the folder",
    ),
    "a damaged index": (
        _write_index("[]"),
        "index.json is damaged",
    ),
    "width of no sense": (_edit_config(hidden_size="many"), "hidden_size"),
    "heads that do not divide": (_edit_config(num_key_value_heads=4), "multiple"),
    "quantised weights": (_edit_config(quantization_config={"bits": 4}), "quantised"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_in_one_sentence(case: str, folder: Path) -> None:
    damage, text = BROKEN[case]
    damage(folder)
    with pytest.raises(ModelError, match=text) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "mamba"}, r"'mamba'.*supported.*llama, mistral"),
        ({"model_type": None}, "supported"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
        ({"num_experts": 4}, "mixture of experts"),
    ],
)
def test_other_families_and_mixtures_are_refused_by_name(
    changes: dict[str, object], text: str, folder: Path
) -> None:
    _edit_config(**changes)(folder)
    with pytest.raises(UnsupportedModelError, match=text):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, folder: Path) -> None:
    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.2.self_attn.k_proj.weight"][3, 4] = value

    _edit_weights(poison)(folder)
    with pytest.raises(ModelError, match=r"layers\.2\.self_attn\.k_proj\.weight holds NaN"):
        read_tensor(open_checkpoint(folder), "model.layers.2.self_attn.k_proj.weight")


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 20_000), flip=st.integers(0, 4_000), value=st.integers(0, 255))
def test_random_damage_is_an_error_of_ours_or_harmless(
    cut: int, flip: int, value: int, tmp_path_factory: pytest.TempPathFactory, pristine: Path
) -> None:
    data = bytearray((pristine / "model.safetensors").read_bytes())
    data[flip % len(data)] = value
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    path.write_bytes(data[: len(data) - cut % len(data)])
    with contextlib.suppress(CusprunError):
        read_header(path)


def test_parameters_and_bytes_are_those_of_the_model(pristine: Path) -> None:
    index = open_checkpoint(pristine)
    model = build_model()
    assert index.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert index.num_bytes == 4 * index.num_parameters


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=3), min_size=1, max_size=8),
    limit=st.integers(1, 2000),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_what_is_written_in_shards_is_what_the_library_reads(
    shapes: list[list[int]], limit: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    tensors = {f"t{n}": torch.randn(shape).to(dtype) for n, shape in enumerate(shapes)}
    folder = tmp_path_factory.mktemp("written")
    declared = [Declared(name, names[dtype], tuple(t.shape)) for name, t in tensors.items()]
    with CheckpointWriter(folder, declared, limit) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    read: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        part = load_file(file)
        bytes_in_file = sum(t.numel() * t.element_size() for t in part.values())
        assert len(part) == 1 or bytes_in_file <= limit
        read.update(part)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_checkpoint_left_half_written_is_our_error(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, [Declared("a", "F32", (2,)), Declared("b", "F32", (2,))])
    with pytest.raises(AssertionError, match="not written"), writer:
        writer.write("a", torch.zeros(2))


def test_the_hash_depends_on_weights_and_config_but_not_on_sharding(folder: Path, tmp_path: Path) -> None:
    first = model_hash(open_checkpoint(folder))
    sharded = tmp_path / "sharded"
    build_model().save_pretrained(sharded, max_shard_size="30KB")
    assert model_hash(open_checkpoint(sharded)) == first
    _edit_weights(lambda w: w["model.norm.weight"].add_(1e-3))(folder)
    assert model_hash(open_checkpoint(folder)) != first


def test_outputs_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), atomic_folder(tmp_path / "folder") as partial:
        (partial / "half").write_text("half")
        raise RuntimeError
    with contextlib.suppress(RuntimeError), atomic_file(tmp_path / "file") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "whole").write_text("whole")
    assert (tmp_path / "folder" / "whole").read_text() == "whole"
    with pytest.raises(OutputError, match="exists already"), atomic_folder(tmp_path / "folder"):
        pass


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="free some space"):
        require_space(tmp_path / "model", 10**18)
    with pytest.raises(OutputError, match="nothing was left behind"), atomic_folder(tmp_path / "full"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
