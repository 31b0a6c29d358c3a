"""What an artifact reads and computes for a token, from its headers alone; the roofline of a benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.errors import CusprunError
from serve.bench.roofline import Work

_F16_BYTES = 2  # llama.cpp's cache; those of vLLM and transformers have the type of the weights
_F32_BYTES = 4
_ONNX_FLOAT = 1
_PRODUCTS = ("MatMul", "MatMulNBits", "Gemm")
_ROTARY = ("cos_cache", "sin_cache")  # a token reads one row
_WEIGHT_FILES = "*.safetensors"


@dataclass(frozen=True)
class _Widths:
    """The widths that the operations of a token follow from, with a gated FFN of three matrices."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    def work(self, weight_bytes: int, cache_item_bytes: int) -> Work:
        """Return the work of a token; two operations for each weight, four for each attended feature."""
        attended = self.num_heads * self.head_dim
        cached = self.num_key_value_heads * self.head_dim
        block = self.hidden_size * (2 * attended + 2 * cached + 3 * self.intermediate_size)
        return Work(
            weight_bytes=weight_bytes,
            cache_bytes_per_position=2 * self.num_layers * cached * cache_item_bytes,
            block_flops=2.0 * self.num_layers * block,
            head_flops=2.0 * self.hidden_size * self.vocab_size,
            attention_flops_per_position=4.0 * self.num_layers * attended,
        )


def work_of(runtime: str, artifact: Path) -> Work | None:
    """Return what a token costs in ``artifact``; None where its headers do not tell.

    Weights that a token reads are all but an embedding that is not also the output head. Attention is counted
    as if no layer had a window.
    """
    try:
        return _READERS[runtime](artifact)
    except (CusprunError, OSError, KeyError, TypeError, ValueError, ImportError):
        return None


def _gguf_work(path: Path) -> Work:
    from cusprun.checkpoint.gguf_header import read_gguf

    file = read_gguf(path)
    prefix = file.text("general.architecture")
    embedding = file.tensors["token_embd.weight"]
    heads = file.integer(f"{prefix}.attention.head_count")
    hidden = file.integer(f"{prefix}.embedding_length")
    widths = _Widths(
        num_layers=file.integer(f"{prefix}.block_count"),
        hidden_size=hidden,
        intermediate_size=file.integer(f"{prefix}.feed_forward_length"),
        num_heads=heads,
        num_key_value_heads=file.integer(f"{prefix}.attention.head_count_kv", heads),
        head_dim=file.integer(f"{prefix}.attention.key_length", hidden // heads),
        vocab_size=embedding.shape[0],
    )
    total = sum(tensor.num_bytes for tensor in file.tensors.values())
    is_tied = "output.weight" not in file.tensors
    return widths.work(total if is_tied else total - embedding.num_bytes, _F16_BYTES)


def _config_widths(config: Mapping[str, Any]) -> _Widths:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    return _Widths(
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocab_size=int(config["vocab_size"]),
    )


def _folder_bytes(folder: Path) -> int:
    """Return the bytes of the weights that a token reads."""
    from cusprun.checkpoint.safetensors_header import read_header

    tensors = {
        name: info for file in sorted(folder.glob(_WEIGHT_FILES)) for name, info in read_header(file).items()
    }
    total = sum(info.num_bytes for info in tensors.values())
    has_head = any(name.startswith("lm_head.") for name in tensors)
    embedding = tensors["model.embed_tokens.weight"].num_bytes
    return total - embedding if has_head else total


def _dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype"))


def _vllm_work(folder: Path) -> Work:
    config = _read_json(folder / "config.json")
    cache_item = _F32_BYTES if _dtype(config) == "float32" else _F16_BYTES
    return _config_widths(config).work(_folder_bytes(folder), cache_item)


def _torch_work(folder: Path) -> Work:
    """Return the work of a folder in transformers, which holds float16 as float32 on a CPU."""
    config = _read_json(folder / "config.json")
    weight_bytes = _folder_bytes(folder) * (2 if _dtype(config) == "float16" else 1)
    cache_item = _F16_BYTES if _dtype(config) == "bfloat16" else _F32_BYTES
    return _config_widths(config).work(weight_bytes, cache_item)


def _onnx_work(folder: Path) -> Work:
    """Return the work of a graph: what its products read, and their operations."""
    import onnx

    model = _read_json(folder / "genai_config.json")["model"]
    decoder, vocab_size = model["decoder"], int(model["vocab_size"])
    graph = onnx.load(str(folder / decoder["filename"]), load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    looked_up = {node.input[0] for node in graph.node if node.op_type.startswith("Gather")}
    products_of = {name for node in graph.node if node.op_type in _PRODUCTS for name in node.input}
    looked_up |= {name for name in stored if name.endswith(_ROTARY)}
    read = [tensor for name, tensor in stored.items() if name not in looked_up or name in products_of]
    products = [size for node in graph.node if (size := _product_size(node, stored)) is not None]
    attended = int(decoder["num_attention_heads"]) * int(decoder["head_size"])
    cached = int(decoder["num_key_value_heads"]) * int(decoder["head_size"])
    layers = int(decoder["num_hidden_layers"])
    kinds = {value.type.tensor_type.elem_type for value in graph.input if value.name.startswith("past_key")}
    return Work(
        weight_bytes=sum(_onnx_bytes(tensor) for tensor in read),
        cache_bytes_per_position=2 * layers * cached * (_F32_BYTES if _ONNX_FLOAT in kinds else _F16_BYTES),
        block_flops=2.0 * sum(rows * columns for rows, columns in products if columns != vocab_size),
        head_flops=2.0 * sum(rows * columns for rows, columns in products if columns == vocab_size),
        attention_flops_per_position=4.0 * layers * attended,
    )


def _product_size(node: Any, stored: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the input and output features of a node that multiplies by stored weights."""
    sizes = {attribute.name: attribute.i for attribute in node.attribute if attribute.name in ("K", "N")}
    if len(sizes) == 2:  # MatMulNBits
        return sizes["K"], sizes["N"]
    if node.op_type in ("MatMul", "Gemm") and node.input[1] in stored:
        rows, columns = stored[node.input[1]].dims
        return int(rows), int(columns)
    return None


def _onnx_bytes(tensor: Any) -> int:
    import onnx

    item = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    return item * math.prod(map(int, tensor.dims))


def _read_json(path: Path) -> dict[str, Any]:
    plain = json.loads(path.read_text(encoding="utf-8"))
    return plain if isinstance(plain, dict) else {}


_READERS: Mapping[str, Callable[[Path], Work]] = {
    "llamacpp": _gguf_work,
    "onnx": _onnx_work,
    "torch": _torch_work,
    "vllm": _vllm_work,
}
