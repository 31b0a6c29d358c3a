"""Hugging Face folder to a folder that vLLM serves as it is, quantised or not, one tensor after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cusprun.checkpoint.files import copy_carried_files, tokenizer_hash, write_config
from cusprun.checkpoint.index import CheckpointIndex, open_checkpoint
from cusprun.checkpoint.output import atomic_folder, refuse_existing, require_space
from cusprun.errors import ExportError, reason_of, require_kind, require_known
from cusprun.progress import SILENT, Progress
from exporters.vllm_artifact import locate, quant_of
from exporters.vllm_config import (
    Sibling,
    config_of,
    generation_config_of,
    sibling_of,
    write_generation_config,
)
from exporters.vllm_schemes import (
    PRECISIONS,
    Precision,
    compress,
    layout_of,
    quantization_config,
    require_library,
)
from exporters.vllm_support import (
    CPU_HEAD_DIMS,
    GROUP_SIZES,
    Linear,
    choose_group,
    linears_of,
    refuse_unsupported,
    tensor_parallel_sizes,
)

if TYPE_CHECKING:
    import torch

    from cusprun.checkpoint.writer import CheckpointWriter, Declared

__all__ = ["Options", "check", "export", "locate", "quant_of"]

_SIDE_FILES_BYTES = 64_000_000  # tokenizer, template, configs: the largest vocabularies take about 40 MB


@dataclass(frozen=True)
class Options:
    """What can be chosen besides the precision.

    ``group_size`` is the largest number of weights that share a scale in int4 (128, 64 or 32; a smaller one
    is taken where rows are no multiple). ``tensor_parallel`` is the number of GPUs that the folder must
    divide over.
    """

    group_size: int = 128
    tensor_parallel: int = 1


@dataclass(frozen=True)
class _Job:
    """Everything known before the first byte is written."""

    index: CheckpointIndex
    quant: str
    options: Options
    sibling: Sibling | None
    group_size: int | None
    unfilled: tuple[Linear, ...]
    parallel_sizes: tuple[int, ...]
    generation_config: Mapping[str, Any] | None

    @property
    def precision(self) -> Precision:
        """How weights are stored."""
        return PRECISIONS[self.quant]

    @property
    def quantised(self) -> frozenset[str]:
        """Names of the weights that are quantised."""
        if not self.precision.preset:
            return frozenset()
        patterns = {linear.pattern for linear in linears_of(self.index)} - {
            linear.pattern for linear in self.unfilled
        }
        layers = range(self.index.shape.num_hidden_layers)
        return frozenset(pattern.replace("{layer}", str(layer)) for pattern in patterns for layer in layers)


def check(index: CheckpointIndex, quant: str, options: Options | None = None) -> tuple[str, ...]:
    """Say what a vLLM folder would lose or change, and what it divides over. Reads no weights.

    Raises:
        ExportError: the precision or an option is unknown, the tokenizer is missing, vLLM would refuse the
            model or compute something else, or it does not divide over ``tensor_parallel`` ranks.
        MissingDependencyError: compressed-tensors is missing and the precision needs it.
    """
    return _notes(_prepare(index, quant, options or Options()))


def export(
    folder: Path,
    out: Path,
    *,
    quant: str = "bfloat16",
    options: Options | None = None,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Write the model of a Hugging Face folder as a folder for vLLM and return its path.

    ``importance`` (float32 ``[in_features]``, the mean squared input of each linear layer by module name)
    chooses the scales of int4; without it every input feature counts alike. Memory: one tensor and a few
    copies of 32 MB of its rows. The result is opened by stock transformers, without weights, before it gets
    its name.

    Raises:
        ModelError: the folder is damaged or holds NaN or infinite weights.
        ExportError: see ``check``; or a weight does not fit the precision, or ``importance`` does not fit.
        MissingDependencyError: see ``check``.
        OutputError: ``out`` exists, or does not fit on the disk.
    """
    from cusprun.checkpoint.writer import CheckpointWriter

    refuse_existing(out)
    job = _prepare(open_checkpoint(folder), quant, options or Options())
    weights = _checked_importance(job, importance) if job.precision.grouped else {}
    plan = _plan(job)
    declared = [part for parts in plan.values() for part in parts]
    require_space(out, sum(part.num_bytes for part in declared) + _SIDE_FILES_BYTES)
    with atomic_folder(out) as partial:
        copy_carried_files(job.index.folder, partial)
        if job.generation_config is not None:
            write_generation_config(partial, job.generation_config)
        write_config(partial, config_of(job.index, job.sibling, job.precision.dtype, _quantization(job)))
        with (
            CheckpointWriter(partial, declared) as writer,
            progress.stage(f"exporting {quant}", len(plan), "tensor") as advance,
        ):
            for name, parts in plan.items():
                _write(job, writer, name, parts, weights)
                advance(1)
        _open_once(partial, job)
    return out


