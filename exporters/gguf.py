"""Hugging Face folder to GGUF: metadata and tensor table first, then one tensor after the other.

f32, f16, bf16 and q8_0 are written as they are read. The other types are made by llama.cpp's quantiser in
this process, from a file that holds the weights as they are.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from cusprun.checkpoint.gguf_header import read_gguf
from cusprun.checkpoint.index import CheckpointIndex, open_checkpoint
from cusprun.checkpoint.output import atomic_file, refuse_existing, require_space
from cusprun.errors import ExportError, require_kind, require_known, require_list
from cusprun.paths import is_gguf
from cusprun.progress import SILENT, Progress
from exporters.gguf_imatrix import importance_matrix
from exporters.gguf_load import load_once
from exporters.gguf_locate import locate
from exporters.gguf_metadata import add_architecture, add_provenance, add_vocab
from exporters.gguf_quantise import quantise, require_quantiser
from exporters.gguf_rope import Rope, rope_of
from exporters.gguf_support import graph_losses, refuse_unsupported, target_of
from exporters.gguf_tensors import QUANTS, PlannedTensor, append_tensors, plan_tensors
from exporters.gguf_types import (
    BASES,
    FILE_TYPES,
    ChosenType,
    bits_per_weight,
    choose_types,
    parse_tensor_types,
    substitutions,
)
from exporters.gguf_vocab import GgufVocab, read_vocab

__all__ = ["Options", "check", "export", "locate", "quant_of"]

log = logging.getLogger(__name__)

_IMATRIX_COUNT = "quantize.imatrix.entries_count"  # llama.cpp's own key
_METADATA_BYTES_PER_TOKEN = 64  # token, type, score and merges; generous


@dataclass(frozen=True)
class Options:
    """What can be chosen besides the precision.

    ``imatrix``: round with the importance of the inputs, when there is one. ``tensor_types``: texts
    ``PATTERN=TYPE`` that give single matrices another type; the pattern is a regular expression searched for
    in GGUF names, and the first that matches counts. ``threads``: those of the quantiser, all cores when not
    given.
    """

    imatrix: bool = True
    tensor_types: tuple[str, ...] = ()
    threads: int | None = None


@dataclass(frozen=True)
class _Job:
    """Everything known before the first byte is written; ``written`` is the precision of what we write."""

    index: CheckpointIndex
    quant: str
    written: str
    vocab: GgufVocab
    rope: Rope
    tensors: tuple[PlannedTensor, ...]
    options: Options
    overrides: Mapping[str, gguf.GGMLQuantizationType] = field(default_factory=dict)

    @property
    def is_quantised(self) -> bool:
        """Whether llama.cpp's quantiser makes the file from the one we write."""
        return self.quant not in QUANTS or bool(self.overrides)

    def types(self, importance: bool) -> dict[str, ChosenType]:
        """Return the type that each tensor gets."""
        return choose_types(
            self.tensors, self.index.shape, self.quant, importance=importance, overrides=self.overrides
        )

    @property
    def matrices(self) -> tuple[str, ...]:
        """GGUF names of the matrices."""
        return tuple(tensor.name for tensor in self.tensors if len(tensor.shape) > 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of the file that we write, rounded up."""
        return self._num_bytes(self.tensors)

    def num_bytes_as(self, chosen: Mapping[str, ChosenType]) -> int:
        """Bytes of the file in the types chosen, rounded up."""
        return self._num_bytes([replace(tensor, type=chosen[tensor.name].type) for tensor in self.tensors])

    def _num_bytes(self, tensors: Sequence[PlannedTensor]) -> int:
        padding = len(tensors) * int(gguf.GGUF_DEFAULT_ALIGNMENT)
        data = sum(planned.num_bytes for planned in tensors)
        return data + padding + _METADATA_BYTES_PER_TOKEN * len(self.vocab.tokens) + (1 << 20)


def check(index: CheckpointIndex, quant: str, options: Options | None = None) -> tuple[str, ...]:
    """Say what an export to GGUF would lose; an empty tuple means nothing. Reads no weights.

    Raises:
        ExportError: the precision or an option is unknown, the family cannot be written, the tokenizer is
            missing or of a kind that llama.cpp cannot reproduce, or the model has a setting (rope scaling,
            activation, sliding window) that it lacks.
        MissingDependencyError: the precision needs llama.cpp's quantiser, which is not installed.
    """
    return _losses(_prepare(index, quant, options or Options()))


def export(
    folder: Path,
    out: Path,
    *,
    quant: str,
    options: Options | None = None,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Write the model of a Hugging Face folder as a GGUF file and return its path.

    Norms and biases are always float32. Memory: a few rows at a time. A quantised file takes a
    temporary one beside it, in the precision of the folder. When llama-cpp-python is installed, the finished
    file is loaded and run for one token before it gets its name.

    Args:
        folder: the model; never written to.
        out: the file to make; whole or absent.
        quant: one of ``exporters.registry.FORMATS["gguf"].quants``.
        options: see ``Options``.
        importance: mean squared input of each linear layer, float32 ``[in_features]``, by module name.
        progress: told about each tensor and about the bytes that the quantiser has written.

    Raises:
        ModelError: the folder is damaged or holds NaN or infinite weights.
        ExportError: see ``check``; or a weight does not fit the precision; or the importance does not fit the
            model; or llama.cpp refuses the file.
        OutputError: ``out`` exists, or does not fit on the disk.
        MissingDependencyError: see ``check``.
    """
    require_known(quant, BASES, "GGUF precision", ExportError)
    refuse_existing(out)
    job = _prepare(open_checkpoint(folder), quant, options or Options())
    if not job.is_quantised:
        require_space(out, job.num_bytes)
        with atomic_file(out) as partial:
            _write(job, partial, progress)
            load_once(partial, job.index.shape.vocab_size)
        return out
    wanted = importance if job.options.imatrix else None
    matrix = importance_matrix(wanted, job.tensors) if wanted else {}
    chosen = job.types(bool(matrix))
    require_space(out, job.num_bytes + job.num_bytes_as(chosen))
    with atomic_file(out) as partial:
        _write_quantised(job, partial, chosen, matrix, progress)
        load_once(partial, job.index.shape.vocab_size)
    return out


def quant_of(path: Path) -> str | None:
    """Return the precision that a GGUF file is named after; None for anything else.

    A file is one by its first bytes, or by a name that ends in ``.gguf``.

    Raises:
        ModelError: the file is damaged.
        ExportError: it is of a precision without limits.
    """
    if not path.is_file() or not is_gguf(path):
        return None
    file_type = read_gguf(path).metadata.get("general.file_type")
    names = {int(number): name for name, number in FILE_TYPES.items()}
    if file_type not in names:
        raise ExportError(
            f"{path} has the GGUF file type {file_type}, for which there are no limits "
            f"(known: {', '.join(sorted(names.values()))}); export it again with one of these"
        )
    return names[file_type]


def _prepare(index: CheckpointIndex, quant: str, options: Options) -> _Job:
    require_known(quant, BASES, "GGUF precision", ExportError)
    patterns = require_list(options.tensor_types, str, "tensor_types")
    require_kind(options.imatrix, bool, "imatrix", ExportError)
    if options.threads is not None:
        require_kind(options.threads, int, "threads", ExportError)
        if options.threads < 1:
            raise ExportError(f"threads must be 1 or more, not {options.threads}")
    where = str(index.folder / "config.json")
    refuse_unsupported(index, where)
    rope = rope_of(index, where)
    vocab = read_vocab(index.folder, index.shape.vocab_size, index.config)
    written = quant if quant in QUANTS and not patterns else _lossless(index)
    tensors = tuple(plan_tensors(index, written, rope))
    overrides = parse_tensor_types(patterns, tensors, quant)
    job = _Job(index, quant, written, vocab, rope, tensors, options, overrides)
    if job.is_quantised:
        require_quantiser()
    return job


def _lossless(index: CheckpointIndex) -> str:
    """Return the smallest precision that holds every matrix as it is stored."""
    stored = {info.dtype for info in index.tensors.values() if len(info.shape) > 1}
    return {frozenset({"F16"}): "f16", frozenset({"BF16"}): "bf16"}.get(frozenset(stored), "f32")


def _losses(job: _Job) -> tuple[str, ...]:
    losses = [*job.vocab.losses, *graph_losses(job.index)]
    if job.is_quantised:
        chosen = job.types(job.options.imatrix)
        return (*losses, *substitutions(chosen), f"weights are rounded to {_bits(job, chosen)}")
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


def _bits(job: _Job, chosen: Mapping[str, ChosenType]) -> str:
    kinds = Counter(chosen[name].type for name in job.matrices)
    parts = ", ".join(f"{kind.name.lower()} in {count}" for kind, count in kinds.most_common())
    return f"{bits_per_weight(job.tensors, chosen):.2f} bits each ({parts} matrices)"


def _write_quantised(
    job: _Job,
    path: Path,
    chosen: Mapping[str, ChosenType],
    matrix: Mapping[str, NDArray[np.float32]],
    progress: Progress,
) -> None:
    """Write the weights as they are beside ``path``, and quantise them into it."""
    source = path.with_name(f"{path.name}-{job.written}")
    # An override shifts which layers llama.cpp's own rules favour: with one, every type is stated.
    types = {name: chosen[name].type for name in job.matrices} if job.overrides else None
    try:
        _write(job, source, progress, num_importances=len(matrix))
        quantise(
            source,
            path,
            job.quant,
            num_bytes=job.num_bytes_as(chosen),
            importance=matrix,
            types=types,
            threads=job.options.threads,
            progress=progress,
        )
    finally:
        source.unlink(missing_ok=True)
    _tell(job, path, chosen, len(matrix))


def _tell(job: _Job, path: Path, chosen: Mapping[str, ChosenType], num_importances: int) -> None:
    """Say what the quantiser made of the weights, from the file's own table of tensors."""
    tensors = read_gguf(path).tensors
    found = {name: ChosenType(tensors[name].type, choice.wanted) for name, choice in chosen.items()}
    if found != chosen:
        for sentence in substitutions(found):
            log.info("note: %s", sentence)
    how = f"with the importance of inputs in {num_importances}" if num_importances else "without importance"
    log.info("note: weights were rounded to %s, %s", _bits(job, found), how)


def _write(job: _Job, path: Path, progress: Progress, num_importances: int = 0) -> None:
    writer = gguf.GGUFWriter(path, target_of(job.index).architecture)
    try:
        add_provenance(writer, job.index, job.vocab)
        add_architecture(writer, job.index, job.rope)
        add_vocab(writer, job.vocab)
        if num_importances:
            writer.add_uint32(_IMATRIX_COUNT, num_importances)
        writer.add_file_type(QUANTS[job.written][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for planned in job.tensors:
            # the element type only says that the shape is in elements; raw_dtype is what is written
            writer.add_tensor_info(
                planned.name, planned.shape, np.dtype(np.float32), planned.num_bytes, raw_dtype=planned.type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    append_tensors(
        path, job.index, job.tensors, job.rope, stage=f"exporting {job.written}", progress=progress
    )
