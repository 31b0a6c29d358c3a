"""Whatever is wrong with the input: one sentence of ours, nothing left behind, the input untouched."""

from __future__ import annotations

import random
import shutil
import struct
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_tiny import byte_level_parts, sentencepiece_parts, tiny_model, write_gguf

from cusprun.checkpoint.gguf_header import read_gguf
from cusprun.checkpoint.gguf_import import import_gguf
from cusprun.errors import CusprunError, ModelError, OutputError, UnsupportedModelError, UserError

PARTS = byte_level_parts(300)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama", True, len(PARTS["tokens"]))
    return write_gguf(tmp_path_factory.mktemp("sound") / "m.gguf", model, PARTS, kind="Q8_0")


def refused(path: Path, kind: type[CusprunError] = ModelError, words: str = "", **options: Any) -> str:
    """Import, expect one sentence that names the file, and expect nothing left behind."""
    out = path.parent / "out"
    before = sorted(path.parent.iterdir())
    with pytest.raises(kind) as caught:
        import_gguf(path, out, **options)
    assert sorted(path.parent.iterdir()) == before
    text = str(caught.value)
    assert words in text
    assert "\n" not in text
    return text


def rewritten(tmp_path: Path, **options: Any) -> Path:
    model = tiny_model("llama", True, len(PARTS["tokens"]))
    return write_gguf(tmp_path / "m.gguf", model, PARTS, **options)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", words="does not exist")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", words="is a folder")


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"\x80\x04pickle", b"PK\x03\x04" * 20])
def test_not_a_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf")


@pytest.mark.parametrize(("version", "words"), [(1, "version 1"), (9, "version 9"), (3 << 24, "big-endian")])
def test_versions(tmp_path: Path, sound: Path, version: int, words: str) -> None:
    data = bytearray(sound.read_bytes())
    data[4:8] = struct.pack("<I", version)
    (tmp_path / "m.gguf").write_bytes(data)
    refused(tmp_path / "m.gguf", UnsupportedModelError, words)


def test_truncated_anywhere(tmp_path: Path, sound: Path) -> None:
    """Every cut is refused: in the header at many places, in the data down to the last byte."""
    data = sound.read_bytes()
    header = min(tensor.offset for tensor in read_gguf(sound).tensors.values())
    cuts = [*range(8, 200), *range(200, header, 211), *range(header, len(data), 9001), len(data) - 1]
    path = tmp_path / "m.gguf"
    for cut in cuts:
        path.write_bytes(data[:cut])
        refused(path)


@pytest.mark.parametrize("vocabulary", ["byte level", "sentencepiece"])
def test_flipped_bytes(tmp_path: Path, vocabulary: str) -> None:
    """A damaged file is imported or refused by our own errors, in bounded time and memory."""
    parts = PARTS if vocabulary == "byte level" else sentencepiece_parts(300)
    source = write_gguf(tmp_path / "m.gguf", tiny_model("llama", True, len(parts["tokens"])), parts)
    data = source.read_bytes()
    header = min(tensor.offset for tensor in read_gguf(source).tensors.values())
    out, random_source, outcomes = tmp_path / "out", random.Random(0), {"imported": 0, "refused": 0}
    sentences: list[str] = []
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(random_source.choice((1, 1, 2, 8))):
            end = 1200 if random_source.random() < 0.4 else header
            place = random_source.randrange(4, end)
            damaged[place] = random_source.choice(
                (0, 1, 0xFF, damaged[place] ^ (1 << random_source.randrange(8)))
            )
        source.write_bytes(damaged)
        try:
            import_gguf(source, out)
            outcomes["imported"] += 1
            shutil.rmtree(out)
        except UserError as error:
            sentences.append(str(error))
            outcomes["refused"] += 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]
    assert min(outcomes.values()) > 0, outcomes
    assert not any("\n" in sentence for sentence in sentences)


@pytest.mark.parametrize("count", [0xFFFFFFFFFFFFFFFF, 1 << 40, 1 << 24])
@pytest.mark.parametrize("place", [8, 16, 24])
def test_absurd_counts(tmp_path: Path, sound: Path, place: int, count: int) -> None:
    """Counts of tensors, of pairs and the length of the first key."""
    data = bytearray(sound.read_bytes())
    data[place : place + 8] = struct.pack("<Q", count)
    (tmp_path / "m.gguf").write_bytes(data)
    refused(tmp_path / "m.gguf", words="damaged")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_not_finite(tmp_path: Path, kind: str, value: float) -> None:
    model = tiny_model("llama", True, len(PARTS["tokens"]))
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    path = write_gguf(tmp_path / "m.gguf", model, PARTS, kind=kind)
    refused(path, words="blk.1.ffn_up.weight holds NaN or infinite values")


def test_beyond_the_range_of_float16(tmp_path: Path) -> None:
    model = tiny_model("llama", True, len(PARTS["tokens"]))
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e6
    path = write_gguf(tmp_path / "m.gguf", model, PARTS)
    refused(path, words="beyond the range", dtype="float16")
    import_gguf(path, tmp_path / "out")


