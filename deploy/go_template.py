r"""The small part of Go's text/template that a chat needs: written for Ollama, and evaluated to prove it.

Literals are written as quoted strings, so that no space of the text can be trimmed, and ``{{-`` takes the
line breaks between actions away. The language (golang.org/pkg/text/template): ``{{ "text" }}``, fields and
variables; ``if``, ``else if``, ``else``, ``end``; ``range $i, $m := .Messages``, in which the
dot is the message; the functions ``eq``, ``gt``, ``not``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.chat_pieces import Pieces


def quoted(text: str) -> str:
    r"""Return a text as a Go string, as a Modelfile can hold it.

    A quote is written ``\u0022``, so that three never stand together, and what cannot be printed, which
    Ollama's parser drops without a word, as ``\u`` or ``\U`` with its number.
    """
    body = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', "\\u0022")
    return '"' + "".join(letter if letter.isprintable() else _numbered(letter) for letter in body) + '"'


def _numbered(letter: str) -> str:
    code = ord(letter)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def write(pieces: Pieces) -> str:
    """Return a Go template over ``.System`` and ``.Messages`` (each with ``.Role`` and ``.Content``)."""
    branches = []
    if pieces.opens_user:
        lines = _merged_head(pieces)
    else:
        lines, prefix = _head(pieces)
        if prefix is not None:
            branches.append(("system", _around(prefix, pieces.system_tail)))
    prefix = _text(pieces.user_prefix)
    if pieces.opens_user and prefix:
        # The first user's message is the first of all, or comes right after the system text.
        prefix = f"{{{{ if gt $i 1 }}}}{prefix}{{{{ end }}}}"
    branches.append(("user", f"{prefix}{{{{ .Content }}}}{_text(pieces.user_suffix)}"))
    branches.append(("assistant", _around(pieces.assistant_prefix, pieces.assistant_suffix)))
    lines.append("{{- range $i, $m := .Messages }}")
    for number, (role, body) in enumerate(branches):
        keyword = "else if" if number else "if"
        lines.append(f'{{{{- {keyword} eq .Role "{role}" }}}}{body}')
    lines += ["{{- end }}", "{{- end }}"]
    if pieces.generation:
        lines.append(f"{{{{- {quoted(pieces.generation)} }}}}")
    return "\n".join(lines)


def _head(pieces: Pieces) -> tuple[list[str], str | None]:
    """Return what stands before all messages, and the prefix of a system text, which is a message too."""
    always = [f"{{{{- {quoted(pieces.head)} }}}}"] if pieces.head else []
    if pieces.system_head is None:
        return always, None
    if pieces.system_head.startswith(pieces.head):
        return always, pieces.system_head.removeprefix(pieces.head)
    return [f"{{{{- if not .System }}}}{_text(pieces.head)}{{{{ end }}}}"], pieces.system_head


def _merged_head(pieces: Pieces) -> list[str]:
    """Return what stands before the first user's text, of which a system text is a part."""
    head = _text(pieces.head)
    if pieces.system_head is None:
        return [f"{{{{- {quoted(pieces.head)} }}}}"] if head else []
    with_system = f"{_text(pieces.system_head)}{{{{ .System }}}}{_text(pieces.system_tail)}"
    otherwise = [f"{{{{- else }}}}{head}"] if head else []
    return [f"{{{{- if .System }}}}{with_system}", *otherwise, "{{- end }}"]


def _around(prefix: str, suffix: str) -> str:
    return f"{_text(prefix)}{{{{ .Content }}}}{_text(suffix)}"


def _text(text: str) -> str:
    return f"{{{{ {quoted(text)} }}}}" if text else ""


