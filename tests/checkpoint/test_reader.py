"""Weights that are read as pages of their file, and read ahead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_model

from cusprun.checkpoint.index import CheckpointIndex, open_checkpoint
from cusprun.checkpoint.prefetch import prefetch_layer
from cusprun.checkpoint.reader import layer_tensors, read_tensor
from cusprun.checkpoint.safetensors_header import build_header, read_header
from cusprun.errors import ModelError


@pytest.fixture
def index(tmp_path: Path) -> CheckpointIndex:
    return open_checkpoint(save_model(tmp_path / "model"))


def test_every_tensor_is_what_the_library_reads(index: CheckpointIndex) -> None:
    stock = load_file(index.folder / "model.safetensors")
    assert set(index.tensors) == set(stock)
    for name, tensor in stock.items():
        assert torch.equal(read_tensor(index, name), tensor)
        assert read_tensor(index, name, torch.float16).dtype is torch.float16


def test_a_tensor_may_begin_anywhere(index: CheckpointIndex, tmp_path: Path) -> None:
    values = {"a": torch.arange(3, dtype=torch.float16), "b": torch.arange(5.0), "c": torch.empty(0, 4)}
    path = tmp_path / "odd.safetensors"
    names = {torch.float16: "F16", torch.float32: "F32"}
    header = build_header((name, names[value.dtype], tuple(value.shape)) for name, value in values.items())
    path.write_bytes(header + b"".join(value.numpy().tobytes() for value in values.values()))
    odd = CheckpointIndex(tmp_path, {}, index.family, index.shape, read_header(path))
    assert odd.tensors["b"].offset % 4
    for name, value in values.items():
        assert torch.equal(read_tensor(odd, name), value)


def test_writing_to_a_tensor_does_not_reach_the_file(index: CheckpointIndex) -> None:
    before = (index.folder / "model.safetensors").read_bytes()
    tensor = read_tensor(index, "model.norm.weight")
    tensor.zero_()
    assert not tensor.any()
    assert (index.folder / "model.safetensors").read_bytes() == before
    assert read_tensor(index, "model.norm.weight").any()


@pytest.mark.parametrize("loss", ["gone", "cut"])
def test_a_file_that_has_changed_is_an_error_of_ours(loss: str, index: CheckpointIndex) -> None:
    path = index.folder / "model.safetensors"
    if loss == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"layers\.2\.input_layernorm\.weight cannot be read"):
        list(layer_tensors(index, 2))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked")
def test_the_bytes_of_a_block_and_no_others_are_read_ahead(
    index: CheckpointIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, int, int]] = []

    def ask(descriptor: int, offset: int, length: int, advice: int) -> None:
        asked.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), offset, length, advice))

    monkeypatch.setattr(os, "posix_fadvise", ask)
    thread = prefetch_layer(index, 1)
    assert thread is not None
    thread.join()
    wanted = [info for name, info in index.tensors.items() if ".layers.1." in name]
    assert sorted(asked) == sorted(
        (str(info.file.resolve()), info.offset, info.num_bytes, os.POSIX_FADV_WILLNEED) for info in wanted
    )
    assert prefetch_layer(index, 3) is None


def test_what_cannot_be_read_ahead_is_passed_over(index: CheckpointIndex) -> None:
    (index.folder / "model.safetensors").unlink()
    thread = prefetch_layer(index, 0)
    if thread is not None:
        thread.join()
        assert not thread.is_alive()