def test_unknown_tensor_type(tmp_path: Path, sound: Path) -> None:
    data = bytearray(sound.read_bytes())
    name = b"blk.0.ffn_up.weight"
    place = data.index(name) + len(name) + 4 + 16
    assert data[place : place + 4] == struct.pack("<I", 8)  # Q8_0
    for code, words in ((999, "unknown type 999"), (9, "cannot be dequantised")):  # 9 is Q8_1
        data[place : place + 4] = struct.pack("<I", code)
        (tmp_path / "m.gguf").write_bytes(data)
        # Q8_1 blocks are larger, so another tensor may run past the end first; either sentence is right.
        refused(tmp_path / "m.gguf", words=words if code == 999 else "blk.0.ffn_up")


def test_output_exists(tmp_path: Path, sound: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        import_gguf(sound, tmp_path / "out")


def test_no_space(tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 9, 1))
    with pytest.raises(OutputError, match="free some space"):
        import_gguf(sound, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "kind", "words"),
    [
        ({"general.architecture": "gemma2"}, UnsupportedModelError, "'gemma2', which is not supported"),
        ({"llama.final_logit_softcapping": 30.0}, UnsupportedModelError, "caps its logits"),
        ({"llama.attn_logit_softcapping": 50.0}, UnsupportedModelError, "caps its logits"),
        ({"llama.expert_count": 8}, UnsupportedModelError, "mixture of 8 experts"),
        ({"general.type": "adapter"}, UnsupportedModelError, "'adapter'"),
        ({"split.count": 4}, UnsupportedModelError, "one of 4 parts"),
        ({"llama.rope.dimension_count": 8}, UnsupportedModelError, "rotated dimensions"),
        ({"llama.attention.scale": 0.5}, UnsupportedModelError, "scales attention"),
        ({"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 4.0}, UnsupportedModelError, "'su'"),
        ({"llama.rope.freq_base": 0.0}, ModelError, "freq_base"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, ModelError, "finite"),
        ({"llama.block_count": 1 << 31}, ModelError, "blocks"),
        ({"llama.block_count": 3}, ModelError, "no tensor blk.2"),
        ({"llama.embedding_length": 128}, ModelError, "embedding_length"),
        ({"llama.feed_forward_length": 95}, ModelError, "the metadata say"),
        ({"llama.attention.head_count": 0}, ModelError, "head_count"),
        ({"llama.attention.head_count": 7}, ModelError, ""),
        ({"llama.attention.head_count_kv": 3}, ModelError, "not a multiple"),
        ({"llama.context_length": "long"}, ModelError, "context_length"),
        ({"tokenizer.chat_template.../../evil": "x"}, ModelError, "unsafe name"),
    ],
)  # fmt: skip
def test_metadata(tmp_path: Path, metadata: dict[str, Any], kind: type[CusprunError], words: str) -> None:
    architecture = metadata.pop("general.architecture", None)
    path = rewritten(tmp_path, metadata=metadata)
    if architecture:
        data = path.read_bytes().replace(
            struct.pack("<Q", 5) + b"llama", struct.pack("<Q", len(architecture)) + architecture.encode(), 1
        )
        path.write_bytes(data)
    refused(path, kind, words)


def test_unknown_pre_tokenizer_and_tensor(tmp_path: Path) -> None:
    refused(rewritten(tmp_path, pre_name="qwen3-bpe"), UnsupportedModelError, "qwen3-bpe")
    extra = {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    refused(rewritten(tmp_path, extra=extra), UnsupportedModelError, "blk.0.attn_q_norm.weight")


def test_rotary_tables_that_switch_with_the_length(tmp_path: Path) -> None:
    extra = {f"rope_factors_{name}.weight": np.ones(8, np.float32) for name in ("long", "short")}
    refused(rewritten(tmp_path, extra=extra), UnsupportedModelError, "longrope")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"gemma3.attention.sliding_window_pattern": [True, False]}, "2 entries for 6 blocks"),
        ({"gemma3.attention.sliding_window_pattern": "every"}, "sliding_window_pattern"),
        ({"gemma3.rope.freq_base_swa": 0.5}, "freq_base_swa"),
    ],
)
def test_blocks_of_two_kinds(tmp_path: Path, metadata: dict[str, Any], words: str) -> None:
    model = tiny_model("gemma3_text", True, len(PARTS["tokens"]))
    refused(write_gguf(tmp_path / "m.gguf", model, PARTS, metadata=metadata), ModelError, words)


def test_unknown_dtype(tmp_path: Path, sound: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        import_gguf(sound, tmp_path / "out", dtype="bf16")


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("tokens", lambda tokens: [*tokens[:-1], tokens[0]], "a token twice"),
        ("types", lambda types: types[:-1], "token types"),
        ("merges", lambda merges: [*merges, "nosplit"], "no two parts"),
        ("merges", lambda merges: [*merges, "ab cd"], "inconsistent"),
    ],
)
def test_vocabulary(tmp_path: Path, key: str, change: Any, words: str) -> None:
    parts = PARTS | {key: change(list(PARTS[key]))}
    model = tiny_model("llama", True, len(PARTS["tokens"]))
    refused(write_gguf(tmp_path / "m.gguf", model, parts), words=words)


def test_vocabulary_of_another_size(tmp_path: Path) -> None:
    model = tiny_model("llama", True, len(PARTS["tokens"]) + 7)
    refused(write_gguf(tmp_path / "m.gguf", model, PARTS), words="rows of embedding")
