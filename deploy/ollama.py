"""An Ollama Modelfile: the model, its chat template in Go's language, stops, parameters, licence.

Ollama gives a template the messages of a chat, those of one role after another joined, and ``.System``, all
system texts (ollama/ollama, template/template.go). BOS is added by its runner where the GGUF file says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from cusprun.errors import ModelError, UserError
from deploy.chat_pieces import ASSISTANT, SYSTEM, USER, InexpressibleError, find_pieces, renderer
from deploy.facts import Facts
from deploy.go_template import evaluate, write
from deploy.render import File, text_file

_FENCE = '"""'
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""What Ollama calls the sampling defaults of a model."""

Turns = Sequence[tuple[str, str]]

_TEXTS = (
    ("You are terse.", "What is 7 x 8?", "56", "And 8 x 9?", "72", "Thanks!"),
    ("Antworte auf Deutsch: knapp, höflich.", "Größe?", "Zwölf 📏", "naïve «façade» — 你好", "好", "مرحبا"),
    (
        "Line one.\nLine two.\n\nLine four.",
        "a\n\nb\tc",
        "1. x\n2. y",
        "{{ .Content }} {% raw %}",
        "$i & <b>",
        "</s>",
    ),
    ("Quote \"this\" and 'that' \\n.", '"""', "`code`\n```\nx = {'a': 1}\n```", "#", "-", "{{- end }}"),
)
"""A system text, then question and answer in turns."""


def conversations() -> list[Turns]:
    """Return the conversations of the proof: one, two and three questions, with a system text and without."""
    made: list[Turns] = []
    for system, *texts in _TEXTS:
        turns = [((USER, ASSISTANT)[number % 2], text) for number, text in enumerate(texts)]
        for length in (1, 3, 5):
            made += [turns[:length], [(SYSTEM, system), *turns[:length]]]
    return made


NUM_PROVEN = 10
"""At least so many conversations must come out the same."""


def check(facts: Facts, options: Mapping[str, str | None]) -> None:
    """Raise ``InexpressibleError`` for a chat template that cannot be said in Go's language."""
    chat_template(facts)
    _system(facts, options)


def files(facts: Facts, options: Mapping[str, str | None]) -> Iterator[File]:
    """Yield the Modelfile, the model under a plain name, and the README."""
    template = chat_template(facts)
    file_name = f"{facts.name}.gguf"
    parameters = [("num_ctx", str(facts.sizing.context_tokens))]
    parameters += [
        (name, _number(facts.sampling[key])) for key, name in _PARAMETERS.items() if key in facts.sampling
    ]
    parameters += [("stop", fenced(stop, "stop text")) for stop in facts.stop_strings]
    yield text_file(
        "Modelfile",
        "ollama/Modelfile.j2",
        file_name=file_name,
        template=template,
        parameters=parameters,
        system=_system(facts, options),
        license=None if facts.license is None else fenced(facts.license, "licence"),
    )
    yield text_file("README.md", "ollama/README.md.j2", facts=facts, trims=trims(facts))
    yield File(file_name, Path(facts.artifact_name))


def _number(value: float) -> str:
    """Return a number as Ollama reads one; a whole one has no exponent."""
    return str(int(value)) if value.is_integer() else f"{value:g}"


def chat_template(facts: Facts) -> str:
    """Return the chat template in Go's language, proven to render conversations as the model's own does.

    Raises:
        InexpressibleError: it cannot be said there; the text says why.
    """
    own = renderer(facts)
    template = write(find_pieces(own))
    if _FENCE in template:
        raise InexpressibleError("the chat template holds three quotes, which end a text in a Modelfile")
    proven = 0
    for turns in conversations():
        try:
            wanted = own(turns)
        except ModelError:  # as of a system text, where the template takes none
            continue
        found = said(template, turns)
        if found != wanted:
            raise InexpressibleError(
                f"the chat template cannot be said in Ollama's language: of {len(turns)} messages it makes "
                f"{_difference(wanted, found)}; serve it with cusprun serve or another target"
            )
        proven += 1
    if proven < NUM_PROVEN:
        raise InexpressibleError(
            f"the chat template takes {proven} of the conversations that the proof needs {NUM_PROVEN} of"
        )
    return template


def said(template: str, turns: Turns) -> str:
    """Return what Ollama makes of a conversation with a Go template."""
    system = "\n\n".join(text for role, text in turns if role == SYSTEM)
    messages = [{"Role": role, "Content": text} for role, text in turns]
    return evaluate(template, {"System": system, "Messages": messages})


def trims(facts: Facts) -> bool:
    """Tell whether the model's template takes spaces around a message away, which Go's language cannot."""
    own = renderer(facts)
    return own([(USER, "  x  ")]) == own([(USER, "x")])


def takes_system(own: Callable[..., str]) -> bool:
    """Tell whether the template takes a system text."""
    return find_pieces(own).system_head is not None


def _difference(wanted: str, found: str) -> str:
    same = 0
    while wanted[same : same + 1] == found[same : same + 1] != "":
        same += 1
    start = max(0, same - 10)
    return f"{wanted[start : same + 20]!r} and not {found[start : same + 20]!r}"


def _system(facts: Facts, options: Mapping[str, str | None]) -> str | None:
    text = options.get("system") or facts.system_prompt
    if not text:
        return None
    if not takes_system(renderer(facts)):
        raise UserError("the model's chat template takes no system text; leave out the option system")
    return fenced(text, "system text")


def fenced(text: str, what: str) -> str:
    """Return a text between three quotes; raises ``UserError`` for one that would end there."""
    if _FENCE in text or text.endswith('"'):
        raise UserError(f'the {what} ends with a quote or holds """, which ends it in a Modelfile; change it')
    odd = next((letter for letter in text if not letter.isprintable() and letter not in "\n\t"), None)
    if odd is not None:
        raise UserError(f"the {what} holds {odd!a}, which Ollama drops from a Modelfile; leave it out")
    return f"{_FENCE}{text}{_FENCE}"
