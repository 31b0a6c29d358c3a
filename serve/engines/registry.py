"""The engines as data; an engine's module is imported only when the engine is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import cast

from cusprun.errors import MissingDependencyError, UserError, require_known
from serve.engines.protocol import EngineModule


@dataclass(frozen=True)
class Engine:
    """One engine: its module, the kinds of artifacts it serves, and whether a draft model may speed it up."""

    module: str
    kinds: frozenset[str]
    drafts: bool = False

    def load(self) -> EngineModule:
        """Import the module."""
        return cast("EngineModule", import_module(self.module))


ENGINES: Mapping[str, Engine] = {
    "vllm": Engine("serve.engines.vllm", frozenset({"folder"}), drafts=True),
    "llamacpp": Engine("serve.engines.llamacpp", frozenset({"gguf"}), drafts=True),
    "transformers": Engine("serve.engines.transformers", frozenset({"folder"})),
    "onnx": Engine("serve.engines.onnx", frozenset({"onnx"})),
}
"""Every engine; of several that serve a kind, the earlier is the better."""


def choose(kind: str, wanted: str | None = None) -> str:
    """Return the engine for a kind of artifact: ``wanted``, or the best one that is installed.

    Raises:
        UserError: the engine is unknown or serves other kinds.
        MissingDependencyError: no engine for the kind is installed; the text says how to add the best one.
    """
    if wanted is not None:
        require_known(wanted, ENGINES, "engine", UserError)
        if kind not in ENGINES[wanted].kinds:
            fitting = ", ".join(name for name, engine in ENGINES.items() if kind in engine.kinds)
            raise UserError(f"the engine {wanted!r} serves no {kind} artifacts; use: {fitting}")
        ENGINES[wanted].load().require()
        return wanted
    missing: list[str] = []
    for name, engine in ENGINES.items():
        if kind in engine.kinds:
            try:
                engine.load().require()
            except MissingDependencyError as error:
                missing.append(str(error))
            else:
                return name
    raise MissingDependencyError(missing[0])
