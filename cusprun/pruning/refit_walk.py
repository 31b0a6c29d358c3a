"""The stream of the pruned model over the calibration documents, refit block by block.

A block is run in three pieces, by putting stand-ins in the place of its modules: attention up to its output
projection, to fit that; the FFN up to its last projection, to fit that; and the sums of both outputs. So each
block is fitted on the inputs that the cut and refit blocks before it give, and no product is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.reader import read_tensor
from cusprun.families import axis_length
from cusprun.pruning.refit import add_to_gram, mirror, refit
from cusprun.pruning.slicing import kept_positions
from cusprun.records import LayerPlan, LayerRefit, Shape, TokenizedDocument
from cusprun.walk.batches import Batch, make_batches
from cusprun.walk.shell import DecoderShell
from cusprun.walk.spill import Spill, spilled


class _Tap(nn.Module):
    """Stands in for a last projection: keeps the channels it is given, returns zeros of the hidden size."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self._hidden_size = hidden_size
        self.channels = torch.empty(0)

    def forward(self, channels: torch.Tensor) -> torch.Tensor:
        """Keep ``channels`` [documents, tokens, n]; return zeros [documents, tokens, hidden_size]."""
        self.channels = channels
        return channels.new_zeros(*channels.shape[:-1], self._hidden_size)


class _Replay(nn.Module):
    """Stands in for a sublayer and gives an output computed elsewhere, zeros when none is set."""

    def __init__(self, *, returns_tuple: bool) -> None:
        super().__init__()
        self.output: torch.Tensor | None = None
        self._returns_tuple = returns_tuple

    def forward(self, hidden_states: torch.Tensor, *_args: object, **_kwargs: object) -> object:
        """Return the output; attention modules return a pair, whose weights are not used."""
        output = torch.zeros_like(hidden_states) if self.output is None else self.output
        return (output, None) if self._returns_tuple else output


@dataclass(frozen=True)
class _Sublayer:
    """One half of a block: its last projection, the axis that is cut, and the spill of its kept channels."""

    projection: str
    axis: str
    kept: Spill


@dataclass(frozen=True)
class BlockRefit:
    """New weights by tensor name, in the checkpoint's type, and one report for each fitted projection."""

    weights: dict[str, torch.Tensor]
    reports: tuple[LayerRefit, ...]


class RefitWalk:
    """Moves the calibration documents through a model that is being cut; made by :func:`refit_walk`."""

    def __init__(
        self,
        shell: DecoderShell,
        batches: Sequence[Batch],
        hidden: Spill,
        attended: Spill,
        kept: tuple[Spill, Spill],
    ) -> None:
        modules = shell.index.family.modules
        self._shell, self._batches = shell, batches
        self._hidden, self._attended = hidden, attended
        self._attention = _Sublayer(modules.attention_output, "heads", kept[0])
        self._ffn = _Sublayer(modules.mlp_output, "ffn", kept[1])

    def refit_block(self, layer: int, plan: LayerPlan) -> BlockRefit:
        """Fit one block of the model and move the stream past it."""
        modules = self._shell.index.family.modules
        block = self._shell.load_block(layer)
        attention, mlp = _Replay(returns_tuple=True), _Replay(returns_tuple=False)
        result = BlockRefit({}, ())
        with self._shell.holding(layer, block):
            with _replaced(block, {modules.mlp: mlp}):
                project, result = self._fit(layer, block, self._attention, plan, result)
            for position in range(len(self._batches)):
                self._attended.write(position, project(position))
            with _replaced(block, {modules.attention: attention}):
                project, result = self._fit(layer, block, self._ffn, plan, result, attention)
            with _replaced(block, {modules.attention: attention, modules.mlp: mlp}):
                for position in range(len(self._batches)):
                    attention.output = self._attended.read(position)
                    mlp.output = project(position)
                    self._hidden.write(position, self._shell.run(self._hidden.read(position)))
        return result

    def _fit(
        self,
        layer: int,
        block: nn.Module,
        sublayer: _Sublayer,
        plan: LayerPlan,
        result: BlockRefit,
        attention: _Replay | None = None,
    ) -> tuple[Callable[[int], torch.Tensor], BlockRefit]:
        """Fit one projection.

        Returns a function from a batch's position to the fitted sublayer's output [documents, tokens,
        hidden_size], and ``result`` with what was added.
        """
        index = self._shell.index
        own = block.get_submodule(sublayer.projection)
        weight, bias = own.get_parameter("weight"), getattr(own, "bias", None)
        keep = kept_positions(sublayer.axis, plan, index.shape)
        gram = self._collect(block, sublayer, keep, attention)
        if keep is not None and gram is not None:
            name = f"{index.family.layer_prefix(layer)}{sublayer.projection}.weight"
            fitted = refit(read_tensor(index, name), mirror(gram), keep)
            report = LayerRefit(
                layer, sublayer.projection, fitted.relative_error_before, fitted.relative_error_after
            )
            result = BlockRefit({**result.weights, name: fitted.weight}, (*result.reports, report))
            weight = nn.Parameter(fitted.weight.float(), requires_grad=False)

        def project(position: int) -> torch.Tensor:
            with torch.inference_mode():
                return nn.functional.linear(sublayer.kept.read(position), weight, bias)

        return project, result

    def _collect(
        self, block: nn.Module, sublayer: _Sublayer, keep: list[int] | None, attention: _Replay | None
    ) -> torch.Tensor | None:
        """Run a block up to one projection: spill the kept channels, return the Gram matrix of all."""
        width = axis_length(sublayer.axis, self._shell.index.shape)
        gram = None if keep is None else torch.zeros(width, width)
        tap = _Tap(self._shell.index.shape.hidden_size)
        with _replaced(block, {sublayer.projection: tap}), torch.inference_mode():
            for position, batch in enumerate(self._batches):
                if attention is not None:
                    attention.output = self._attended.read(position)
                self._shell.run(self._hidden.read(position))
                if keep is None or gram is None:
                    sublayer.kept.write(position, tap.channels)
                else:
                    add_to_gram(gram, tap.channels[batch.mask])
                    sublayer.kept.write(position, tap.channels[..., keep])
        return gram


@contextmanager
def _replaced(block: nn.Module, stand_ins: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of a block's own, and the own ones back at the end."""
    own = {path: block.get_submodule(path) for path in stand_ins}
    for path, module in stand_ins.items():
        block.set_submodule(path, module)
    try:
        yield
    finally:
        for path, module in own.items():
            block.set_submodule(path, module)


@contextmanager
def refit_walk(
    index: CheckpointIndex, documents: Sequence[TokenizedDocument], after: Shape
) -> Iterator[RefitWalk]:
    """Yield a walk that stands before block 0; call :meth:`RefitWalk.refit_block` for each block in turn."""
    batches = make_batches(documents)
    with (
        spilled(batches, index.shape.hidden_size) as hidden,
        spilled(batches, index.shape.hidden_size) as attended,
        spilled(batches, axis_length("heads", after)) as kept_heads,
        spilled(batches, axis_length("ffn", after)) as kept_ffn,
    ):
        shell = DecoderShell(index)
        shell.embed_into(hidden, batches)
        yield RefitWalk(shell, batches, hidden, attended, (kept_heads, kept_ffn))