def _prepare(index: CheckpointIndex, quant: str, options: Options) -> _Job:
    require_known(quant, PRECISIONS, "vLLM precision", ExportError)
    precision = PRECISIONS[quant]
    _check_options(options)
    if precision.preset:
        require_library()
    refuse_unsupported(index, quant)
    sibling = sibling_of(index)
    if not tokenizer_hash(index.folder):
        raise ExportError(
            f"{index.folder} has no tokenizer, without which vLLM serves no text; "
            "copy tokenizer.json and tokenizer_config.json of the model into it"
        )
    sizes = tensor_parallel_sizes(index)
    if options.tensor_parallel not in sizes:
        raise ExportError(
            f"{index.folder} does not divide over {options.tensor_parallel} GPUs; tensor_parallel can be "
            f"{', '.join(map(str, sizes))}"
        )
    group_size: int | None = None
    unfilled: tuple[Linear, ...] = ()
    if precision.grouped:
        group_size, unfilled = choose_group(index, options.group_size, options.tensor_parallel)
        sizes = tensor_parallel_sizes(index, group_size, unfilled)
    return _Job(index, quant, options, sibling, group_size, unfilled, sizes, generation_config_of(index))


def _check_options(options: Options) -> None:
    for name in ("group_size", "tensor_parallel"):
        require_kind(getattr(options, name), int, name, ExportError)
    if options.group_size not in GROUP_SIZES:
        raise ExportError(
            f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, not {options.group_size}"
        )
    if options.tensor_parallel < 1:
        raise ExportError(f"tensor_parallel must be at least 1, not {options.tensor_parallel}")


def _notes(job: _Job) -> tuple[str, ...]:
    index, notes = job.index, []
    if job.sibling is not None:
        notes.append(
            f"the folder says {job.sibling.model_type!r}: {index.family.model_type!r} takes no "
            f"{index.shape.num_attention_heads} heads of {index.shape.head_dim} in stock code, and "
            f"{job.sibling.model_type!r} computes the same"
        )
    stored = {info.dtype for info in index.tensors.values()}
    if job.precision.preset:
        if stored - {"BF16"}:
            notes.append(
                "embeddings, norms, biases and head are rounded to the 8 significant bits of bfloat16"
            )
    elif job.quant != "float32" and stored - {{"float16": "F16", "bfloat16": "BF16"}[job.quant]}:
        notes.append(job.precision.loss)
    if job.quant == "float32":
        notes.append("vLLM computes in bfloat16 unless it is started with --dtype float32")
    if job.precision.preset and not job.group_size:
        notes.append(job.precision.loss)
    if job.group_size:
        notes.extend(_group_notes(job, job.group_size))
    if not _has_chat_template(index.folder):
        notes.append("the model has no chat template: vLLM completes text and refuses chats")
    if index.shape.head_dim not in CPU_HEAD_DIMS:
        notes.append(f"vLLM's attention on CPUs takes no heads of {index.shape.head_dim}; GPUs do")
    notes.append(f"sizes of tensor parallelism that divide it: {', '.join(map(str, job.parallel_sizes))}")
    return tuple(notes)


