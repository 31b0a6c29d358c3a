"""How much each input feature of each matrix is used: what a quantiser weighs its rounding errors by."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.reader import read_tensors
from cusprun.checkpoint.writer import write_tensors
from cusprun.errors import CorpusError, ModelError
from cusprun.progress import SILENT, Progress
from cusprun.records import TokenizedDocument
from cusprun.walk.batches import Batch, make_batches
from cusprun.walk.budget import batching_within, walking
from cusprun.walk.device import CPU, Device
from cusprun.walk.fallback import Batching, with_smaller_batches
from cusprun.walk.ranks import ALONE
from cusprun.walk.shell import DecoderShell
from cusprun.walk.stream import Stream
from cusprun.walk.work_folder import walk_key, working
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

log = logging.getLogger(__name__)

HEAD = "lm_head"
"""The key of the head's input, whether or not the head has a matrix of its own."""

_Means = dict[str, NDArray[np.float32]]


def importance_of(
    index: CheckpointIndex,
    documents: Sequence[Sequence[int]],
    progress: Progress = SILENT,
    *,
    key: str | None = None,
    device: Device = CPU,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> _Means:
    """Return, for every linear layer, the mean over tokens of each input feature squared.

    The error of a matrix product whose weight ``w[i, j]`` is off by ``d[i, j]`` is, in the mean over tokens
    and without the correlation of the inputs, the sum of ``d[i, j]^2 * mean(x[j]^2)``: the diagonal of the
    Hessian of arXiv 1712.01048 and what llama.cpp calls an importance matrix.

    Args:
        index: the model that will be quantised.
        documents: token ids of the calibration documents; those without tokens are passed over.
        progress: told about each batch in each block.
        key: stands for the weights of the model; with it, what an earlier run has finished is found.
        device: where the blocks run.
        workspace: where hidden states lie, and how much memory the blocks may take.

    Returns:
        float32 ``[in_features]`` by module name (``model.layers.3.mlp.down_proj``), and ``lm_head`` for the
        hidden states after the last norm. Fused projections have one entry, as in the checkpoint.

    Raises:
        CorpusError: there are no tokens.
        DeviceError: the device has too little memory, in smaller batches too.
        ModelError: weights cannot be read, a token is not in the vocabulary, or the model computes values
            that are not finite.
        UserError: the memory of ``workspace`` is too little.
    """
    texts = [TokenizedDocument("", str(i), tuple(ids)) for i, ids in enumerate(documents) if len(ids)]
    if not texts:
        raise CorpusError("there are no calibration documents to find the important weights with")
    demand = walking(index, [len(text.token_ids) for text in texts], "finding important weights")
    return with_smaller_batches(
        device,
        lambda batching: _measure(index, texts, progress, key, device, workspace, batching),
        batching_within(workspace.memory_bytes, demand),
    )


def _measure(
    index: CheckpointIndex,
    texts: Sequence[TokenizedDocument],
    progress: Progress,
    key: str | None,
    device: Device,
    workspace: Workspace,
    batching: Batching,
) -> _Means:
    batches = make_batches(texts, batching.tokens)
    total, width = index.shape.num_hidden_layers, index.shape.hidden_size
    whole = None if key is None else walk_key(key, texts, batching.tokens, device, ALONE)
    with working(replace(workspace, ranks=ALONE), "importance", whole) as work, device.exact():
        hidden = work.stream("hidden", batches, width, device)
        done = work.settle()
        if done:
            log.info("finding important weights goes on after layer %d of %d", done, total)
        name, steps = f"finding important weights{batching.note}", (total - done) * len(batches)
        with progress.stage(name, steps, "batch") as advance:
            shell = DecoderShell(index, device.in_float32)
            if not done:
                shell.embed_into(hidden.next, batches)
                hidden.turn()
            for layer in range(done, total):
                sums = _Sums(device)
                for _ in _run_block(shell, layer, batches, hidden, sums):
                    advance(1)
                hidden.turn()
                with work.adding(_name(layer)) as path:
                    write_tensors(path, _means_of(sums, index, f"block {layer}"))
                work.commit()
        found: dict[str, torch.Tensor] = {}
        for layer in range(total):
            found |= read_tensors(work.path(_name(layer)))
        found |= _means_of(_head_sums(shell, batches, hidden), index, "the last norm")
    return {name: mean.numpy() for name, mean in found.items()}


def _name(layer: int) -> str:
    return f"block-{layer:05d}.safetensors"


class _Sums:
    """Sums of squares in float64, by module name; ``mask`` is that of the batch that is running."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.squares: dict[str, torch.Tensor] = {}
        self.num_tokens = 0
        self.mask = torch.zeros(0, 0, dtype=torch.bool)
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def start(self, batch: Batch) -> None:
        """Take the next batch."""
        self.mask = self._device.put(batch.mask)
        self.num_tokens += batch.num_tokens
        self._last = None

    def add(self, name: str, values: torch.Tensor) -> None:
        """Add the inputs [documents, tokens, features] of one module; padded tokens count for nothing."""
        if self._last is None or self._last[0] is not values:  # q, k and v read the same, as do gate and up
            self._last = values, values[self.mask].double().square().sum(dim=0)
        increment = self._last[1]
        self.squares[name] = self.squares[name] + increment if name in self.squares else increment

    def mean(self, name: str) -> torch.Tensor:
        """Return one mean over tokens, on the host: float32 [features]."""
        return self._device.fetch((self.squares[name] / self.num_tokens).float())


def _run_block(
    shell: DecoderShell, layer: int, batches: Sequence[Batch], hidden: Stream, sums: _Sums
) -> Iterator[None]:
    """Run one block over all batches, adding up its inputs and moving the hidden states on."""
    block = shell.load_block(layer)
    with shell.holding(layer, block), _observed(block, shell.index.family.layer_prefix(layer), sums):
        for position, batch in enumerate(batches):
            sums.start(batch)
            hidden.write(position, shell.run(hidden.read(position)))
            yield


@contextmanager
def _observed(block: nn.Module, prefix: str, sums: _Sums) -> Iterator[None]:
    """Add the input of every linear layer of a block to ``sums`` as long as the context lasts."""

    def observe(name: str, module: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            sums.add(name, args[0])

        return module.register_forward_pre_hook(hook)

    linears = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    handles = [observe(f"{prefix}{name}", module) for name, module in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _head_sums(shell: DecoderShell, batches: Sequence[Batch], hidden: Stream) -> _Sums:
    sums, norm = _Sums(shell.device), shell.load_norm()
    with torch.inference_mode():
        for position, batch in enumerate(batches):
            sums.start(batch)
            sums.add(HEAD, norm(hidden.read(position)))
    return sums


def _means_of(sums: _Sums, index: CheckpointIndex, where: str) -> dict[str, torch.Tensor]:
    means = {name: sums.mean(name) for name in sums.squares}
    if not all(bool(torch.isfinite(mean).all()) for mean in means.values()):
        raise ModelError(
            f"{index.folder}: the activations of {where} overflow float32 or are no numbers; "
            "start from a sound checkpoint"
        )
    return means
