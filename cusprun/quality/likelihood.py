"""Perplexity, and agreement with another model, over documents, one decoder block in memory at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import CorpusError, ModelError
from cusprun.progress import SILENT, Advance, Progress
from cusprun.quality.head import Head, predictions
from cusprun.records import TokenizedDocument
from cusprun.walk.batches import Batch, make_batches
from cusprun.walk.budget import batching_within, measuring
from cusprun.walk.device import CPU, Device
from cusprun.walk.fallback import Batching, with_smaller_batches
from cusprun.walk.shell import DecoderShell
from cusprun.walk.stream import Stream
from cusprun.walk.work import Work
from cusprun.walk.work_folder import walk_key, working
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

log = logging.getLogger(__name__)

HEAD_TOKENS = 2048
"""Tokens that go through the head at one time; each piece of it is cast once for all of them."""

_SUMS = ("tokens", "negative_log_likelihood", "divergence", "agreements", "reference_negative_log_likelihood")
"""What is added up over a document's predicted tokens, in the order of :class:`DocumentLikelihood`."""


@dataclass(frozen=True)
class DocumentLikelihood:
    """Sums over one document's predicted tokens (all but its first), in nats.

    ``kl_divergence`` is KL(reference || model), ``top1_agreements`` counts equal most likely tokens and
    ``reference_negative_log_likelihood`` is the reference's own; all are zero when there is no reference.
    """

    num_predicted_tokens: int
    negative_log_likelihood: float
    kl_divergence: float = 0.0
    top1_agreements: int = 0
    reference_negative_log_likelihood: float = 0.0


def perplexity(likelihoods: Sequence[DocumentLikelihood]) -> float:
    """Return exp of the mean negative log-likelihood per predicted token over all documents."""
    tokens = sum(likelihood.num_predicted_tokens for likelihood in likelihoods)
    return exp_of_mean(sum(likelihood.negative_log_likelihood for likelihood in likelihoods), tokens)


def exp_of_mean(total_nats: float, tokens: int) -> float:
    """Return exp(total / tokens), cut at e^700: beyond it float64 ends, and no model is meant to be there."""
    return math.exp(min(total_nats / tokens, 700.0))


def measure_likelihood(
    index: CheckpointIndex,
    documents: Sequence[TokenizedDocument],
    reference: CheckpointIndex | None = None,
    *,
    key: str | None = None,
    device: Device = CPU,
    workspace: Workspace = DEFAULT_WORKSPACE,
    progress: Progress = SILENT,
) -> tuple[DocumentLikelihood, ...]:
    """Return each document's likelihood under a model, in the order given.

    ``key`` stands for the weights of both models: with it, what an earlier run has finished is found.

    Raises:
        CorpusError: there are no documents.
        DeviceError: the device has too little memory, in smaller batches too.
        ModelError: weights cannot be read or are not finite, or the reference has another vocabulary.
        UserError: the memory of ``workspace`` is too little.
    """
    if not documents:
        raise CorpusError("there are no documents to measure on; give the expert more held-out documents")
    if reference is not None and reference.shape.vocab_size != index.shape.vocab_size:
        raise ModelError(
            f"{index.folder} has a vocabulary of {index.shape.vocab_size:,} entries and {reference.folder} "
            f"one of {reference.shape.vocab_size:,}, so their predictions cannot be compared; evaluate them "
            "one by one"
        )
    models = (index,) if reference is None else (index, reference)
    lengths = [len(document.token_ids) for document in documents]
    return with_smaller_batches(
        device,
        lambda batching: _likelihoods(models, documents, key, batching, device, workspace, progress),
        batching_within(workspace.memory_bytes, measuring(models, lengths)),
        workspace.ranks,
    )


