"""A graph from a Hugging Face folder, through the model builder of onnxruntime-genai.

The builder's class for the family is subclassed where it is wrong, stores too much or holds too much in
memory; each method says why.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import ExportError, MissingDependencyError, reason_of
from cusprun.progress import Advance, Progress
from exporters.onnx_quantise import is_weight_product, quantise_graph
from exporters.onnx_rope import flat_settings, rotary_tables

INSTALL = "pip install 'cusprun[onnx]'"
MODEL_NAME = "model.onnx"
_OPSET = 23  # the first with RMSNormalization
_TORCH_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Builder:
    """Which class of the builder makes a family, and what onnxruntime-genai calls the family when it
    differs."""

    class_name: str
    genai_type: str = ""


BUILDERS: Mapping[str, Builder] = {
    "llama": Builder("LlamaModel"),
    "mistral": Builder("MistralModel"),
    "qwen2": Builder("QwenModel"),
    "qwen3": Builder("Qwen3Model"),
    "phi3": Builder("Phi3MiniModel"),
    "gemma3_text": Builder("Gemma3Model", "gemma3_text"),
}
"""By ``model_type``."""


@dataclass(frozen=True)
class Recipe:
    """What to build, all of it decided; ``algorithm`` in the builder's own names."""

    precision: str
    context_length: int
    block_size: int
    accuracy_level: int
    algorithm: str
    execution_provider: str


def require_builder() -> None:
    """Raise ``MissingDependencyError`` when a library that the export needs is not installed."""
    from importlib.util import find_spec

    for module, package in (
        ("onnx", "onnx"),
        ("onnx_ir", "onnx-ir"),
        ("onnxruntime", "onnxruntime"),
        ("onnxruntime_genai", "onnxruntime-genai"),
    ):
        if find_spec(module) is None:
            raise MissingDependencyError(f"{package} is not installed; run: {INSTALL}")


