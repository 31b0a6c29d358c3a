"""What a user may ask of the plan and the pruning, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.errors import (
    CorpusError,
    PlanError,
    StoreError,
    UserError,
    nearest,
    require_kind,
    require_known,
    require_list,
)
from cusprun.records import DIMENSIONS, GRANULARITIES, REFIT_TARGETS, Expert, Plan
from cusprun.resolve import StrPath, as_paths

if TYPE_CHECKING:
    from cusprun.checkpoint.index import CheckpointIndex
    from cusprun.families import Family
    from cusprun.pruning.budget import Budget
    from cusprun.pruning.refit import RefitSettings

DEFAULT_RATIO = 0.25
"""Share of the decoder blocks' attention and FFN parameters that goes when nothing else is said."""

BUDGETS = ("ratio", "target_params", "target_bytes", "max_loss")
"""The budgets, of which one may be given."""

WEIGHT_SPAN = 1e6
"""How many times the weight of one dimension may be that of another, unless one of them is 0."""

_KINDS: Mapping[str, type] = {
    "ratio": float,
    "max_loss": float,
    "target_params": int,
    "target_bytes": int,
    "shard_bytes": int,
    "refit": bool,
}


def texts_of(values: str | Sequence[str], what: str) -> tuple[str, ...]:
    """Return texts as a tuple; a single one may hold several, separated by commas.

    Raises:
        UserError: it is neither a text nor a list of texts.
    """
    if isinstance(values, str):
        return tuple(part.strip() for part in values.split(",") if part.strip())
    return require_list(values, str, what)


def stores_of(scores: StrPath | Sequence[StrPath] | None) -> tuple[Path, ...]:
    """Return the stores that were given; raises ``StoreError`` for a list of none."""
    stores = () if scores is None else tuple(as_paths(scores))
    if scores is not None and not stores:
        raise StoreError("the list of stores is empty; name one, or leave out 'scores' to score here")
    return stores


def _require_kinds(wishes: Mapping[str, object]) -> None:
    """Raise ``UserError`` when a wish, by its name in ``_KINDS``, is of the wrong type."""
    for name, value in wishes.items():
        if name in _KINDS and value is not None:
            require_kind(value, _KINDS[name], name)


DEFAULT_REFIT_TARGET = "output"
"""What the refit aims at: `residual` keeps more of some experts and far less of others (docs/method.md)."""


