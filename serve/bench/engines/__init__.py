"""The runtimes that can be measured, by the key that `--runtime` takes; each is imported when opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from cusprun.errors import require_known

if TYPE_CHECKING:
    from serve.bench.worker import Engine


@dataclass(frozen=True)
class EngineKind:
    """A runtime: the class that drives it, and limits of time that suit a small model on two cores.

    ``label`` is for people. A suite begins no further pair after ``time_limit_s``; a run that takes longer
    than ``run_limit_s`` is stopped.
    """

    label: str
    module: str
    class_name: str
    time_limit_s: float
    run_limit_s: float


ENGINES: Mapping[str, EngineKind] = {
    "llamacpp": EngineKind("llama.cpp", "serve.bench.engines.llamacpp", "LlamaCppEngine", 120.0, 300.0),
    "onnx": EngineKind("ONNX Runtime", "serve.bench.engines.onnx", "OnnxEngine", 180.0, 300.0),
    "torch": EngineKind("transformers", "serve.bench.engines.torch", "TorchEngine", 300.0, 600.0),
    "vllm": EngineKind("vLLM", "serve.bench.engines.vllm", "VllmEngine", 1200.0, 900.0),
}


def open_engine(runtime: str) -> Engine:
    """Return an engine that has not loaded a model.

    Raises:
        UserError: there is no such runtime.
        MissingDependencyError: its library is not installed.
    """
    require_known(runtime, ENGINES, "runtime")
    kind = ENGINES[runtime]
    engine: Engine = getattr(import_module(kind.module), kind.class_name)()
    return engine
