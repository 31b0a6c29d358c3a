"""Which packages serve an artifact, pinned to the versions that are installed.

Serving imports neither torch nor transformers, which cusprun itself asks for: a server is installed from
these alone. The bundle's smoke test, in an environment of its own, tells when one is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from cusprun.errors import MissingDependencyError

FRONT = ("aiohttp", "fastapi", "httptools", "rich", "typer", "uvicorn")
"""What ``cusprun serve`` imports whatever the engine."""

ENGINE_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "llamacpp": ("xllamacpp",),
    "onnx": ("jinja2", "numpy", "onnxruntime-genai", "tokenizers"),
    "vllm": (),
}
"""What each engine needs besides; vLLM comes with an environment or image of its own."""


def versions_of(engine: str) -> Mapping[str, str]:
    """Return the installed versions of the packages that serve with an engine, by name.

    Raises:
        MissingDependencyError: one is not installed.
    """
    found: dict[str, str] = {}
    for name in sorted((*FRONT, *ENGINE_PACKAGES[engine])):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise MissingDependencyError(
                f"{name} is not installed, so that there is no version to deploy; "
                "run: pip install 'cusprun[serve,onnx]'"
            ) from None
    return found
