"""onnxruntime-genai, in this process, for ONNX folders."""

from __future__ import annotations

from cusprun.errors import UserError
from serve.engines.protocol import DEFAULT_PARALLEL, EngineSettings, Running


def require() -> None:
    """Raise ``MissingDependencyError`` when onnxruntime-genai is not installed."""
    from serve.runtimes.onnx_genai import require as require_genai

    require_genai()


def start(settings: EngineSettings) -> Running:
    """Load the folder; there are no options but the common ones.

    Raises:
        MissingDependencyError: onnxruntime-genai is not installed.
        UserError: an option was given, or the context is longer than the model's.
        ModelError: the folder cannot be loaded; the text ends with the library's own reason.
    """
    if settings.options:
        raise UserError(
            f"the onnx engine has no option {settings.options[0]!r}; it takes none after --, threads and "
            "context are options of cusprun serve"
        )
    from serve.onnx_server.backend import OnnxBackend
    from serve.onnx_server.model import OnnxModel

    model = OnnxModel(
        settings.artifact, context_tokens=settings.context_tokens, n_threads=settings.num_threads
    )
    backend = OnnxBackend(model, settings.model, settings.parallel or DEFAULT_PARALLEL)
    return Running("onnxruntime-genai", backend, model.context_tokens, backend.stop)
