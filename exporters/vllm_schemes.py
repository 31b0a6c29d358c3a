"""The precisions of a vLLM folder as data, and weights quantised by the compressed-tensors library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cusprun.errors import ExportError, MissingDependencyError

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

_CHUNK_ELEMENTS = (
    1 << 23
)  # rows are quantised 32 MB of float32 at a time; the search needs about 6 times that


@dataclass(frozen=True)
class Precision:
    """How the weights of one ``quant`` are stored.

    ``dtype`` is that of all weights, or of those that stay when the others are quantised; ``preset`` is the
    library's name of the scheme and ``layout`` that of the files.
    """

    dtype: str
    preset: str = ""
    layout: str = ""
    bits: int = 0
    loss: str = ""

    @property
    def grouped(self) -> bool:
        """Whether a scale covers a group of a row's weights instead of the row."""
        return self.layout == "pack-quantized"


PRECISIONS: Mapping[str, Precision] = {
    "float32": Precision("float32"),
    "float16": Precision("float16", loss="weights smaller than 6e-8 become zero in float16"),
    "bfloat16": Precision("bfloat16", loss="weights are rounded to the 8 significant bits of bfloat16"),
    "fp8": Precision(
        "bfloat16",
        "FP8_DYNAMIC",
        "float-quantized",
        8,
        "weights of linear layers are rounded to float8 (4 significant bits) with a scale per output row, "
        "and so are their inputs as they come, with a scale per token",
    ),
    "int8": Precision(
        "bfloat16",
        "W8A8",
        "int-quantized",
        8,
        "weights of linear layers are rounded to 8 bits with a scale per output row, and so are their inputs "
        "as they come, with a scale per token",
    ),
    "int4": Precision("bfloat16", "W4A16", "pack-quantized", 4),
}
"""Every precision by name. Quantised models keep embeddings, norms, biases and head in bfloat16: float16
cannot hold the smallest scales."""


def require_library() -> None:
    """Raise ``MissingDependencyError`` when the library that lays out quantised weights is not installed."""
    if find_spec("compressed_tensors") is None:
        raise MissingDependencyError(
            "compressed-tensors is not installed, which writes quantised weights; "
            "run: pip install 'cusprun[vllm]'"
        )


@cache
def scheme_of(preset: str, group_size: int | None) -> QuantizationScheme:
    """Return the library's scheme for linear layers; ``group_size`` is for grouped precisions only."""
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(preset, ["Linear"])
    if group_size is not None:
        scheme.weights.group_size = group_size
    return scheme


def quantization_config(
    precision: Precision, group_size: int | None, ignore: tuple[str, ...]
) -> dict[str, Any]:
    """Return ``quantization_config`` of ``config.json``; ``ignore`` are modules or ``re:`` patterns."""
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig(
        config_groups={"group_0": scheme_of(precision.preset, group_size)},
        format=precision.layout,
        quantization_status="compressed",
        ignore=list(ignore),
    )
    plain: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return plain


def layout_of(
    shape: tuple[int, ...], precision: Precision, group_size: int | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the parts that a quantised weight becomes: suffix to torch type name and shape."""
    import torch

    rows, columns = shape
    groups = columns // group_size if group_size else 1
    state = {
        "weight": torch.empty(shape, device="meta"),
        "weight_scale": torch.empty((rows, groups), dtype=getattr(torch, precision.dtype), device="meta"),
    }
    parts = _compressor(precision.layout).compress(state, scheme_of(precision.preset, group_size))
    return {name: (str(part.dtype).removeprefix("torch."), tuple(part.shape)) for name, part in parts.items()}


def compress(
    weight: torch.Tensor,
    precision: Precision,
    group_size: int | None,
    importance: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Quantise one weight ``[out, in]`` and return its parts, in the order of ``layout_of``."""
    import torch

    chunks = [_compress_rows(rows.float(), precision, group_size, importance) for rows in _row_chunks(weight)]
    parts = {
        name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0] if name != "weight_shape"
    }
    if "weight_shape" in chunks[0]:
        parts["weight_shape"] = torch.tensor(weight.shape)
    return {name: parts[name] for name in layout_of(tuple(weight.shape), precision, group_size)}


def decompress(parts: Mapping[str, torch.Tensor], layout: str, scheme: QuantizationScheme) -> torch.Tensor:
    """Return the float32 weight that quantised parts stand for, computed by the library."""
    state = {name: part.float() if name == "weight_scale" else part for name, part in parts.items()}
    weight: torch.Tensor = _compressor(layout).decompress(state, scheme)["weight"]
    return weight


def _compress_rows(
    weight: torch.Tensor, precision: Precision, group_size: int | None, importance: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    import torch
    from compressed_tensors.quantization.utils import calculate_qparams

    from exporters.vllm_scales import search_scales

    scheme = scheme_of(precision.preset, group_size)
    dtype = getattr(torch, precision.dtype)
    if group_size:
        scale = search_scales(weight, group_size, importance, dtype)
    else:
        low, high = torch.aminmax(weight, dim=1, keepdim=True)
        scale = calculate_qparams(low, high, scheme.weights)[0].to(dtype)
    # With the scale as it is stored, or the integers would be those of another one.
    parts: dict[str, torch.Tensor] = _compressor(precision.layout).compress(
        {"weight": weight, "weight_scale": scale.float()}, scheme
    )
    return {**parts, "weight_scale": scale}


def _row_chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        yield weight[start : start + rows]


def _compressor(layout: str) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    try:
        return BaseCompressor.get_value_from_registry(layout)
    except KeyError:
        raise ExportError(f"compressed-tensors knows no layout {layout!r}; export the model again") from None
