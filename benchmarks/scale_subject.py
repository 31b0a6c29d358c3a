"""What the commands of several tables are given: a model and an expert, real ones or random ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experts import SMOLLM2
from scale_model import Config, expert_file, model_folder, random_model
from scale_parts import DEMO_EXPERT

from cusprun.resolve import resolve


@dataclass(frozen=True)
class Subject:
    """A model, real unless it has a config, and the budget of memory that it is pruned in.

    A random model has random documents, so many of so many tokens, and no quality to lose.
    """

    title: str
    config: Config | None = None
    documents: int = 60
    tokens: int = 200
    memory: str | None = None

    def opened(self, name: str, scratch: Path) -> tuple[Path, Path]:
        """Return the model's folder and the expert's file."""
        if self.config is None:
            return resolve(SMOLLM2.source).path, DEMO_EXPERT
        expert = expert_file(scratch / name / "corpus", self.documents, self.tokens)
        return random_model(model_folder(scratch, name, self.config), self.config), expert