def _likelihoods(
    models: Sequence[CheckpointIndex],
    documents: Sequence[TokenizedDocument],
    key: str | None,
    batching: Batching,
    device: Device,
    workspace: Workspace,
    progress: Progress,
) -> tuple[DocumentLikelihood, ...]:
    """Measure the first of ``models``, with the second as its reference if there is one."""
    ranks = workspace.ranks
    batches = ranks.share(make_batches(documents, batching.tokens))
    total = sum(model.shape.num_hidden_layers for model in models)
    whole = None if key is None else walk_key(key, documents, batching.tokens, device, ranks)
    with working(workspace, "quality", whole) as work, device.exact():
        streams = [
            work.stream(f"model-{number}", batches, model.shape.hidden_size, device)
            for number, model in enumerate(models)
        ]
        done = work.settle()
        if done:
            log.info("measuring quality goes on after layer %d of %d", done, total)
        name, steps = f"measuring quality{batching.note}", total - done + len(batches)
        with progress.stage(name, steps) as advance:
            heads = []
            for model, hidden in zip(models, streams, strict=True):
                heads.append(Head(_run_blocks(model, batches, hidden, work, done, advance)))
                done = max(0, done - model.shape.num_hidden_layers)
            sums = _summed(heads, streams, batches, len(documents), advance)
    # Every document is measured on one rank, and zero on the others.
    return tuple(_likelihood(row) for row in ranks.add(sums).tolist())


def _summed(
    heads: Sequence[Head], streams: Sequence[Stream], batches: Sequence[Batch], count: int, advance: Advance
) -> torch.Tensor:
    """Return the sums of all ``count`` documents: float64 [documents, sums]."""
    sums = torch.zeros(count, len(_SUMS), dtype=torch.float64)
    for position, batch in enumerate(batches):
        states = [hidden.read(position) for hidden in streams]
        sums[list(batch.documents)] = _measure(heads, states, batch)
        advance(1)
    return sums


def _run_blocks(
    index: CheckpointIndex,
    batches: Sequence[Batch],
    hidden: Stream,
    work: Work,
    done: int,
    advance: Advance,
) -> DecoderShell:
    """Leave the last block's outputs in ``hidden``, which is behind ``done`` blocks (or more than all)."""
    shell = DecoderShell(index, hidden.device.in_float32)
    if not done:
        shell.embed_into(hidden.next, batches)
        hidden.turn()
    for layer in range(done, index.shape.num_hidden_layers):
        block = shell.load_block(layer)
        with shell.holding(layer, block):
            for position in range(len(batches)):
                hidden.write(position, shell.run(hidden.read(position)))
        hidden.turn()
        work.commit()
        advance(1)
    return shell


@torch.inference_mode()
def _measure(heads: Sequence[Head], states: Sequence[torch.Tensor], batch: Batch) -> torch.Tensor:
    """Return the sums of one batch's documents, as ``_SUMS`` names them: float64 [documents, sums].

    ``states`` are the last hidden states of each model, [documents, tokens, hidden_size].
    """
    device = states[0].device
    predicting = batch.mask[:, 1:]
    rows = torch.arange(len(batch.documents)).unsqueeze(1).expand_as(predicting)[predicting]
    following = batch.token_ids[:, 1:][predicting].to(device)
    mask = predicting.to(device)
    sums = torch.zeros(len(batch.documents), len(_SUMS), dtype=torch.float64)
    chosen = [hidden[:, :-1][mask] for hidden in states]
    for start in range(0, len(rows), HEAD_TOKENS):
        part = slice(start, start + HEAD_TOKENS)
        own, *references = predictions(heads, [hidden[part] for hidden in chosen], following[part])
        columns = [torch.ones_like(own.negative_log_likelihood()), own.negative_log_likelihood()]
        for reference in references:
            columns += [
                reference.divergence(own),
                (reference.top == own.top).double(),
                reference.negative_log_likelihood(),
            ]
        found = torch.stack(columns, dim=1).cpu()
        sums[:, : found.shape[1]].index_add_(0, rows[part], found)
    return sums


def _likelihood(sums: Sequence[float]) -> DocumentLikelihood:
    tokens, nll, divergence, agreements, reference_nll = sums
    return DocumentLikelihood(round(tokens), nll, divergence, round(agreements), reference_nll)
