"""The stream of the model that is not cut, beside the refit's walk: what the target ``residual`` aims at."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn

from cusprun.errors import PlanError, require_known
from cusprun.families import Family
from cusprun.records import REFIT_TARGETS
from cusprun.walk.shell import DecoderShell
from cusprun.walk.spill import Spill
from cusprun.walk.stream import Stream


def check_target(target: str, family: Family) -> None:
    """Refuse what a refit of a family cannot aim at.

    Raises:
        UserError: there is no such target.
        PlanError: a norm of the family stands between each last projection and the stream.
    """
    require_known(target, REFIT_TARGETS, "refit target")
    if target != "output" and family.normalises_outputs:
        tried = "" if target == "residual" else ", which tries the target 'residual',"
        raise PlanError(
            f"the refit target {target!r}{tried} is not for the family {family.model_type}: a norm stands "
            "between its projections and the stream; take the target 'output'"
        )


class DenseStream:
    """Moves ``count`` batches through the whole model, one block at a time.

    ``hidden`` is the stream before block ``layer``; ``added`` is where both sublayers' outputs are kept. Its
    files take 16 bytes for each padded token and entry of a hidden state, 20 where blocks go.
    """

    def __init__(
        self, shell: DecoderShell, count: int, hidden: Stream, added: tuple[Spill, Spill], layer: int = 0
    ) -> None:
        modules = shell.index.family.modules
        self._shell, self._count, self._layer = shell, count, layer
        self._hidden = hidden
        self._attended, self._ffn = added
        self._outputs = {modules.attention_output: self._attended, modules.mlp_output: self._ffn}

    def pass_until(self, layer: int) -> None:
        """Move past the blocks before ``layer`` that the cut model does not have."""
        while self._layer < layer:
            block = self._shell.load_block(self._layer)
            with self._shell.holding(self._layer, block):
                self.observe(block)
            self.leave()

    def observe(self, block: nn.Module) -> None:
        """Keep what both sublayers of the held block add to the stream."""
        with ExitStack() as stack:
            given: dict[str, torch.Tensor] = {}
            for path in self._outputs:
                stack.callback(_keep_output(block.get_submodule(path), path, given).remove)
            for position in range(self._count):
                self._shell.run(self._hidden.read(position))
                for path, spill in self._outputs.items():
                    spill.write(position, given[path])

    def leave(self) -> None:
        """Move the stream past the block that was observed."""
        for position in range(self._count):
            attended = self._hidden.read(position) + self._attended.read(position)
            self._hidden.write(position, attended + self._ffn.read(position))
        self._hidden.turn()
        self._layer += 1

    def drift(
        self, projection: str, position: int, stream: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Return what brings the stream of the cut model to this one, beyond what a whole projection adds.

        All are float32 [documents, tokens, hidden_size]: ``stream`` is the cut model's before the projection
        adds to it, ``output`` what the whole projection gives there. The two differences are taken first, so
        that a stream that nothing has moved has a drift of exactly zero.
        """
        own, added = self._hidden.read(position), self._outputs[projection].read(position)
        if self._outputs[projection] is self._ffn:
            own = own + self._attended.read(position)
        return (own - stream) + (added - output)


def _keep_output(
    module: nn.Module, path: str, given: dict[str, torch.Tensor]
) -> torch.utils.hooks.RemovableHandle:
    def keep(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        given[path] = output

    return module.register_forward_hook(keep)
