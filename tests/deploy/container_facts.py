"""Facts of artifacts that were never made, for what is written from facts alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from deployable import facts_of

from deploy.facts import Facts, Sizing
from deploy.own_wheel import own_wheel
from deploy.render import File
from deploy.targets import TARGETS, complete_options, load

FORMATS = {"gguf": "llamacpp", "onnx": "onnx", "vllm": "vllm"}
_FILES = {
    "gguf": ("expert.gguf",),
    "onnx": ("genai_config.json", "model.onnx"),
    "vllm": ("config.json", "model.safetensors"),
}
_MIB = 2**20
_WHEEL = cache(own_wheel)

ODD_NAME = 'it\'s $HOME "a" ${b} $(c) #1: ü\\'
"""A printable name with what shells, YAML, Dockerfiles, Compose and Kubernetes give a meaning."""


def make_facts(format_name: str = "gguf", **changes: Any) -> Facts:
    """Return facts of an artifact of a format, some of them changed."""
    names = _FILES[format_name]
    sizing = Sizing(
        context_tokens=2048,
        parallel=2,
        num_threads=3,
        weights_bytes=90 * _MIB,
        cache_bytes=50 * _MIB,
        overhead_bytes=200 * _MIB,
        memory_bytes=340 * _MIB,
        memory_limit_bytes=374 * _MIB,
        source="planned",
    )
    known: dict[str, Any] = {
        "name": "my-expert",
        "model": "my-expert",
        "format": format_name,
        "engine": FORMATS[format_name],
        "artifact_name": names[0] if format_name == "gguf" else "expert-folder",
        "artifact_is_folder": format_name != "gguf",
        "artifact_bytes": 90 * _MIB,
        "sha256": {name: hashlib.sha256(name.encode()).hexdigest() for name in names},
        "cusprun_version": "0.1.0",
        "versions": {} if format_name == "vllm" else {"fastapi": "0.115.0", "xllamacpp": "2026.10.1"},
        "sizing": sizing,
    }
    return facts_of(**{**known, **changes})


def files_of(target: str, facts: Facts, **given: str) -> dict[str, File]:
    """Return what a target writes, by path; options are completed and checked as the command does it."""
    module = load(TARGETS[target])
    options = complete_options(TARGETS[target], given)
    module.check(facts, options)
    with patch("deploy.containers.own_wheel", _WHEEL):
        found = list(module.files(facts, options))
    assert len({file.path for file in found}) == len(found), "a file is written twice"
    return {file.path: file for file in found}


def text_of(files: Mapping[str, File], path: str) -> str:
    content = files[path].content
    assert isinstance(content, bytes)
    return content.decode()


def write(files: Mapping[str, File], folder: Path) -> Path:
    """Write what needs no artifact."""
    for file in files.values():
        if isinstance(file.content, bytes):
            path = folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.content)
            path.chmod(0o755 if file.executable else 0o644)
    return folder
