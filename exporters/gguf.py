"""Hugging Face folder to GGUF: metadata and tensor table first, then one tensor after the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from cusprun.checkpoint.index import CheckpointIndex, open_checkpoint
from cusprun.checkpoint.output import atomic_file, refuse_existing, require_space
from cusprun.errors import ExportError, OutputError, require_known
from cusprun.progress import SILENT, Progress
from exporters.gguf_load import load_once
from exporters.gguf_metadata import add_architecture, add_provenance, add_vocab
from exporters.gguf_rope import Rope, rope_of
from exporters.gguf_tensors import FAMILIES, QUANTS, PlannedTensor, plan_tensors, target_of, tensor_data
from exporters.gguf_vocab import GgufVocab, read_vocab

_ACTIVATIONS = frozenset({"silu", "swish"})  # the only one in llama.cpp's graphs of these families
_METADATA_BYTES_PER_TOKEN = 64  # token, type, score and merges; generous


@dataclass(frozen=True)
class _Job:
    """Everything known before the first byte is written."""

    index: CheckpointIndex
    quant: str
    vocab: GgufVocab
    rope: Rope
    tensors: tuple[PlannedTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the file, rounded up."""
        padding = len(self.tensors) * int(gguf.GGUF_DEFAULT_ALIGNMENT)
        data = sum(planned.num_bytes for planned in self.tensors)
        return data + padding + _METADATA_BYTES_PER_TOKEN * len(self.vocab.tokens) + (1 << 20)


def check(model: CheckpointIndex, quant: str) -> tuple[str, ...]:
    """Say what an export to GGUF would lose; an empty tuple means nothing. Reads no weights.

    Raises:
        ExportError: the precision is unknown, the family cannot be written, the tokenizer is missing or of a
            kind that llama.cpp cannot reproduce, or the model has a setting (rope scaling, activation,
            sliding window) that it lacks.
    """
    return _losses(_prepare(model, quant))


def export_gguf(folder: Path, out: Path, *, quant: str = "f16", progress: Progress = SILENT) -> Path:
    """Write the model of a Hugging Face folder as a GGUF file and return its path.

    ``quant`` is one of ``f32``, ``f16``, ``bf16`` and ``q8_0``; norms and biases are always float32. Memory:
    one tensor and its converted copy. When llama-cpp-python is installed, the finished file is loaded and
    run for one token before it gets its name.

    Raises:
        ModelError: the folder is damaged or holds NaN or infinite weights.
        ExportError: see ``check``; or a weight does not fit the precision; or llama.cpp refuses the file.
        OutputError: ``out`` exists, or does not fit on the disk.
    """
    require_known(quant, QUANTS, "GGUF precision", ExportError)
    refuse_existing(out)
    job = _prepare(open_checkpoint(folder), quant)
    require_space(out, job.num_bytes)
    with atomic_file(out) as partial:
        _write(job, partial, progress)
        load_once(partial, job.index.shape.vocab_size)
    return out


def _prepare(index: CheckpointIndex, quant: str) -> _Job:
    require_known(quant, QUANTS, "GGUF precision", ExportError)
    where = str(index.folder / "config.json")
    refuse_unsupported(index, where)
    rope = rope_of(index.config, index.shape, where)
    vocab = read_vocab(index.folder, index.shape.vocab_size, index.config)
    return _Job(index, quant, vocab, rope, tuple(plan_tensors(index, quant, rope)))


def refuse_unsupported(index: CheckpointIndex, where: str) -> None:
    """Raise ``ExportError`` when llama.cpp has no graph that computes the model as its config says."""
    family, config = index.family, index.config
    if family.model_type not in FAMILIES:
        raise ExportError(
            f"{where}: models of the family {family.model_type} cannot be written as GGUF "
            f"(supported: {', '.join(FAMILIES)}); use the Hugging Face folder itself"
        )
    if config.get("attention_bias") and not FAMILIES[family.model_type].has_attention_biases:
        raise ExportError(f"{where}: llama.cpp runs {family.model_type} without attention biases only")
    activation = config.get(family.activation_key) or "silu"
    if activation not in _ACTIVATIONS:
        raise ExportError(f"{where}: llama.cpp runs this family with silu only, not with {activation!r}")
    if family.has_sliding_window(config):
        window = family.setting(config, "sliding_window")
        setting = "use_sliding_window to false" if config.get("use_sliding_window") else "it to null"
        raise ExportError(
            f"{where}: llama.cpp runs this family without a sliding window (sliding_window = {window}); set "
            f"{setting} if texts stay under {window} tokens"
        )


def _losses(job: _Job) -> tuple[str, ...]:
    losses = list(job.vocab.losses)
    own, used = job.index.family.gguf_architecture, target_of(job.index).architecture
    if used != own:
        losses.append(
            f"the file says {used!r}: llama.cpp's {own!r} takes no other attention width than hidden_size, "
            f"and its {used!r} computes the same"
        )
    wanted = QUANTS[job.quant][0]
    fallen = [t for t in job.tensors if len(t.shape) > 1 and t.type is not wanted]
    if fallen:
        block = gguf.GGML_QUANT_SIZES[wanted][0]
        losses.append(
            f"{len(fallen)} matrices ({fallen[0].source}, ...) stay f16: their row length "
            f"{fallen[0].shape[-1]} is no multiple of {block}"
        )
    stored = {info.dtype for info in job.index.tensors.values()}
    if job.quant == "f16" and stored - {"F16"}:
        losses.append("weights smaller than 6e-8 become zero in f16")
    elif job.quant == "bf16" and stored - {"BF16"}:
        losses.append("weights are rounded to the 8 significant bits of bf16")
    elif job.quant == "q8_0":
        losses.append("weights are rounded to 8 bits in blocks of 32")
    return tuple(losses)


def _write(job: _Job, path: Path, progress: Progress) -> None:
    writer = gguf.GGUFWriter(path, target_of(job.index).architecture)
    try:
        add_provenance(writer, job.index)
        add_architecture(writer, job.index, job.rope)
        add_vocab(writer, job.vocab)
        writer.add_file_type(QUANTS[job.quant][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for planned in job.tensors:
            # the element type only says that the shape is in elements; raw_dtype is what is written
            writer.add_tensor_info(
                planned.name, planned.shape, np.dtype(np.float32), planned.num_bytes, raw_dtype=planned.type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.stage(f"exporting {job.quant}", len(job.tensors), "tensor") as advance:
            for planned in job.tensors:
                _write_tensor(writer, tensor_data(job.index, planned, job.rope), planned, path)
                advance(1)
    finally:
        writer.close()


def _write_tensor(
    writer: gguf.GGUFWriter, data: NDArray[np.generic], planned: PlannedTensor, path: Path
) -> None:
    try:
        writer.write_tensor_data(data)
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy reports a short write without an error number
        raise OutputError(
            f"{path.parent} filled up while {planned.name} was written; free space or choose another disk"
        ) from None
