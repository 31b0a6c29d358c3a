"""Turn a general language model into a smaller expert for one language, domain and task.

``import cusprun`` costs nothing: every name below is loaded when it is first used. Paths are ``str`` or
``Path``; a model is a local Hugging Face folder, a hub id, a GGUF file, or ``package:NAME`` for the one GGUF
file inside an installed Python package.

==================  =========================================================================
``import_gguf``     a GGUF file to a Hugging Face folder
``inspect``         parameters, bytes and shapes by part
``score``           a model and an expert to a store of impacts, of units or of single neurons
``plan``            impacts to the shape and the units that survive
``prune``           a model and an expert to a smaller model
``estimate``        what pruning will take of time, memory and disk
``export``          a Hugging Face folder to GGUF, ONNX or a folder for vLLM, proven equal
``verify``          the proof alone, for exports that exist
``evaluate``        perplexity and agreement on held-out documents, and scores on tasks
``bench``           latency, speed, memory and energy of two models side by side
``load_test``       latency, throughput and goodput of endpoints under load
``overlap``         how much the irrelevant sets of languages, domains and tasks share
``sweep``           the size/quality curve of a model and an expert
``serve``           an artifact behind OpenAI's interface, on the engine that suits it
``deploy``          the files that put an artifact on the machine it is for
``run``             a recipe: all of the above in one go
``report``          results to one file that says whether to ship the expert
``doctor``          what is installed and what works here
==================  =========================================================================

Errors are ``cusprun.errors.CusprunError`` and its kinds, each one sentence that says what to do.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cusprun import errors as errors
    from cusprun.diagnosis import doctor as doctor
    from cusprun.pipeline.artifacts import export as export
    from cusprun.pipeline.bench import bench as bench
    from cusprun.pipeline.deploy import deploy as deploy
    from cusprun.pipeline.estimate import estimate as estimate
    from cusprun.pipeline.evaluation import evaluate as evaluate
    from cusprun.pipeline.load_test import load_test as load_test
    from cusprun.pipeline.models import import_gguf as import_gguf
    from cusprun.pipeline.models import inspect as inspect
    from cusprun.pipeline.overlap import overlap as overlap
    from cusprun.pipeline.proof import verify as verify
    from cusprun.pipeline.report import report as report
    from cusprun.pipeline.run import run as run
    from cusprun.pipeline.serving import serve as serve
    from cusprun.pipeline.side_by_side import serve_side_by_side as serve_side_by_side
    from cusprun.pipeline.stages import plan as plan
    from cusprun.pipeline.stages import prune as prune
    from cusprun.pipeline.stages import score as score
    from cusprun.pipeline.sweep import sweep as sweep
    from cusprun.version import __version__ as __version__

_FUNCTIONS = {
    "import_gguf": "cusprun.pipeline.models",
    "inspect": "cusprun.pipeline.models",
    "score": "cusprun.pipeline.stages",
    "plan": "cusprun.pipeline.stages",
    "prune": "cusprun.pipeline.stages",
    "estimate": "cusprun.pipeline.estimate",
    "export": "cusprun.pipeline.artifacts",
    "verify": "cusprun.pipeline.proof",
    "bench": "cusprun.pipeline.bench",
    "load_test": "cusprun.pipeline.load_test",
    "evaluate": "cusprun.pipeline.evaluation",
    "overlap": "cusprun.pipeline.overlap",
    "serve": "cusprun.pipeline.serving",
    "serve_side_by_side": "cusprun.pipeline.side_by_side",
    "sweep": "cusprun.pipeline.sweep",
    "deploy": "cusprun.pipeline.deploy",
    "run": "cusprun.pipeline.run",
    "report": "cusprun.pipeline.report",
    "doctor": "cusprun.diagnosis",
    "__version__": "cusprun.version",
}
"""Public names and the modules they live in."""

__all__ = [
    "__version__",
    "bench",
    "deploy",
    "doctor",
    "errors",
    "estimate",
    "evaluate",
    "export",
    "import_gguf",
    "inspect",
    "load_test",
    "overlap",
    "plan",
    "prune",
    "report",
    "run",
    "score",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("cusprun.errors")
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'cusprun' has no attribute {name!r}")
    found = getattr(import_module(_FUNCTIONS[name]), name)
    setattr(sys.modules[__name__], name, found)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
