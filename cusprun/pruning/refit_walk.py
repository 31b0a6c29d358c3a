"""The stream of the pruned model over the calibration documents, refit block by block.

A block is run in three pieces, by putting stand-ins in the place of its modules: attention up to its output
projection, to fit that; the FFN up to its last projection, to fit that; and the sums of both outputs. So each
block is fitted on the inputs that the cut and refit blocks before it give, and no product is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.reader import read_tensor
from cusprun.codec import Indices
from cusprun.families import axis_length
from cusprun.pruning.dense_stream import DenseStream, check_target
from cusprun.pruning.inputs import Inputs, count_tokens
from cusprun.pruning.refit import RefitSettings, mean_bias
from cusprun.pruning.refit_documents import TokenWeights, anchor_documents, token_weights
from cusprun.pruning.slicing import kept_positions
from cusprun.records import LayerPlan, LayerRefit, TokenizedDocument
from cusprun.walk.arithmetic import Linear, linear_of
from cusprun.walk.batches import Batch, make_batches
from cusprun.walk.device import CPU, Device
from cusprun.walk.fallback import DEFAULT_BATCHING, Batching, on_device_or_host
from cusprun.walk.ranks import ALONE, Ranks
from cusprun.walk.scratch import scratch_of
from cusprun.walk.shell import DecoderShell
from cusprun.walk.spill import Spill, spilled
from cusprun.walk.stream import Stream
from cusprun.walk.work import Work
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

_NORM_EPSILON = 1e-6
"""What norms add to a mean square before they divide by its root."""


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
    """One half of a block: its last projection, the axis that is cut, and the spill of its channels."""

    projection: str
    axis: str
    channels: Spill


@dataclass(frozen=True)
class BlockRefit:
    """New weights and biases by tensor name, in the checkpoint's type, on the host; a report for each.

    ``kept`` is what the block keeps: the plan's units, but for FFN channels that were chosen again.
    """

    weights: dict[str, torch.Tensor]
    reports: tuple[LayerRefit, ...]
    kept: LayerPlan


@dataclass(frozen=True)
class RefitTexts:
    """What a refit is fitted on: this rank's batches, what their tokens weigh, and their streams.

    ``hidden`` is the stream of the model that is cut, ``dense`` that of the original where it is the target.
    """

    batches: tuple[Batch, ...]
    weights: TokenWeights
    settings: RefitSettings
    hidden: Stream
    dense: Stream | None


class RefitWalk:
    """Moves the calibration documents through a model that is being cut; made by :func:`refit_walk`."""

    def __init__(
        self,
        shell: DecoderShell,
        texts: RefitTexts,
        spills: tuple[Spill, Spill, Spill],
        dense: DenseStream | None = None,
        workspace: Workspace = DEFAULT_WORKSPACE,
    ) -> None:
        modules = shell.index.family.modules
        self._shell, self._device, self._dense = shell, shell.device, dense
        self._batches, self._weights, self._settings = texts.batches, texts.weights, texts.settings
        self._scratch, self._ranks = scratch_of(workspace), workspace.ranks
        self._counts = count_tokens(texts.weights, workspace.ranks)
        self._hidden, self._attended = texts.hidden, spills[0]
        self._attention = _Sublayer(modules.attention_output, "heads", spills[1])
        self._ffn = _Sublayer(modules.mlp_output, "ffn", spills[2])

    def refit_block(self, layer: int, plan: LayerPlan) -> BlockRefit:
        """Fit one block of the model and move the stream past it."""
        modules = self._shell.index.family.modules
        if self._dense is not None:
            self._dense.pass_until(layer)
        block = self._shell.load_block(layer)
        attention, mlp = _Replay(returns_tuple=True), _Replay(returns_tuple=False)
        result = BlockRefit({}, (), plan)
        with self._shell.holding(layer, block):
            if self._dense is not None:
                self._dense.observe(block)
            with _replaced(block, {modules.mlp: mlp}):
                project, result = self._fit(layer, block, self._attention, result)
            for position in range(len(self._batches)):
                self._attended.write(position, project(position))
            with _replaced(block, {modules.attention: attention}):
                project, result = self._fit(layer, block, self._ffn, result, attention)
            with _replaced(block, {modules.attention: attention, modules.mlp: mlp}):
                for position in range(len(self._batches)):
                    attention.output = self._attended.read(position)
                    mlp.output = project(position)
                    self._hidden.write(position, self._shell.run(self._hidden.read(position)))
        self._hidden.turn()
        if self._dense is not None:
            self._dense.leave()
        return result

    def _fit(
        self,
        layer: int,
        block: nn.Module,
        sublayer: _Sublayer,
        result: BlockRefit,
        attention: _Replay | None = None,
    ) -> tuple[Callable[[int], torch.Tensor], BlockRefit]:
        """Fit one projection.

        Returns a function from a batch's position to the fitted sublayer's output [documents, tokens,
        hidden_size], and ``result`` with what was added.
        """
        index = self._shell.index
        own = block.get_submodule(sublayer.projection)
        apply: Linear = own
        bias: torch.Tensor | None = getattr(own, "bias", None)
        keep = kept_positions(sublayer.axis, result.kept, index.shape)
        inputs = self._collect(block, sublayer, attention, measured=keep is not None)
        if keep is not None and inputs is not None:
            name = f"{index.family.layer_prefix(layer)}{sublayer.projection}.weight"
            stored = self._device.put(read_tensor(index, name))
            if self._settings.mode == "bias":
                result, weight, bias = _biased(result, name, stored, inputs, keep, bias, self._device)
            else:
                if sublayer is self._ffn and self._settings.revise:
                    keep = self._chosen(stored, inputs, len(keep))
                    result = replace(result, kept=replace(result.kept, ffn_channels=Indices(keep)))
                result, weight = self._refitted(result, layer, sublayer.projection, stored, inputs, keep)
            apply = linear_of(weight, bias, self._shell.products)
        chosen = None if keep is None else self._device.put(torch.tensor(keep))

        def project(position: int) -> torch.Tensor:
            channels = sublayer.channels.read(position)
            with torch.inference_mode():
                return apply(channels if chosen is None else channels[..., chosen])

        return project, result

    def _chosen(self, weight: torch.Tensor, inputs: Inputs, count: int) -> list[int]:
        fetch = self._device.fetch
        return self._ranks.from_first(
            lambda: on_device_or_host(
                self._device,
                lambda: inputs.chosen_channels(weight, count),
                lambda: inputs.fetched(self._device).chosen_channels(fetch(weight), count),
            )
        )

    def _refitted(
        self,
        result: BlockRefit,
        layer: int,
        projection: str,
        weight: torch.Tensor,
        inputs: Inputs,
        keep: list[int],
    ) -> tuple[BlockRefit, torch.Tensor]:
        """Return ``result`` with one projection more, and its new columns in float32 on the device."""
        device = self._device
        fitted = self._ranks.from_first(
            lambda: on_device_or_host(
                device,
                lambda: inputs.refitted(weight, keep),
                lambda: inputs.fetched(device).refitted(device.fetch(weight), keep),
            )
        )
        report = LayerRefit(
            layer,
            projection,
            fitted.relative_error_before,
            fitted.relative_error_after,
            fitted.ridge,
            "held-out" if inputs.is_judged else "calibration",
        )
        name = f"{self._shell.index.family.layer_prefix(layer)}{projection}.weight"
        result = replace(
            result,
            weights={**result.weights, name: device.fetch(fitted.weight)},
            reports=(*result.reports, report),
        )
        return result, device.put(fitted.weight).float()

    def _collect(
        self, block: nn.Module, sublayer: _Sublayer, attention: _Replay | None, *, measured: bool
    ) -> Inputs | None:
        """Run a block up to one projection: spill its channels, return what is known of all ranks'."""
        hidden_size = self._shell.index.shape.hidden_size
        inputs = self._no_inputs(sublayer) if measured else None
        tap, own = _Tap(hidden_size), block.get_submodule(sublayer.projection)
        with _replaced(block, {sublayer.projection: tap}), torch.inference_mode():
            for position in range(len(self._batches)):
                stream = self._hidden.read(position)
                attended = None if attention is None else self._attended.read(position)
                if attention is not None:
                    attention.output = attended
                self._shell.run(stream)
                sublayer.channels.write(position, tap.channels)
                if inputs is None:
                    continue
                drift = None
                if self._dense is not None:
                    stream = stream if attended is None else stream + attended
                    drift = self._dense.drift(sublayer.projection, position, stream, own(tap.channels))
                self._add(inputs, tap.channels, own, position, drift)
        if inputs is not None:
            inputs.add_over()
        return inputs

    def _no_inputs(self, sublayer: _Sublayer) -> Inputs:
        shape = self._shell.index.shape
        return Inputs(
            axis_length(sublayer.axis, shape),
            self._counts,
            0 if self._dense is None else shape.hidden_size,
            device=self._device,
            scratch=self._scratch,
            ranks=self._ranks,
        )

    def _add(
        self,
        inputs: Inputs,
        channels: torch.Tensor,
        own: nn.Module,
        position: int,
        drift: torch.Tensor | None,
    ) -> None:
        """Add the tokens of one batch, each with its weight and its drift.

        Where a norm stands between the projection and the residual stream it divides each token's output, and
        with it the error, by the output's size: there every token weighs one over its mean square.
        """
        fitted, judged = (
            self._device.put(weights[position]) for weights in (self._weights.fit, self._weights.apart)
        )
        weights = fitted + judged
        chosen = weights > 0
        rows, weight = channels[chosen], weights[chosen]
        if self._shell.index.family.normalises_outputs and len(rows):
            weight = weight / own(rows).square().mean(dim=-1).clamp_min(_NORM_EPSILON)
        inputs.add(rows, weight, judged[chosen] > 0, None if drift is None else drift[chosen])


