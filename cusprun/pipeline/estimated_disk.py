"""What pruning takes of the disk, counted from shapes and documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cusprun.records import Corpora, Plan, TokenizedDocument

if TYPE_CHECKING:
    from cusprun.pipeline.opening import OpenModel
    from cusprun.pruning.refit import RefitSettings

_FLOAT = 4
_GENERATIONS = 2
"""A stream is read from one file and written to the next one."""


@dataclass(frozen=True)
class DiskUse:
    """Bytes on the disk: what stays (``expert_bytes``, ``scores_bytes``) and what each stage works with.

    ``refit_weights_bytes`` are new weights, which are kept until the expert is finished.
    """

    expert_bytes: int
    scores_bytes: int
    score_work_bytes: int
    refit_work_bytes: int
    refit_weights_bytes: int
    measure_work_bytes: int

    @property
    def most_bytes(self) -> int:
        """The most at one time."""
        refit = self.refit_work_bytes + self.refit_weights_bytes
        measure = self.measure_work_bytes + self.expert_bytes + self.refit_weights_bytes
        return self.scores_bytes + max(self.score_work_bytes, refit, measure)


def disk_use(
    opened: OpenModel, corpora: Corpora, settings: RefitSettings, plan: Plan, expert_bytes: int
) -> DiskUse:
    """Return what pruning takes; ``plan`` is that of any number of blocks."""
    from cusprun.families import axis_length
    from cusprun.pruning.refit_documents import anchor_documents
    from cusprun.pruning.refit_memory import mapped_bytes
    from cusprun.pruning.store_layout import store_bytes

    index = opened.index
    shape, hidden = index.shape, index.shape.hidden_size
    rows = _padded_tokens(corpora.calibration)
    anchors = anchor_documents(corpora.calibration, index, settings.anchors)
    refit = weights = 0
    if settings.mode != "none":
        widths = (_GENERATIONS + 1) * hidden + axis_length("heads", shape) + axis_length("ffn", shape)
        widths += 0 if settings.target == "output" else (_GENERATIONS + 2) * hidden
        after = plan.after
        kept = axis_length("heads", after) + axis_length("ffn", after)
        stored = index.num_bytes / index.num_parameters
        lengths = [len(document.token_ids) for document in corpora.calibration]
        refit = _FLOAT * (rows + len(anchors)) * widths
        refit += mapped_bytes(index, lengths, settings, opened.workspace.memory_bytes)
        weights = round(shape.num_hidden_layers * kept * hidden * stored)
    return DiskUse(
        expert_bytes=expert_bytes,
        scores_bytes=store_bytes(shape, len(corpora.calibration)),
        score_work_bytes=_FLOAT * _GENERATIONS * rows * hidden,
        refit_work_bytes=refit,
        refit_weights_bytes=weights,
        measure_work_bytes=_FLOAT * 2 * _GENERATIONS * _padded_tokens(corpora.held_out) * hidden,
    )


def _padded_tokens(documents: tuple[TokenizedDocument, ...]) -> int:
    from cusprun.walk.batches import make_batches

    return sum(batch.num_padded_tokens for batch in make_batches(documents))
