"""The export formats as data; a format's module is imported only when the format is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from cusprun.errors import ExportError, UserError, require_known


@dataclass(frozen=True)
class Format:
    """One export format: the module that writes it, its precisions, and what its artifacts are called.

    The module has ``Options`` (a frozen dataclass, every field with a default), ``check``, ``export``,
    ``quant_of`` and ``locate``; the properties below say what each does. ``calibrated`` are the precisions
    that an importance of input features makes better.
    """

    module: str
    quants: tuple[str, ...]
    default_quant: str
    suffix: str
    calibrated: frozenset[str] = frozenset()

    @property
    def check(self) -> Callable[..., tuple[str, ...]]:
        """``check(index, quant, options=None)``: what will be lost; raises when it cannot be done."""
        return cast("Callable[..., tuple[str, ...]]", self._named("check"))

    @property
    def export(self) -> Callable[..., Path]:
        """``export(folder, out, *, quant, options, importance, progress)``: write and return the artifact."""
        return cast("Callable[..., Path]", self._named("export"))

    @property
    def quant_of(self) -> Callable[[Path], str | None]:
        """``quant_of(path)``: the precision of an artifact, None when it is of another format."""
        return cast("Callable[[Path], str | None]", self._named("quant_of"))

    @property
    def locate(self) -> Callable[[Path, Path, str], str | None]:
        """``locate(folder, artifact, quant)``: a sentence about the first tensor that differs too much."""
        return cast("Callable[[Path, Path, str], str | None]", self._named("locate"))

    def options(self, given: Mapping[str, Any]) -> Any:
        """Return the format's options; raises ``ExportError`` for one that it does not have."""
        if not isinstance(given, Mapping):
            raise ExportError(f"options must be a mapping of names to values, not {given!r:.60}")
        for name in given:
            self._require_option(name)
        return self._named("Options")(**given)

    def parse_options(self, texts: Sequence[str]) -> Mapping[str, Any]:
        """Return options written as ``NAME=VALUE``, for :meth:`options`; a name of texts may come again.

        Raises:
            ExportError: a text has no ``=``, names no option, or its value is of another type.
        """
        defaults = {field.name: field.default for field in self.option_fields()}
        found: dict[str, Any] = {}
        for text in texts:
            name, equals, value = text.partition("=")
            if not equals:
                raise ExportError(f"the option {text!r} has no value; write NAME=VALUE")
            self._require_option(name)
            default = defaults[name]
            if isinstance(default, tuple):
                found[name] = (*found.get(name, ()), value)
            else:
                found[name] = _value(name, value, int if default is None else type(default))
        return found

    def _require_option(self, name: str) -> None:
        known = [field.name for field in self.option_fields()]
        require_known(name, known, f"option of {self.suffix.lstrip('.-')} exports", ExportError)

    def option_fields(self) -> tuple[Field[Any], ...]:
        """Return the fields of the format's ``Options``: an int, None for one, a text, a bool, or texts."""
        return fields(self._named("Options"))

    def _named(self, name: str) -> Any:
        return getattr(import_module(self.module), name)


_BOOLEANS = {"true": True, "false": False}


def _value(name: str, text: str, kind: type) -> Any:
    try:
        return _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number"}.get(kind, f"a {kind.__name__}")
        raise ExportError(f"the option {name} must be {wanted}, not {text!r}") from None


_K_QUANTS = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k",
)  # fmt: skip
_BLOCK_QUANTS = ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs")

FORMATS: Mapping[str, Format] = {
    "gguf": Format(
        "exporters.gguf",
        ("f32", "f16", "bf16", "q8_0", *_K_QUANTS, *_BLOCK_QUANTS),
        "f16",
        ".gguf",
        frozenset((*_K_QUANTS, *_BLOCK_QUANTS)),
    ),
    "onnx": Format("exporters.onnx", ("fp32", "fp16", "int8", "int4"), "int4", "-onnx"),
    "vllm": Format(
        "exporters.vllm",
        ("float32", "float16", "bfloat16", "fp8", "int8", "int4"),
        "bfloat16",
        "-vllm",
        frozenset({"int4"}),
    ),
}


def format_of(name: str) -> Format:
    """Return the format called ``name``; raises ``UserError`` with the nearest known one otherwise."""
    require_known(name, FORMATS, "export format", UserError)
    return FORMATS[name]


def kinds_of(artifact: Path) -> Iterator[tuple[str, str]]:
    """Yield the format and the precision of an artifact, for each format that knows it."""
    for name, entry in FORMATS.items():
        quant = entry.quant_of(artifact)
        if quant is not None:
            yield name, quant
