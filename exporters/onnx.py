"""Hugging Face folder to a folder that onnxruntime-genai and plain onnxruntime run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cusprun.checkpoint.index import CheckpointIndex, open_checkpoint
from cusprun.checkpoint.output import atomic_folder, refuse_existing, require_space
from cusprun.errors import ExportError, require_kind, require_known
from cusprun.progress import SILENT, Progress
from exporters.onnx_build import BUILDERS, Recipe, build, require_builder
from exporters.onnx_files import copy_provenance, correct_genai_config, read_record, write_record
from exporters.onnx_load import load_once
from exporters.onnx_locate import locate
from exporters.onnx_rope import check_rope
from exporters.onnx_tokenizer import OnnxTokenizer, onnx_tokenizer
from exporters.onnx_weights import check_weights
from exporters.rotated_share import rotated_share

__all__ = ["Options", "check", "export", "locate", "quant_of"]

PRECISIONS: Mapping[str, float] = {"fp32": 4.0, "fp16": 2.0, "int8": 1.125, "int4": 0.7}
"""Bytes per weight, scales and zero points of the smallest blocks included."""

ALGORITHMS = ("default", "rtn", "rtn_last", "k_quant", "k_quant_last", "k_quant_mixed")
"""The builder's names: ``default`` and ``rtn`` round to the nearest, ``k_quant`` searches scale and zero
point of each block; ``_last`` keeps the output head in 8 bits, ``_mixed`` also the sensitive half of V and
down."""

AUTO = "auto"
PROVIDERS = ("cpu", "cuda", "dml", "webgpu", "NvTensorRtRtx")
BLOCK_SIZES = (16, 32, 64, 128, 256)
_DEFAULT_ALGORITHMS = {"int4": "k_quant_mixed", "int8": "default"}
"""In 8 bits all algorithms cost the same and ``default`` is the fastest; see the limits for what 4 bits
cost."""
_DEFAULT_CONTEXT = 4096  # the tables of 32,768 positions take 67 MB at a head size of 256
_SIDE_FILES_BYTES = 128_000_000  # tokenizer, graph, and the tables
_ACTIVATIONS = frozenset({"silu", "swish", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu", "relu"})
_HEAD_MULTIPLE, _ROTARY_MULTIPLE = 8, 16  # what GroupQueryAttention on the CPU takes


@dataclass(frozen=True)
class Options:
    """What can be chosen besides the precision.

    ``context_length`` is the largest number of tokens, prompt and answer together: 4096 or what the model
    takes, whichever is less, unless given. ``block_size`` is the number of weights that share a scale,
    ``algorithm`` how scales are chosen (see ``ALGORITHMS``; ``auto`` is ``k_quant_mixed`` for int4 and
    ``default`` for int8), ``accuracy_level`` the type that onnxruntime multiplies in (1 float32, 2 float16, 3
    bfloat16, 4 int8, 0 its own choice); the three count for int8 and int4 only. ``execution_provider`` is
    what the graph is made for; only ``cpu`` is tried after the export.
    """

    context_length: int | None = None
    block_size: int = 32
    accuracy_level: int = 4
    algorithm: str = AUTO
    execution_provider: str = "cpu"


@dataclass(frozen=True)
class _Job:
    """Everything known before the first byte is written."""

    index: CheckpointIndex
    recipe: Recipe
    tokenizer: OnnxTokenizer

    @property
    def num_bytes(self) -> int:
        """Bytes of the folder, rounded up."""
        shape, size = self.index.shape, PRECISIONS[self.recipe.precision]
        data = self.index.num_parameters * size
        if not shape.tie_word_embeddings and self.recipe.precision.startswith("int"):
            data += shape.vocab_size * shape.hidden_size * 4  # an embedding of its own stays float32
        return int(data) + 16 * self.recipe.context_length * shape.head_dim + _SIDE_FILES_BYTES


def check(index: CheckpointIndex, quant: str, options: Options | None = None) -> tuple[str, ...]:
    """Say what an export to ONNX would lose or change; an empty tuple means nothing. Reads no weights.

    Raises:
        ExportError: the precision or an option is unknown, the tokenizer is missing or of a kind that
            onnxruntime-genai has not, or the model has a shape or setting that it cannot compute.
        MissingDependencyError: a library that builds or runs the model is not installed.
    """
    return _notes(_prepare(index, quant, options or Options()))


def export(
    folder: Path,
    out: Path,
    *,
    quant: str = "int4",
    options: Options | None = None,
    importance: Mapping[str, NDArray[np.float32]] | None = None,  # noqa: ARG001 - no algorithm here takes it
    progress: Progress = SILENT,
) -> Path:
    """Write the model of a Hugging Face folder as a folder with an ONNX graph and return its path.

    The graph is made by the model builder of onnxruntime-genai. Memory: the weights as the folder stores
    them, and one matrix in float32 with a copy. Before the folder gets its name, onnx.checker passes and one
    token is generated in onnxruntime-genai and in plain onnxruntime (on the CPU).

    Raises:
        ModelError: the folder is damaged or holds NaN or infinite weights.
        ExportError: see ``check``; or a weight does not fit float16; or the model does not run.
        MissingDependencyError: see ``check``.
        OutputError: ``out`` exists, or does not fit on the disk.
    """
    refuse_existing(out)
    job = _prepare(open_checkpoint(folder), quant, options or Options())
    require_space(out, job.num_bytes)
    check_weights(job.index, quant, progress)
    with atomic_folder(out) as partial:
        build(job.index, partial, job.recipe, progress)
        job.tokenizer.write(partial)
        correct_genai_config(partial, job.index, job.tokenizer, job.recipe.context_length)
        copy_provenance(job.index.folder, partial)
        write_record(partial, job.index, job.recipe)
        if job.recipe.execution_provider == "cpu":
            load_once(partial, job.recipe.context_length)
    return out


def quant_of(path: Path) -> str | None:
    """Return the precision of a folder that ``export`` made, None for anything but onnxruntime-genai's.

    Raises:
        ExportError: the folder is for onnxruntime-genai and does not say its precision, or an unknown one.
    """
    record = read_record(path)
    if record is None:
        return None
    require_known(record["quant"], PRECISIONS, f"ONNX precision in {path}", ExportError)
    return str(record["quant"])


def _prepare(index: CheckpointIndex, quant: str, options: Options) -> _Job:
    require_known(quant, PRECISIONS, "ONNX precision", ExportError)
    _check_options(options)
    require_builder()
    _refuse_unsupported(index, quant, options)
    recipe = Recipe(
        precision=quant,
        context_length=_context_length(index, options),
        block_size=options.block_size,
        accuracy_level=options.accuracy_level,
        algorithm=_DEFAULT_ALGORITHMS.get(quant, "default")
        if options.algorithm == AUTO
        else options.algorithm,
        execution_provider=options.execution_provider,
    )
    return _Job(
        index,
        recipe,
        onnx_tokenizer(index.folder, index.config, index.shape.vocab_size, recipe.context_length),
    )


def _check_options(options: Options) -> None:
    for name in ("block_size", "accuracy_level"):
        require_kind(getattr(options, name), int, name, ExportError)
    require_known(options.algorithm, (AUTO, *ALGORITHMS), "quantisation algorithm", ExportError)
    require_known(options.execution_provider, PROVIDERS, "execution provider", ExportError)
    if options.block_size not in BLOCK_SIZES:
        raise ExportError(
            f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, not {options.block_size}"
        )
    if options.accuracy_level not in range(5):
        raise ExportError(f"accuracy_level must be from 0 to 4, not {options.accuracy_level}")


def _context_length(index: CheckpointIndex, options: Options) -> int:
    own = int(index.stated("max_position_embeddings"))
    if options.context_length is None:
        return min(own, _DEFAULT_CONTEXT)
    require_kind(options.context_length, int, "context_length", ExportError)
    if not 8 <= options.context_length <= own:
        raise ExportError(
            f"context_length must be from 8 to the model's own {own}, not {options.context_length}"
        )
    return options.context_length


def _refuse_unsupported(index: CheckpointIndex, quant: str, options: Options) -> None:
    """Raise ``ExportError`` when the builder or the kernels cannot compute the model as its config says."""
    where, shape, family = str(index.folder / "config.json"), index.shape, index.family
    if family.model_type not in BUILDERS:
        raise ExportError(
            f"{where}: models of the family {family.model_type} cannot be written as ONNX "
            f"(supported: {', '.join(BUILDERS)}); export to GGUF"
        )
    check_rope(index.config, where)
    activation = index.config.get(family.activation_key) or family.activation
    if activation not in _ACTIVATIONS:
        raise ExportError(f"{where}: the model builder has no activation {activation!r}; export to GGUF")
    if quant == "fp16" and family.overflows_float16:
        raise ExportError(
            f"{where}: the hidden states of {family.model_type} overflow float16; use fp32, int8 or int4"
        )
    rotated = int(shape.head_dim * rotated_share(index))
    fits = not shape.head_dim % _HEAD_MULTIPLE and not rotated % _ROTARY_MULTIPLE
    if options.execution_provider == "cpu" and not fits:
        raise ExportError(
            f"{where}: onnxruntime's attention on the CPU takes head sizes that are multiples of "
            f"{_HEAD_MULTIPLE} with a rotated part that is one of {_ROTARY_MULTIPLE}, not "
            f"{shape.head_dim} and {rotated}; export to GGUF"
        )


def _notes(job: _Job) -> tuple[str, ...]:
    index, recipe, notes = job.index, job.recipe, list(job.tokenizer.losses)
    own = index.stated("max_position_embeddings")
    if recipe.context_length < own:
        notes.append(f"texts can have {recipe.context_length} tokens where the model takes {own}")
    if recipe.precision == "fp16":
        notes.append(
            "weights, activations and the KV cache are rounded to the 11 significant bits of float16"
        )
    elif recipe.precision != "fp32":
        bits = recipe.precision.removeprefix("int")
        notes.append(
            f"matrices are rounded to {bits} bits in blocks of {recipe.block_size} ({recipe.algorithm})"
        )
        if not index.shape.tie_word_embeddings:
            size = index.shape.vocab_size * index.shape.hidden_size * 4
            notes.append(f"the token embedding stays float32 ({size / 1e6:,.0f} MB)")
    if recipe.execution_provider != "cpu":
        notes.append(
            f"a graph for {recipe.execution_provider} is written as the builder makes it, and not tried"
        )
    return tuple(notes)