def _biased(
    result: BlockRefit,
    name: str,
    stored: torch.Tensor,
    inputs: Inputs,
    keep: list[int],
    bias: torch.Tensor | None,
    device: Device,
) -> tuple[BlockRefit, torch.Tensor, torch.Tensor]:
    """Leave the kept columns as they are and add the mean of what went to the bias."""
    added = mean_bias(stored, inputs.means(), keep)
    whole = added.float() if bias is None else bias + added.float()
    weights = {name.removesuffix("weight") + "bias": device.fetch(whole.to(stored.dtype))}
    return replace(result, weights={**result.weights, **weights}), stored[:, keep].float(), whole


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


def refit_texts(
    index: CheckpointIndex,
    documents: Sequence[TokenizedDocument],
    settings: RefitSettings,
    work: Work,
    *,
    device: Device = CPU,
    batching: Batching = DEFAULT_BATCHING,
    ranks: Ranks = ALONE,
) -> RefitTexts:
    """Batch and weigh the documents of a refit, and name the streams of its ``work``.

    Raises:
        PlanError: the family has no use for the target ``residual``.
        UserError: ``settings`` name a target that is not known.
    """
    if settings.mode == "refit":
        check_target(settings.target, index.family)
        assert settings.target != "auto", "what `auto` stands for is chosen before a walk"
    if settings.mode == "bias":
        # The mean is that of the calibration tokens: all of them, and of no others.
        settings = replace(settings, held_out=0, anchors=0)
    documents = (*documents, *anchor_documents(documents, index, settings.anchors))
    batches, width = ranks.share(make_batches(documents, batching.tokens)), index.shape.hidden_size
    is_drifting = settings.mode == "refit" and settings.target == "residual"
    return RefitTexts(
        batches,
        token_weights(batches, documents, settings),
        settings,
        work.stream("hidden", batches, width, device),
        work.stream("dense", batches, width, device) if is_drifting else None,
    )


