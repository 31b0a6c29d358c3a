"""A vLLM folder that exists: its precision, and where its weights leave those of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.checkpoint.index import open_checkpoint, read_config
from cusprun.checkpoint.safetensors_header import TensorInfo, read_header
from cusprun.errors import ExportError
from exporters.vllm_schemes import PRECISIONS, compress, decompress

if TYPE_CHECKING:
    import torch

_CONFIG_NAME, _ONNX_NAME = "config.json", "genai_config.json"
_SLACK = 2.0
"""How many times the error of a plain rounding a weight may differ by: scales chosen for the layer's output
leave a larger plain error, at most 1.2 times in the models measured."""


def quant_of(path: Path) -> str | None:
    """Return the precision of a Hugging Face folder with safetensors, None for anything else.

    Raises:
        ExportError: the folder is quantised in a way that no export makes, or its type has no limits.
        ModelError: its config cannot be read.
    """
    if not (path / _CONFIG_NAME).is_file() or (path / _ONNX_NAME).is_file() or not _files(path):
        return None
    config = read_config(path)
    quantization = config.get("quantization_config")
    if quantization:
        return _quant_of_scheme(path, quantization)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    if dtype not in PRECISIONS:
        raise ExportError(
            f"{path / _CONFIG_NAME} gives the dtype {dtype or 'nowhere'!r}, for which there are no limits "
            "(known: float32, float16, bfloat16); export the model again"
        )
    return dtype


def locate(folder: Path, artifact: Path, quant: str) -> str | None:
    """Name the first tensor, in graph order, whose error is more than its precision explains.

    A tensor's error is the Frobenius norm of the difference over that of the checkpoint's; what its
    precision explains is the error of rounding the checkpoint's tensor anew, times two. Returns None when
    there is no such tensor.

    Raises:
        ModelError: a side cannot be read.
    """
    import torch

    from cusprun.checkpoint.reader import read_tensor

    index = open_checkpoint(folder)
    parts = {name: info for file in _files(artifact) for name, info in read_header(file).items()}
    config = read_config(artifact).get("quantization_config")
    last = (index.family.final_norm_name(), "lm_head.weight")
    for name in sorted(index.tensors, key=lambda name: name in last and last.index(name) + 1):
        wanted = read_tensor(index, name, torch.float32)
        state = dict(_parts_of(parts, name))
        if not state:
            return f"the artifact has no tensor {name}; export it again"
        found, explained = _both(wanted, state, quant, config)
        if found.shape != wanted.shape:
            return f"{name} has the shape {tuple(found.shape)} where the checkpoint has {tuple(wanted.shape)}"
        error = _relative_error(found, wanted)
        if not error <= _SLACK * explained + 1e-7:
            return (
                f"the first tensor that differs is {name}: its relative error is {error:.3g} "
                f"where {quant} explains {explained:.3g}"
            )
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) if folder.is_dir() else []


def _quant_of_scheme(path: Path, quantization: Mapping[str, Any]) -> str:
    try:
        layout = quantization["format"]
        bits = {group["weights"]["num_bits"] for group in quantization["config_groups"].values()}
    except (KeyError, TypeError, AttributeError):
        layout, bits = str(quantization.get("quant_method")), set()
    for name, precision in PRECISIONS.items():
        if precision.layout == layout and bits == {precision.bits}:
            return name
    raise ExportError(
        f"{path / _CONFIG_NAME} is quantised as {layout!r}, for which there are no limits "
        "(known: fp8, int8 and int4 of compressed-tensors); export the model again"
    )


def _parts_of(parts: Mapping[str, TensorInfo], name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parts that stand for one tensor, by suffix; ``weight`` alone when it is not quantised."""
    from safetensors import safe_open

    stem, _, suffix = name.rpartition(".")
    for part in (suffix, f"{suffix}_packed", f"{suffix}_scale", f"{suffix}_shape"):
        info = parts.get(f"{stem}.{part}")
        if info is not None:
            with safe_open(info.file, framework="pt") as stream:
                yield part, stream.get_tensor(info.name)


def _both(
    wanted: torch.Tensor, state: Mapping[str, torch.Tensor], quant: str, config: Mapping[str, Any] | None
) -> tuple[torch.Tensor, float]:
    """Return the artifact's tensor in float32, and the relative error that a fresh rounding makes."""
    if "weight_scale" not in state or config is None:
        (stored,) = list(state.values())[:1]
        return stored.float(), _relative_error(wanted.to(stored.dtype).float(), wanted)
    from compressed_tensors.quantization import QuantizationScheme

    precision = PRECISIONS[quant]
    scheme = QuantizationScheme.model_validate(next(iter(config["config_groups"].values())))
    group_size = scheme.weights.group_size if precision.grouped else None
    fresh = compress(wanted, precision, group_size)
    found = decompress(state, precision.layout, scheme)
    return found, _relative_error(decompress(fresh, precision.layout, scheme), wanted)


def _relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    norm = float(wanted.norm())
    difference = float((found - wanted).norm())
    return difference / norm if norm else difference
