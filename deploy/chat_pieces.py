"""The pieces of a chat template, found by rendering it: what stands before and after each role's texts.

A template that puts every message between two fixed texts, as nearly all do, is found out by a handful of
conversations whose texts occur nowhere else. Others are refused; the proof is elsewhere (``deploy.ollama``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from cusprun.errors import ExportError, ModelError
from cusprun.records import Message
from deploy.facts import Facts
from serve.runtimes.chat_template import render_template

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_S, _U, _V, _A = "zqSYSTEMqz", "zqFIRSTqz", "zqSECONDqz", "zqANSWERqz"
_DATES = (datetime(2001, 2, 3), datetime(2004, 5, 6))


class InexpressibleError(ExportError):
    """A chat template cannot be said in another template language."""


@dataclass(frozen=True)
class Pieces:
    """Fixed texts of a chat.

    A chat without a system text begins with ``head``, one with it with ``system_head``, that text and
    ``system_tail``. Then come the other messages, each between the prefix and suffix of its role, and
    ``generation``, after which the model answers. Where ``opens_user``, head and tail have the prefix of the
    first user's message in them already. ``system_head`` None: no system text is taken.
    """

    head: str
    system_head: str | None
    system_tail: str
    opens_user: bool
    user_prefix: str
    user_suffix: str
    assistant_prefix: str
    assistant_suffix: str
    generation: str


def renderer(facts: Facts) -> Callable[..., str]:
    """Return ``render(turns, generation=True)`` of a model's own chat template, BOS left out where the engine
    adds it; ``turns`` are pairs of role and text.

    Raises:
        InexpressibleError: there is no template, or it writes the date.
    """
    template = facts.chat_template
    if not template:
        raise InexpressibleError("the model has no chat template; export one that has, to chat with it")
    bos, eos = facts.bos_token or "", facts.eos_token or ""

    def render(turns: Sequence[tuple[str, str]], generation: bool = True) -> str:
        text = rendered(turns, generation)
        if not generation and text.endswith(eos) and not rendered(turns, True).startswith(text):
            return text.removesuffix(eos)  # as Phi-3 ends a text after which nobody is to answer
        return text

    def rendered(turns: Sequence[tuple[str, str]], generation: bool) -> str:
        messages = [Message(role, text) for role, text in turns]
        first, second = (
            render_template(
                template,
                messages,
                bos,
                eos,
                add_generation_prompt=generation,
                clock=partial(_same, date),
            )
            for date in _DATES
        )
        if first != second:
            raise InexpressibleError(
                "the chat template writes the date of the day, which cannot be said there"
            )
        return first.removeprefix(bos) if facts.adds_bos else first

    return render


def _same(date: datetime) -> datetime:
    return date


def find_pieces(render: Callable[..., str]) -> Pieces:
    """Return the pieces of a template.

    Raises:
        InexpressibleError: it is not made of such pieces; the text says what was found instead.
    """
    short = [(USER, _U)]
    talk = [*short, (ASSISTANT, _A), (USER, _V)]
    first, user_suffix = _cut(render(short, generation=False), _U)
    _, end = _cut(render(short), _U)
    generation = _without(end, user_suffix, "the text after a user's message")
    _, between, user_again, _ = _cut(render(talk), _U, _A, _V)
    _, _, assistant_suffix = _cut(render(talk[:2], generation=False), _U, _A)
    assistant_prefix = _without(between, user_suffix, "the text between question and answer")
    user_prefix = _without(user_again, assistant_suffix, "the text between answer and question")
    system = _system(render, short)
    opens_user = not first.endswith(user_prefix) or (
        system is not None and not system[1].endswith(user_prefix)
    )
    if not opens_user:
        first = first.removesuffix(user_prefix)
        system = None if system is None else (system[0], system[1].removesuffix(user_prefix))
    return Pieces(
        head=first,
        system_head=None if system is None else system[0],
        system_tail="" if system is None else system[1],
        opens_user=opens_user,
        user_prefix=user_prefix,
        user_suffix=user_suffix,
        assistant_prefix=assistant_prefix,
        assistant_suffix=assistant_suffix,
        generation=generation,
    )


def _system(render: Callable[..., str], short: list[tuple[str, str]]) -> tuple[str, str] | None:
    """Return what stands around a system text at the beginning, None where the template refuses one."""
    try:
        text = render([(SYSTEM, _S), *short], generation=False)
    except ModelError:
        return None
    head, tail, _ = _cut(text, _S, _U)
    return head, tail


def _cut(text: str, *marks: str) -> list[str]:
    """Return the texts around marks that stand in ``text`` once each, in order."""
    pieces, rest = [], text
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise InexpressibleError(
                "the chat template does not write every message once and in order, or changes its text"
            )
        pieces.append(before)
    return [*pieces, rest]


def _without(text: str, start: str, what: str) -> str:
    if not text.startswith(start):
        raise InexpressibleError(f"in the chat template, {what} depends on what follows: {text!r:.80}")
    return text.removeprefix(start)
