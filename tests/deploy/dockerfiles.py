"""A reader of Dockerfiles for tests: stages, instructions, and commands in their exec form."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    name: str
    rest: str

    @property
    def words(self) -> list[str] | None:
        """The exec form's words; None for a shell form."""
        text = self.rest.partition("CMD ")[2] if self.name == "HEALTHCHECK" else self.rest
        if not text.lstrip().startswith("["):
            return None
        found = json.loads(text)
        assert all(isinstance(word, str) for word in found)
        return list(found)


@dataclass(frozen=True)
class Stage:
    base: str
    name: str
    instructions: tuple[Instruction, ...]

    def all(self, name: str) -> list[Instruction]:
        return [each for each in self.instructions if each.name == name]

    def last(self, name: str) -> Instruction:
        return self.all(name)[-1]


def read(text: str) -> tuple[list[Instruction], list[Stage]]:
    """Return what stands before the first stage, and the stages."""
    kept = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(kept))
    instructions = [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]
    first = next(i for i, each in enumerate(instructions) if each.name == "FROM")
    stages: list[Stage] = []
    for each in instructions[first:]:
        if each.name == "FROM":
            base, _, name = each.rest.partition(" AS ")
            stages.append(Stage(base, name, ()))
        else:
            last = stages.pop()
            stages.append(Stage(last.base, last.name, (*last.instructions, each)))
    return instructions[:first], stages
