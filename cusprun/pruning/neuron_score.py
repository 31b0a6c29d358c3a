"""Scoring single neurons: one dense forward pass with an observer at each attention function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.output import refuse_existing
from cusprun.families import Modules
from cusprun.progress import SILENT, Progress
from cusprun.pruning.impact import channel_norms, masked_channels
from cusprun.pruning.neuron_impact import query_and_key_impacts, value_and_output_impacts
from cusprun.pruning.neuron_parts import neuron_squares
from cusprun.pruning.score import block_tensors, observed_inputs
from cusprun.pruning.score_walk import Arrays, scored_layers, store_info
from cusprun.records import Corpora
from cusprun.walk.batches import Batch
from cusprun.walk.device import CPU, Device
from cusprun.walk.fallback import Batching, with_smaller_batches
from cusprun.walk.shell import DecoderShell
from cusprun.walk.stream import Stream
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

_ATTENTION = "cusprun_observed"
_SEEN = "cusprun_seen"


def score_neurons(
    index: CheckpointIndex,
    corpora: Corpora,
    out: Path,
    *,
    model_hash: str,
    corpus_hash: str,
    expert_name: str = "",
    exact: bool = False,
    device: Device = CPU,
    workspace: Workspace = DEFAULT_WORKSPACE,
    progress: Progress = SILENT,
) -> Path:
    """Score every neuron on the calibration documents and write an impact store of granularity ``neuron``.

    Rows of Q and K are estimated on long documents unless ``exact``. On SmolLM2-135M the pass takes 1.35 to
    1.4 times the plain one; exactly, 1.8 times with documents of 256 tokens and 2.4 times with 512.

    Raises:
        CorpusError: there are no calibration documents.
        DeviceError: the device has too little memory, in smaller batches too.
        ModelError: weights cannot be read or are not finite.
        OutputError: ``out`` exists already or cannot be written.
    """
    info = store_info(
        index,
        corpora,
        model_hash=model_hash,
        corpus_hash=corpus_hash,
        expert_name=expert_name,
        device=device,
        granularity="neuron",
    )
    refuse_existing(out)

    def work(batching: Batching) -> None:
        with scored_layers(
            index,
            corpora,
            info,
            partial(_score_block, exact),
            exact,
            device=device,
            batching=batching,
            workspace=workspace,
            progress=progress,
        ) as scored:
            scored.write(out)

    with_smaller_batches(device, work)
    return out


def _score_block(
    exact: bool,
    shell: DecoderShell,
    layer: int,
    batches: Sequence[Batch],
    hidden: Stream,
    arrays: Arrays,
) -> Iterator[int]:
    """Score the neurons of one block; see ``score_walk.ScoreBlock``."""
    index, shape = shell.index, shell.index.shape
    modules = index.family.modules
    put, fetch = shell.device.put, shell.device.fetch
    block = shell.load_block(layer)
    attention_weight = block.get_parameter(f"{modules.attention_output}.weight").float()
    mlp_weight = block.get_parameter(f"{modules.mlp_output}.weight").float()
    column_norms = torch.linalg.vector_norm(mlp_weight, dim=0)
    for kind, squares in neuron_squares(block_tensors(index, layer, block), shape).items():
        arrays[f"{kind}.weight_squares"] = fetch(squares)
    with (
        shell.holding(layer, block),
        observed_inputs(block, modules) as inputs,
        observed_attention(block, modules) as seen,
    ):
        for position, batch in enumerate(batches):
            hidden.write(position, shell.run(hidden.read(position)))
            at = list(batch.documents)
            with torch.inference_mode():
                mask = put(batch.mask)
                queries, keys = query_and_key_impacts(
                    seen.query,
                    seen.key,
                    seen.mask,
                    batch.mask.sum(dim=1),
                    seen.scaling,
                    seen.rotary_dim,
                    exact,
                )
                arrays["query_row"][at], arrays["key_row"][at] = fetch(queries), fetch(keys)
                channels = masked_channels(inputs[modules.attention_output], mask)
                values, outputs = value_and_output_impacts(
                    channels, attention_weight, shape.head_dim, shape.queries_per_group
                )
                arrays["value_row"][at], arrays["output_column"][at] = fetch(values), fetch(outputs)
                channels = masked_channels(inputs[modules.mlp_output], mask)
                arrays["ffn_channel"][at] = fetch(channel_norms(channels) * column_norms)
            yield seen.rotary_dim


@dataclass
class SeenAttention:
    """What a block's attention function was called with, after each run.

    ``query`` [documents, heads, tokens, head_dim] and ``key`` [documents, groups, tokens, head_dim] are after
    rotary embedding and norm; ``rotary_dim`` leading channels of a head are rotated.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    rotary_dim: int


@contextmanager
def observed_attention(block: nn.Module, modules: Modules) -> Iterator[SeenAttention]:
    """Let a block's attention leave what it was called with; its result is the stock function's.

    The block's own config is changed, so ``block`` must not share it (those of :class:`DecoderShell` do not).
    """
    attention: Any = block.get_submodule(modules.attention)
    seen = SeenAttention(torch.empty(0), torch.empty(0), None, 1.0, 0)

    def keep_rotary_dim(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.rotary_dim = int(kwargs["position_embeddings"][0].shape[-1])

    _register()
    stock = attention.config._attn_implementation
    setattr(attention, _SEEN, seen)
    attention.config._attn_implementation = _ATTENTION
    handle = attention.register_forward_pre_hook(keep_rotary_dim, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
        attention.config._attn_implementation = stock
        delattr(attention, _SEEN)


def _register() -> None:
    """Make the observing function known to transformers; the same one however often."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _observing_attention)


def _observing_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> Any:
    """Keep what the attention is computed from, and compute it by the stock function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: SeenAttention = getattr(module, _SEEN)
    scaling = options.get("scaling")
    seen.query, seen.key, seen.mask = query, key, attention_mask
    seen.scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
