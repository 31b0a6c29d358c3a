"""The export formats as data; a format's module is imported only when the format is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from cusprun.errors import UserError, require_known


@dataclass(frozen=True)
class Format:
    """One export format: where its two functions live, and what its files are called."""

    module: str
    check_name: str
    export_name: str
    quants: tuple[str, ...]
    suffix: str

    @property
    def check(self) -> Callable[[Any, str], tuple[str, ...]]:
        """``check(model, quant)``: what will be lost; raises when the export cannot be done."""
        found: Callable[[Any, str], tuple[str, ...]] = getattr(import_module(self.module), self.check_name)
        return found

    @property
    def export(self) -> Callable[..., Path]:
        """``export(folder, out, *, quant, progress)``: write the artifact and return its path."""
        found: Callable[..., Path] = getattr(import_module(self.module), self.export_name)
        return found


FORMATS: Mapping[str, Format] = {
    "gguf": Format("exporters.gguf", "check", "export_gguf", ("f32", "f16", "bf16", "q8_0"), ".gguf"),
}


def format_of(name: str) -> Format:
    """Return the format called ``name``; raises ``UserError`` with the nearest known one otherwise."""
    require_known(name, FORMATS, "export format", UserError)
    return FORMATS[name]
