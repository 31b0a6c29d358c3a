"""Perplexity, and agreement with another model, over documents, one decoder block in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.reader import read_tensor
from cusprun.errors import CorpusError
from cusprun.progress import SILENT, Advance, Progress
from cusprun.records import TokenizedDocument
from cusprun.walk.batches import Batch, make_batches
from cusprun.walk.device import CPU, Device
from cusprun.walk.fallback import Batching, with_smaller_batches
from cusprun.walk.shell import DecoderShell
from cusprun.walk.spill import Spill, spilled
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

_HEAD_ROWS = 256
"""Tokens whose logits exist at one time: 256 x 262,144 float32 is 0.27 GB."""


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
    device: Device = CPU,
    workspace: Workspace = DEFAULT_WORKSPACE,
    progress: Progress = SILENT,
) -> tuple[DocumentLikelihood, ...]:
    """Return each document's likelihood under a model, in the order given.

    Raises:
        CorpusError: there are no documents.
        DeviceError: the device has too little memory, in smaller batches too.
        ModelError: weights cannot be read or are not finite.
    """
    if not documents:
        raise CorpusError("there are no documents to measure on; give the expert more held-out documents")
    models = (index,) if reference is None else (index, reference)
    return with_smaller_batches(
        device, lambda batching: _likelihoods(models, documents, batching, device, workspace, progress)
    )


def _likelihoods(
    models: Sequence[CheckpointIndex],
    documents: Sequence[TokenizedDocument],
    batching: Batching,
    device: Device,
    workspace: Workspace,
    progress: Progress,
) -> tuple[DocumentLikelihood, ...]:
    """Measure the first of ``models``, with the second as its reference if there is one."""
    batches = make_batches(documents, batching.tokens)
    steps = sum(model.shape.num_hidden_layers for model in models) + len(batches)
    with ExitStack() as stack:
        stack.enter_context(device.exact())
        advance = stack.enter_context(progress.stage(f"measuring quality{batching.note}", steps))
        heads = []
        for model in models:
            width = model.shape.hidden_size
            hidden = stack.enter_context(spilled(batches, width, workspace.folder, device=device))
            heads.append(_Head(_run_blocks(model, batches, hidden, device, advance), hidden))
        results: dict[int, DocumentLikelihood] = {}
        for position, batch in enumerate(batches):
            for row, document in enumerate(batch.documents):
                results[document] = _measure(heads, batch, position, row)
            advance(1)
    return tuple(results[document] for document in range(len(documents)))


class _Head:
    """The final norm and output projection of one model, over its spilled last hidden states."""

    def __init__(self, shell: DecoderShell, hidden: Spill) -> None:
        self._hidden = hidden
        self._norm = shell.load_norm()
        self._weight = shell.device.put(read_tensor(shell.index, shell.index.head_name)).float()

    def log_probs(self, position: int, row: int, tokens: slice) -> torch.Tensor:
        """Return log-probabilities of some tokens of one document: float32 [tokens, vocab_size]."""
        hidden = self._norm(self._hidden.read_document(position, row, tokens))
        return torch.log_softmax(nn.functional.linear(hidden, self._weight), dim=-1)


def _run_blocks(
    index: CheckpointIndex, batches: Sequence[Batch], hidden: Spill, device: Device, advance: Advance
) -> DecoderShell:
    """Leave the last block's outputs in ``hidden``."""
    shell = DecoderShell(index, device)
    shell.embed_into(hidden, batches)
    for layer in range(index.shape.num_hidden_layers):
        block = shell.load_block(layer)
        with shell.holding(layer, block):
            for position in range(len(batches)):
                hidden.write(position, shell.run(hidden.read(position)))
        advance(1)
    return shell


@torch.inference_mode()
def _measure(heads: Sequence[_Head], batch: Batch, position: int, row: int) -> DocumentLikelihood:
    length = int(batch.mask[row].sum())
    nll = divergence = reference_nll = 0.0
    agreements = 0
    for start in range(0, length - 1, _HEAD_ROWS):
        stop = min(start + _HEAD_ROWS, length - 1)
        own = heads[0].log_probs(position, row, slice(start, stop))
        following = batch.token_ids[row, start + 1 : stop + 1].to(own.device)
        nll -= float(own.gather(1, following.unsqueeze(1)).double().sum())
        for reference in heads[1:]:
            theirs = reference.log_probs(position, row, slice(start, stop))
            divergence += float((theirs.exp() * (theirs - own)).double().sum())
            reference_nll -= float(theirs.gather(1, following.unsqueeze(1)).double().sum())
            agreements += int((theirs.argmax(dim=-1) == own.argmax(dim=-1)).sum())
    return DocumentLikelihood(length - 1, nll, divergence, agreements, reference_nll)
