"""Templates over the fields of a row: text with ``{field}`` placeholders, or a list of such messages.

Only plain names stand between braces, no attributes, indices, conversions or format specifications, so that
a template can show fields and do nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date, time
from decimal import Decimal
from string import Formatter
from types import NoneType
from typing import Any

ROLES = ("system", "user", "assistant")
"""The roles that a message template may name."""

Parts = tuple[tuple[str, str | None], ...]
"""A parsed template: literal text, each with the name of the field that follows it, if any."""


_SHOWN = (str, int, float, Decimal, date, time, NoneType)


def parse_template(text: str) -> Parts:
    """Parse a text template.

    Raises:
        ValueError: a brace stands alone, or something else than a plain name stands between braces; the
            text says which, without the place.
    """
    try:
        parsed = list(Formatter().parse(text))
    except ValueError:
        raise ValueError(
            "a single brace stands alone in the template; write '{{' or '}}' for a brace"
        ) from None
    for _, name, spec, conversion in parsed:
        if name is None:
            continue
        if not name.strip():
            raise ValueError("a placeholder of the template is empty; name a field, like '{question}'")
        if spec or conversion or any(mark in name for mark in ".[]{}!:"):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(
                f"the placeholder '{{{shown}}}' is not a plain field name; name the field alone, "
                "or write '{{' and '}}' for braces"
            )
    return tuple((literal, name) for literal, name, _, _ in parsed)


def field_names(parts: Parts) -> tuple[str, ...]:
    """Return the fields that a template shows."""
    return tuple(name for _, name in parts if name is not None)


def require_fields(templates: Iterable[Parts]) -> None:
    """Raise ``ValueError`` when the templates of one source show no field at all."""
    if not any(field_names(parts) for parts in templates):
        raise ValueError(
            "the template shows no field, so every document would be the same; add one, like '{text}'"
        )


def render(parts: Parts, fields: Mapping[str, Any]) -> str:
    """Fill in a template; an absent value (``None``) is shown as nothing.

    Raises:
        KeyError: a field is not there.
        TypeError: a field holds something else than text, a number or a date; the argument is its name.
    """
    texts = []
    for literal, name in parts:
        texts.append(literal)
        if name is not None:
            value = fields[name]
            if not isinstance(value, _SHOWN):
                raise TypeError(name)
            texts.append("" if value is None else str(value))
    return "".join(texts)