@dataclass(frozen=True)
class PlanWishes:
    """What a plan is to be; no budget at all means the default ratio, no units the default kinds."""

    ratio: float | None = None
    rule: str | None = None
    targets: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    target_params: int | None = None
    target_bytes: int | None = None
    refit: bool = True

    def check(self) -> None:
        """Refuse what cannot be before any work is done."""
        from cusprun.pruning.rules import check_rule
        from cusprun.pruning.targets import check_units, parse_targets

        _require_kinds(vars(self))
        given = [name for name in BUDGETS if getattr(self, name, None) is not None]
        if len(given) > 1:
            raise UserError(f"only one budget may be given, not {' and '.join(given)}; leave out all but one")
        if self.ratio is not None:
            self._check_ratio(self.ratio)
        for name in ("target_params", "target_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if self.rule is not None:
            check_rule(self.rule)
        parse_targets(self.targets)
        if self.target_bytes is not None:
            self.gguf_target()
        check_units(self.units)

    def _check_ratio(self, ratio: float) -> None:
        from cusprun.pruning.budget import check_ratio

        check_ratio(ratio)

    def gguf_target(self) -> str:
        """Return the one gguf target; raises ``UserError`` when a size in bytes has none or several."""
        found = [text for text in self.targets if text.strip().lower().startswith("gguf:")]
        if len(found) != 1:
            raise UserError(
                f"a size in bytes is that of one gguf file, and {len(found) or 'no'} gguf "
                f"target{'s are' if len(found) != 1 else ' is'} given; name exactly one, like gguf:q4_k_m"
            )
        return found[0].strip().lower()

    @property
    def chosen_rule(self) -> str:
        """The rule, or the default one."""
        from cusprun.pruning.rules import DEFAULT_RULE

        return self.rule or DEFAULT_RULE

    def budget(self, index: CheckpointIndex) -> Budget:
        """Return the budget of a model; biases that the expert is given count.

        Raises:
            PlanError: it is out of range.
            ExportError: a size in bytes was given, and the model's tokenizer has no form in GGUF.
        """
        from cusprun.pruning.biases import expert_index
        from cusprun.pruning.budget import bytes_budget, parameters_budget, ratio_budget

        stored = expert_index(index, self.chosen_rule, refit=self.refit)
        if self.target_bytes is not None:
            from exporters.gguf_size import gguf_size

            target = self.gguf_target()
            return bytes_budget(self.target_bytes, target, gguf_size(stored, target.partition(":")[2]))
        if self.target_params is not None:
            return parameters_budget(stored, self.target_params)
        return ratio_budget(index, DEFAULT_RATIO if self.ratio is None else self.ratio)


@dataclass(frozen=True)
class PruneWishes(PlanWishes):
    """What :func:`cusprun.prune` was asked for; no ``stores`` and no ``plan`` mean: score and plan."""

    max_loss: float | None = None
    granularity: str = "unit"
    dimension_weights: Mapping[str, float] = field(default_factory=dict)
    refit_target: str | None = None
    shard_bytes: int | None = None
    stores: tuple[Path, ...] = ()
    plan: StrPath | Plan | None = None

    def check(self) -> None:
        """Refuse what cannot be before any work is done."""
        require_known(self.granularity, GRANULARITIES, "granularity")
        if self.refit_target is not None:
            require_known(self.refit_target, REFIT_TARGETS, "refit target")
        self._refuse_conflicts()
        super().check()
        if self.granularity == "neuron" and self.rule is not None:
            from cusprun.pruning.neuron_plan import check_neuron_rule

            check_neuron_rule(self.rule)
        if self.max_loss is not None and not 0 < self.max_loss < math.inf:
            raise UserError(
                f"the largest loss must be above 0, not {self.max_loss:g}; write 0.05 or 5% for a perplexity "
                "5 % above the original's"
            )
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise UserError(f"the shard size must be at least 1 byte, not {self.shard_bytes}")
        for dimension, weight in self.dimension_weights.items():
            require_known(dimension, DIMENSIONS, "dimension")
            require_kind(weight, float, f"the weight of {dimension}")
            if not 0 <= weight < math.inf:
                raise UserError(f"the weight of {dimension} must be 0 or above, not {weight:g}")

    def _check_ratio(self, ratio: float) -> None:
        from cusprun.pruning.neuron_plan import check_neuron_ratio

        if self.granularity == "neuron":
            check_neuron_ratio(ratio)
        else:
            super()._check_ratio(ratio)

    def check_dimensions(self, expert: Expert) -> None:
        """Refuse weights of dimensions that an expert does not have, and weights that leave it nothing."""
        for dimension in self.dimension_weights:
            if dimension not in expert.dimensions:
                raise CorpusError(
                    f"the expert {expert.name!r} has no dimension {dimension!r}"
                    f"{nearest(dimension, expert.dimensions)} (it has: {', '.join(expert.dimensions)})"
                )
        weights = [self.dimension_weights.get(name, 1.0) for name in expert.dimensions]
        positive = [weight for weight in weights if weight > 0]
        if weights and not positive:
            raise CorpusError(f"every dimension of {expert.name!r} has the weight 0; leave one above 0")
        if positive and max(positive) / WEIGHT_SPAN > min(positive):
            raise UserError(
                f"the weights of the dimensions go from {min(positive):g} to {max(positive):g}, more than "
                f"{WEIGHT_SPAN:,.0f} times as much; bring them closer, or give 0 to what is not to count"
            )

    def settings(self, rule: str, family: Family, *, edited: bool = False) -> RefitSettings:
        """Return how the last projections of a family make good for what a rule removes.

        What a user edited by hand stays as it is.

        Raises:
            PlanError: the family has no use for the refit target.
        """
        from cusprun.pruning.dense_stream import check_target
        from cusprun.pruning.refit import RefitSettings
        from cusprun.pruning.rules import rule_entry

        entry = rule_entry(rule)
        mode = entry.compensation if self.refit else "none"
        target = self.refit_target or DEFAULT_REFIT_TARGET
        if mode == "refit":
            check_target(target, family)
        return RefitSettings(
            mode=mode,
            weights=self.dimension_weights,
            revise=entry.revised and not edited,
            target=target,
        )

    def check_family(self, family: Family, rule: str) -> None:
        """Raise ``PlanError`` when a family has no place for what a rule adds, or no use for the target."""
        from cusprun.pruning.biases import bias_flags

        if self.settings(rule, family).mode == "bias":
            bias_flags(family, rule)
            if self.refit_target not in (None, "output"):
                raise PlanError(
                    f"the rule {rule!r} adds biases and has no least squares to aim at "
                    f"{self.refit_target!r}; take the target 'output', or another rule"
                )

    def _refuse_conflicts(self) -> None:
        given = list(self._given())
        if self.plan is not None and given:
            raise UserError(
                "a plan brings its own budget, rule, targets and units and needs no scores; leave out "
                f"{' and '.join(given)}, or leave out the plan"
            )
        whole_only = [name for name in given if name not in ("ratio", "rule")]
        whole_only += ["plan"] if self.plan is not None else []
        whole_only += ["weights"] if self.dimension_weights else []
        whole_only += ["the refit target"] if self.refit_target is not None else []
        whole_only += ["the shard size"] if self.shard_bytes is not None else []
        if self.granularity == "neuron" and whole_only:
            raise UserError(
                "single neurons are zeroed in place, in a ratio and by a rule alone; leave out "
                f"{' and '.join(whole_only)}, or prune whole units"
            )
        if self.dimension_weights and not self.refit:
            raise UserError("weights of dimensions weigh the refit; leave them out, or refit")
        if self.refit_target is not None and not self.refit:
            raise UserError(
                f"the target {self.refit_target!r} is what the refit aims at; leave it out, or refit"
            )

    def _given(self) -> Iterator[str]:
        """Name the wishes that a plan answers already."""
        values: Mapping[str, object] = {
            **{name: getattr(self, name) for name in BUDGETS},
            "rule": self.rule,
            "targets": self.targets or None,
            "units": self.units or None,
            "scores": self.stores or None,
        }
        yield from (name for name, value in values.items() if value is not None)
