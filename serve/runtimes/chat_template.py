"""Jinja chat templates rendered in a sandbox, with what templates of the hub may use."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NoReturn

from cusprun.errors import ModelError, reason_of
from cusprun.records import Message


def render_template(
    source: str,
    messages: Sequence[Message],
    bos_text: str,
    eos_text: str,
    *,
    add_generation_prompt: bool = True,
    clock: Callable[[], datetime] = datetime.now,
) -> str:
    """Return the prompt text of a chat, generation prompt included unless told otherwise.

    Raises:
        ModelError: the template is broken or refuses the messages.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: clock().strftime(form)
    try:
        return environment.from_string(source).render(
            messages=[{"role": message.role, "content": message.content} for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_text,
            eos_token=eos_text,
        )
    except Exception as error:  # a template's own code may raise anything
        raise ModelError(f"the chat template refuses these messages ({reason_of(error)})") from None


def _to_json(value: Any, indent: int | None = None) -> str:
    """``tojson`` without the escaping for HTML, which models have not seen in training."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