_ACTION = re.compile(r'\{\{(-\s)?\s*((?:"(?:[^"\\]|\\.)*"|[^"}])*?)\s*\}\}', re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\(|\)|[^\s()]+')
_RANGE = re.compile(r"range (\$\w+), (\$\w+) := (\S+)")
_OPENING, _ELSE, _END = ("if", "range"), "else", "end"


@dataclass(frozen=True)
class _Scope:
    """What names mean: the dot, the root ``$`` and variables."""

    dot: Mapping[str, Any]
    root: Mapping[str, Any]
    variables: Mapping[str, Any]


def evaluate(template: str, values: Mapping[str, Any]) -> str:
    """Return what Go makes of a template of this part of the language; ``ValueError`` for anything else."""
    tokens = _tokens(template)
    text, position = _run(tokens, 0, _Scope(values, values, {}), True)
    if position != len(tokens):
        raise ValueError(f"{tokens[position][1]!r} closes nothing")
    return text


def _tokens(template: str) -> list[tuple[bool, str]]:
    """Return texts and actions in order; the bool tells actions."""
    tokens: list[tuple[bool, str]] = []
    position = 0
    for match in _ACTION.finditer(template):
        text = template[position : match.start()]
        tokens.append((False, text.rstrip(" \t\r\n") if match[1] else text))
        tokens.append((True, match[2].strip()))
        position = match.end()
    rest = template[position:]
    if "{{" in rest or any("{{" in text for is_action, text in tokens if not is_action):
        raise ValueError("an action is not closed")
    return [*tokens, (False, rest)]


def _run(tokens: Sequence[tuple[bool, str]], position: int, scope: _Scope, active: bool) -> tuple[str, int]:
    """Run tokens up to an ``else`` or ``end`` that belongs to the caller; return the text and where it is."""
    made: list[str] = []
    while position < len(tokens):
        is_action, body = tokens[position]
        keyword = body.partition(" ")[0] if is_action else ""
        if keyword in (_ELSE, _END):
            return "".join(made), position
        position += 1
        if keyword == "range":
            text, position = _range(tokens, position, body, scope, active)
        elif keyword == "if":
            text, position = _if(tokens, position, body.removeprefix("if "), scope, active)
        elif is_action:
            text = str(_value(body, scope)) if active else ""
        else:
            text = body if active else ""
        made.append(text)
    return "".join(made), position


def _if(
    tokens: Sequence[tuple[bool, str]], position: int, condition: str, scope: _Scope, active: bool
) -> tuple[str, int]:
    holds = active and bool(_value(condition, scope))
    text, position = _run(tokens, position, scope, holds)
    body = tokens[position][1]  # an else or an end: anything else would have been run
    position += 1
    if body == _END:
        return text, position
    still = active and not holds
    following = body.removeprefix(_ELSE).strip()
    if following:
        other, position = _if(tokens, position, following.removeprefix("if "), scope, still)
    else:
        other, position = _run(tokens, position, scope, still)
        position += 1
    return text + other, position


def _range(
    tokens: Sequence[tuple[bool, str]], position: int, body: str, scope: _Scope, active: bool
) -> tuple[str, int]:
    match = _RANGE.fullmatch(body)
    if match is None:
        raise ValueError(f"{body!r} is no range of this part of the language")
    made = []
    _, end = _run(tokens, position, scope, False)
    for index, item in enumerate(_value(match[3], scope) if active else ()):
        inner = _Scope(item, scope.root, {**scope.variables, match[1]: index, match[2]: item})
        made.append(_run(tokens, position, inner, True)[0])
    return "".join(made), end + 1


def _value(body: str, scope: _Scope) -> Any:
    words = _WORD.findall(body)
    if len(words) == 1:
        return _operand(words[0], scope)
    function, *rest = words
    arguments = [_operand(word, scope) for word in rest]
    if function == "eq" and len(arguments) == 2:
        return arguments[0] == arguments[1]
    if function == "gt" and len(arguments) == 2:
        return arguments[0] > arguments[1]
    if function == "not" and len(arguments) == 1:
        return not arguments[0]
    raise ValueError(f"{body!r} is no action of this part of the language")


_ESCAPE = re.compile(r"\\(?:U([0-9a-f]{8})|.)")


def _as_json(match: re.Match[str]) -> str:
    """Return an escape as JSON has it, where ``\\U`` is none; the others mean the same in both."""
    return json.dumps(chr(int(match[1], 16)))[1:-1] if match[1] else match[0]


def _operand(word: str, scope: _Scope) -> Any:
    if word.startswith('"'):
        return json.loads(_ESCAPE.sub(_as_json, word))
    if word.isdecimal():
        return int(word)
    name, _, field = word.partition(".")
    holder = {"": scope.dot, "$": scope.root, **scope.variables}[name]
    return holder[field] if field else holder
