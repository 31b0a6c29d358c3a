"""Records of the parity gate: limits, differences found, and the report that is written to disk."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from cusprun.codec import from_plain
from cusprun.errors import ExportError, require_known

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


LOGITS, LOG_PROBS = "logit", "log-probability"
"""What was compared: whole rows of logits, or the likeliest tokens that a server names."""


@dataclass(frozen=True)
class Limits:
    """What an artifact may differ by; ``None`` sets no limit. See ``limits.toml`` for units and reasons."""

    kv_cache: str | None = None
    max_abs_logit_difference: float | None = None
    mean_kl_max: float | None = None
    top1_agreement_min: float | None = None
    perplexity_ratio_max: float | None = None
    compares_weights: bool = False


@dataclass(frozen=True)
class TokenMismatch:
    """One text that the two sides turn into different token ids."""

    text: str
    reference: tuple[int, ...]
    candidate: tuple[int, ...]


@dataclass(frozen=True)
class TextParity:
    """Everything before the weights: token ids, chat prompts, special tokens.

    ``explained`` counts texts whose ids differ only by a normalisation that the runtime does not have (see
    ``exporters.parity_text``); they are reported and do not fail. ``leading_bos_*`` is the largest number of
    BOS tokens at the start of a chat. ``extra_stop_ids`` are ids that only the artifact stops at.
    """

    probe_texts: int
    mismatch_count: int
    mismatches: tuple[TokenMismatch, ...]
    explained: Mapping[str, int]
    chats: int
    chat_mismatches: tuple[str, ...]
    leading_bos_reference: int
    leading_bos_candidate: int
    missing_stop_ids: tuple[int, ...]
    extra_stop_ids: tuple[int, ...]
    special_mismatches: tuple[str, ...]


@dataclass(frozen=True)
class LogitParity:
    """How far the logits are apart over all tokens compared.

    KL is that of the reference's distribution from the candidate's, in nats; perplexities are over the next
    tokens of the documents; ``greedy_agreement`` is the share of continuation tokens up to the first that
    differs. A value that is not finite is ``None``. Where ``compared`` is ``log-probability``, the KL is over
    the named tokens and the rest as one, a lower bound, and the largest difference that of a log-probability.
    """

    documents: int
    tokens: int
    mean_kl: float | None
    max_kl: float | None
    top1_agreement: float
    max_abs_logit_difference: float | None
    perplexity_reference: float | None
    perplexity_candidate: float | None
    greedy_agreement: float
    compared: str = LOGITS


@dataclass(frozen=True)
class ParityReport:
    """The verdict (``pass`` or ``fail``) with everything it rests on; ``failures`` says why in sentences.

    ``first_difference`` names the first tensor of a failed artifact that is not what the precision explains.
    """

    verdict: str
    failures: tuple[str, ...]
    reference: str
    candidate: str
    limits: Limits
    text: TextParity
    logits: LogitParity
    format: str = ""
    quant: str = ""
    reference_sha256: str = ""
    artifact_sha256: str = ""
    artifact: str = ""
    first_difference: str | None = None
    schema_version: int = 1


@cache
def _limit_table() -> Mapping[str, Mapping[str, Any]]:
    text = resources.files("exporters").joinpath("limits.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def limits_for(format_name: str, quant: str, activation: str = "") -> Limits:
    """Return the limits of a format and precision; raises ``ExportError`` for one that has none.

    Where a runtime computes the FFN's ``activation`` in less precision than the rest, that activation has
    limits of its own, which replace the others.
    """
    table = _limit_table()
    require_known(format_name, table, "format in the parity limits", ExportError)
    require_known(quant, table[format_name], f"{format_name} precision in the parity limits", ExportError)
    stated = dict(table[format_name][quant])
    stated |= stated.pop("activations", {}).get(activation, {})
    limits: Limits = from_plain(Limits, stated, f"{format_name}.{quant}")
    return limits