@contextmanager
def refit_walk(
    index: CheckpointIndex,
    texts: RefitTexts,
    *,
    after: int | None = None,
    device: Device = CPU,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> Iterator[RefitWalk]:
    """Yield a walk which :meth:`RefitWalk.refit_block` takes past each kept block in turn.

    The streams of ``texts`` are those behind the block ``after``; when it is not given, they are begun.
    """
    batches, shape = texts.batches, index.shape

    def spill(width: int) -> AbstractContextManager[Spill]:
        return spilled(batches, width, workspace.folder, device=device)

    with device.exact(), ExitStack() as stack:
        attended, heads, channels = (
            stack.enter_context(spill(width))
            for width in (shape.hidden_size, axis_length("heads", shape), axis_length("ffn", shape))
        )
        shell = DecoderShell(index, device)
        for stream in (texts.hidden, texts.dense):
            if after is None and stream is not None:
                shell.embed_into(stream.next, batches)
                stream.turn()
        dense = None
        if texts.dense is not None:
            added = tuple(stack.enter_context(spill(shape.hidden_size)) for _ in range(2))
            first = 0 if after is None else after + 1
            dense = DenseStream(shell, len(batches), texts.dense, (added[0], added[1]), first)
        yield RefitWalk(shell, texts, (attended, heads, channels), dense, workspace)