def build(index: CheckpointIndex, out: Path, recipe: Recipe, progress: Progress) -> None:
    """Write ``model.onnx``, its data and ``genai_config.json`` into ``out``.

    Memory: the weights as the folder stores them and one matrix in float32.

    Raises:
        ExportError: the builder fails; its last words are in the text.
    """
    said = io.StringIO()
    try:
        with _quiet(said):
            _build(index, out, recipe, progress)
    except (ExportError, OSError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever the builder raises, its own output says more
        reason = reason_of(error)
        last = said.getvalue().strip().splitlines()[-1:]
        hint = f" after {last[0]!r}" if last else ""
        raise ExportError(
            f"{index.folder}: the model builder of onnxruntime-genai failed with {reason!r}{hint}; "
            "try another algorithm or precision"
        ) from error


def _build(index: CheckpointIndex, out: Path, recipe: Recipe, progress: Progress) -> None:
    import torch

    modules = _import_builder()
    provider = _graph_provider(recipe)
    settings = modules.parse_extra_options(
        None, str(index.folder), str(out), recipe.precision, provider, str(out), _flags(recipe)
    )
    details = settings.pop("hf_details")
    settings.pop("_effective_builder_config")
    config = details["hf_config"]
    tables = rotary_tables(copy.deepcopy(config), index.shape.head_dim, recipe.context_length)
    _prepare_config(config, index.family.architecture, recipe.context_length)
    matrices = 0 if recipe.precision.startswith("fp") else index.shape.num_hidden_layers
    with (
        progress.stage(
            f"building {recipe.precision}", index.shape.num_hidden_layers + matrices, "layer"
        ) as advance,
        torch.no_grad(),
    ):
        kind = _graph_class(modules, index, recipe, iter(tables), advance)
        model = kind(
            config,
            modules.set_io_dtype(recipe.precision, provider, settings),
            modules.set_onnx_dtype(recipe.precision, settings),
            provider,
            str(out),
            settings,
        )
        model.make_model(str(index.folder))
        model.save_model(str(out))
    model.ep = recipe.execution_provider
    model.make_genai_config(config, details["extra_kwargs"], str(out))


def _import_builder() -> Any:
    """Import the builder, whose package puts its folder on ``sys.path`` for names like ``quantization``."""
    before = list(sys.path)
    try:
        from onnxruntime_genai.models import builder
    finally:
        sys.path[:] = before
    return builder


def _graph_provider(recipe: Recipe) -> str:
    """Return the provider whose graph is built.

    For fp16 on the CPU the builder makes ``MultiHeadAttention``, which knows no sliding window; the graph for
    CUDA has ``GroupQueryAttention``, which the CPU runs in float16 too.
    """
    is_half_on_cpu = recipe.execution_provider == "cpu" and recipe.precision == "fp16"
    return "cuda" if is_half_on_cpu else recipe.execution_provider


def _flags(recipe: Recipe) -> list[str]:
    flags = [
        "hf_token=false",
        # a cache of window size cannot be empty, so plain onnxruntime could not start with it
        "windowed_kv_cache=false",
        f"block_size={recipe.block_size}",
        f"accuracy_level={recipe.accuracy_level}",
        f"algo_config={recipe.algorithm}",
    ]
    if recipe.execution_provider == "cpu":
        flags.append("fuse_qk_norm_gqa=false")  # the CPU has no kernel for the fused form
    return flags


def _prepare_config(config: Any, architecture: str, context_length: int) -> None:
    """Say in the config object what the builder reads from it, and reads elsewhere or not at all
    otherwise."""
    config.architectures = [architecture]  # the folder may name none, or a class of its own
    sliding = None if "rope_type" in config.rope_parameters else config.rope_parameters["sliding_attention"]
    config.rope_parameters = flat_settings(config)
    if sliding is not None:
        config.rope_local_base_freq = sliding["rope_theta"]
    config.max_position_embeddings = context_length
    config.original_max_position_embeddings = context_length  # differing lengths mean longrope in phi3
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        # mistral and phi3: without kinds the builder takes every block to see everything
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers


def _graph_class(
    modules: Any, index: CheckpointIndex, recipe: Recipe, tables: Iterator[Any], advance: Advance
) -> Any:
    chosen = BUILDERS[index.family.model_type]
    base: Any = getattr(modules, chosen.class_name)
    is_cpu = recipe.execution_provider == "cpu"
    load = _loader(index)

    class Graph(base):  # type: ignore[misc]
        """The family's class with what it lacks."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            if chosen.genai_type:
                self.model_type = chosen.genai_type
            if self.embed_attrs["scale"] != 1:
                # the builder rounds sqrt(hidden_size) to two digits, which costs 0.01 in a logit
                self.embed_attrs["scale"] = math.sqrt(index.shape.hidden_size)
            if is_cpu:
                self.graph.opset_imports[""] = _OPSET

        def load_weights(self, _input_path: str) -> Any:
            return load()

        def has_lm_head(self, module: Any) -> bool:
            """The builder takes any linear as wide as the vocabulary for the head."""
            return module is self.weights.lm_head

        def make_layer(self, layer_id: int, layer: Any) -> None:
            super().make_layer(layer_id, layer)
            advance(1)

        def make_rotary_embedding_caches_from_scratch(self) -> Any:
            return next(tables)

        def make_node(
            self, op_type: str, inputs: Any, outputs: Any, *, name: str, domain: str | None = "", **more: Any
        ) -> None:
            """``SimplifiedLayerNormalization`` stands in no standard, so onnx.checker refuses it."""
            if is_cpu and op_type == "SimplifiedLayerNormalization":
                op_type = "RMSNormalization"
            super().make_node(op_type, inputs, outputs, name=name, domain=domain, **more)

        def make_tied_embeddings_init(self, config: Any) -> None:
            """The builder stores a tied int8 embedding a second time, in float32."""
            super().make_tied_embeddings_init(config)
            if recipe.precision == "int8" and index.shape.tie_word_embeddings:
                self.tied_quantized_embeddings, self.tied_unquantized_embeddings = True, False

        def make_tied_quantized_embedding_input_names(self) -> tuple[int, str, str, str]:
            """The builder guesses the names of another algorithm for ``default`` in 8 bits."""
            if self.quantization_algo != "default":
                names: tuple[int, str, str, str] = super().make_tied_quantized_embedding_input_names()
                return names
            bits = self.quant_attrs["bits"]
            return bits, f"lm_head.MatMul.weight_Q{bits}", "lm_head.MatMul.weight_scales", ""

        def to_nbits(self) -> Any:
            """The builder's own holds the model three times over in float32."""
            count = sum(map(is_weight_product, self.model.graph))
            return quantise_graph(self, _spread(advance, count, index.shape.num_hidden_layers))

    return Graph


def _spread(advance: Advance, count: int, units: int) -> Advance:
    """Return a function that is called ``count`` times and advances ``units`` in all."""
    done = 0

    def step(number: int) -> None:
        nonlocal done
        before, done = done * units // count, done + number
        advance(done * units // count - before)

    return step


def _loader(index: CheckpointIndex) -> Callable[[], Any]:
    """Return a function that loads the model in the type that its weights are stored in."""

    def load() -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        stored = {info.dtype for info in index.tensors.values()}
        name = _TORCH_TYPES.get(next(iter(stored)), "float32") if len(stored) == 1 else "float32"
        model = AutoModelForCausalLM.from_pretrained(
            index.folder,
            dtype=getattr(torch, name),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # Gemma adds one to the weights of norms: in bfloat16 that sum has 8 significant bits
                parameter.data = parameter.data.float()
        return model

    return load


@contextmanager
def _quiet(said: io.StringIO) -> Iterator[None]:
    """Catch what is printed or logged; the builder, transformers and the quantiser all talk."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            yield
    finally:
        logging.disable(disabled)