def _group_notes(job: _Job, group_size: int) -> list[str]:
    smaller = "" if group_size == job.options.group_size else ", since its rows are no multiple of more"
    notes = [f"weights of linear layers are rounded to 4 bits in groups of {group_size}{smaller}"]
    if job.unfilled:
        names = ", ".join(linear.name for linear in job.unfilled)
        notes.append(f"{names} stay bfloat16: their rows are no multiple of {group_size}")
    return notes


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8", errors="replace")


def _checked_importance(
    job: _Job, importance: Mapping[str, NDArray[np.float32]] | None
) -> dict[str, NDArray[np.float32]]:
    if importance is None:
        return {}
    for name in sorted(job.quantised):
        module, columns = name.removesuffix(".weight"), job.index.tensors[name].shape[1]
        vector = importance.get(module)
        if vector is None:
            raise ExportError(
                f"the importance has no entry for {module}; compute it on the folder to be exported"
            )
        if vector.shape != (columns,) or not np.isfinite(vector).all() or vector.min() < 0:
            raise ExportError(
                f"the importance of {module} must be {columns} finite numbers from zero up, not of shape "
                f"{vector.shape}; compute it on the folder to be exported"
            )
    return {f"{name}.weight": vector for name, vector in importance.items()}


def _quantization(job: _Job) -> dict[str, Any] | None:
    if not job.precision.preset:
        return None
    ignore = ("lm_head", *(linear.ignore for linear in job.unfilled))
    return quantization_config(job.precision, job.group_size, ignore)


def _plan(job: _Job) -> dict[str, list[Declared]]:
    """Return what each tensor of the checkpoint becomes, in the order of writing."""
    import torch

    from cusprun.checkpoint.writer import TORCH_NAMES, Declared

    plan, quantised = {}, job.quantised
    for name, info in job.index.tensors.items():
        if name in quantised:
            parts = layout_of(info.shape, job.precision, job.group_size)
            stem = name.removesuffix("weight")
            plan[name] = [
                Declared(stem + suffix, TORCH_NAMES[getattr(torch, kind)], shape)
                for suffix, (kind, shape) in parts.items()
            ]
        else:
            plan[name] = [Declared(name, TORCH_NAMES[getattr(torch, job.precision.dtype)], info.shape)]
    return plan


def _write(
    job: _Job,
    writer: CheckpointWriter,
    name: str,
    parts: list[Declared],
    importance: Mapping[str, NDArray[np.float32]],
) -> None:
    import torch

    from cusprun.checkpoint.reader import read_tensor

    tensor = read_tensor(job.index, name)
    if name not in job.quantised:
        writer.write(name, _cast(tensor, getattr(torch, job.precision.dtype), f"{job.index.folder}: {name}"))
        return
    vector = importance.get(name)
    weights = None if vector is None else torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32))
    made = compress(tensor, job.precision, job.group_size, weights)
    for part, data in zip(parts, made.values(), strict=True):
        writer.write(part.name, data)


def _cast(tensor: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    import torch

    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if result.numel() and not all(torch.isfinite(end) for end in torch.aminmax(result)):
        name = str(dtype).removeprefix("torch.")
        raise ExportError(
            f"{where} holds values beyond {torch.finfo(dtype).max:g}, which {name} cannot hold; use float32"
        )
    return result


def _open_once(folder: Path, job: _Job) -> None:
    """Open the config, tokenizer and weight names as stock transformers would, without reading weights."""
    import torch
    import transformers

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        transformers.AutoTokenizer.from_pretrained(folder, **options)
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        reason = reason_of(error)
        raise ExportError(f"stock transformers refuses the exported folder: {reason}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if job.index.shape.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    found = {name: info.shape for name, info in job.index.tensors.items()}
    if wanted != found:
        name = next(name for name in (*wanted, *found) if wanted.get(name) != found.get(name))
        raise ExportError(
            f"stock transformers wants {name} of shape {wanted.get(name)} where the folder has "
            f"{found.get(name)}; check the config of {job.index.folder}"
        )
