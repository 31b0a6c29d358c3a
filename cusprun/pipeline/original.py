"""The original's likelihoods on documents, kept in the cache: many experts are compared with one original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.cache import cached
from cusprun.codec import dump_json, key_of, load_json
from cusprun.errors import UserError
from cusprun.progress import SILENT, Progress
from cusprun.records import TokenizedDocument
from cusprun.version import __version__

if TYPE_CHECKING:
    from cusprun.pipeline.opening import OpenModel
    from cusprun.quality.likelihood import DocumentLikelihood


@dataclass(frozen=True)
class _Sums:
    """What a likelihood alone, without a reference, says of each document."""

    num_predicted_tokens: tuple[int, ...]
    negative_log_likelihood: tuple[float, ...]


def original_likelihoods(
    opened: OpenModel, documents: Sequence[TokenizedDocument], progress: Progress = SILENT
) -> tuple[DocumentLikelihood, ...]:
    """Return a model's likelihoods of documents from the cache, measured unless they are there and sound.

    Raises:
        CorpusError: there are no documents.
        ModelError: weights cannot be read or are not finite.
        OutputError: the cache cannot be written.
    """
    from cusprun.quality.likelihood import DocumentLikelihood, measure_likelihood

    tokens = [document.token_ids for document in documents]
    name = key_of("likelihood", opened.model_hash, tokens, __version__, *opened.device.in_float32.key)

    def make(path: Path) -> None:
        found = measure_likelihood(
            opened.index,
            documents,
            key=opened.model_hash,
            device=opened.device,
            workspace=opened.workspace,
            progress=progress,
        )
        counts = tuple(item.num_predicted_tokens for item in found)
        dump_json(_Sums(counts, tuple(item.negative_log_likelihood for item in found)), path)

    path, _ = cached("likelihoods", name, make)
    try:
        sums = load_json(_Sums, path)
    except UserError:
        path.unlink()
        sums = load_json(_Sums, cached("likelihoods", name, make)[0])
    return tuple(map(DocumentLikelihood, sums.num_predicted_tokens, sums.negative_log_likelihood))
