"""Templates to files: every value is escaped for the language of the file that it goes into."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.errors import UserError
from deploy.facts import Facts

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

MODEL_FOLDER = "model"
"""Where the artifact lies in what a target writes, unless the target says otherwise."""


@dataclass(frozen=True)
class File:
    """One file of a deployment: ``path`` below its folder, with slashes.

    ``content`` is the bytes, or what is copied: a relative path is that of a file of the artifact (a key of
    ``Facts.sha256``), an absolute one any file.
    """

    path: str
    content: bytes | Path
    executable: bool = False


def render(template: str, /, **values: Any) -> str:
    """Return a template of ``deploy/templates`` filled in; a value that is not given is an error.

    Filters: ``shell`` quotes for POSIX shells, ``yaml`` for YAML (and JSON), ``dockerenv`` for ``ENV`` and
    ``LABEL`` values of a Dockerfile, ``systemd`` for words of a unit's ``ExecStart``, ``md`` for Markdown.
    """
    return _environment().get_template(template).render(**values)


def text_file(path: str, template: str, /, *, executable: bool = False, **values: Any) -> File:
    """Return a file made from a template."""
    return File(path, render(template, **values).encode(), executable)


def artifact_files(facts: Facts, under: str = MODEL_FOLDER) -> Iterator[File]:
    """Yield the artifact below the folder ``under``: a file there, a folder's files in one of its name."""
    prefix = f"{under}/{facts.artifact_name}" if facts.artifact_is_folder else under
    for name in sorted(facts.sha256):
        yield File(f"{prefix}/{name}", Path(name))


def artifact_path(facts: Facts, under: str = MODEL_FOLDER) -> str:
    """Return where :func:`artifact_files` puts what ``cusprun serve`` is given."""
    return f"{under}/{facts.artifact_name}"


_QUESTION = "What is 7 x 8?"


def question(facts: Facts) -> tuple[str, str]:
    """Return the route below ``/v1/`` and the JSON of a question that a README asks the model."""
    if facts.chat_template:
        return "chat/completions", json.dumps({"messages": [{"role": "user", "content": _QUESTION}]})
    return "completions", json.dumps({"prompt": _QUESTION, "max_tokens": 32})


@cache
def _environment() -> SandboxedEnvironment:
    from jinja2 import PackageLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    # The files are no HTML: each value goes through the filter of the file's own language.
    environment = SandboxedEnvironment(
        loader=PackageLoader("deploy", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        shell=shell, yaml=yaml_scalar, dockerenv=docker_value, systemd=systemd_value, md=markdown
    )
    return environment


def shell(value: object) -> str:
    """Return a value as one word of a POSIX shell."""
    return shlex.quote(str(value))


def yaml_scalar(value: object) -> str:
    """Return a value as a JSON scalar, which YAML takes as it is; no text becomes a number or a date."""
    return json.dumps(value, ensure_ascii=False)


def docker_value(value: object) -> str:
    r"""Return a value in double quotes for ``ENV`` or ``LABEL``; ``$``, ``"``, ``\`` mean nothing there."""
    text = _one_line(str(value))
    for special in ("\\", '"', "$"):
        text = text.replace(special, f"\\{special}")
    return f'"{text}"'


def systemd_value(value: object) -> str:
    r"""Return a value in double quotes for a unit's ``ExecStart``; ``%`` and ``$`` lose their meaning."""
    text = _one_line(str(value)).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'.replace("%", "%%").replace("$", "$$")


def markdown(value: object) -> str:
    """Return a value as text of a Markdown page, in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~])", r"\\\1", _one_line(str(value)))


def _one_line(text: str) -> str:
    if any(not letter.isprintable() for letter in text):
        raise UserError(f"{text!r} holds characters that cannot be printed; rename it, or give --name")
    return text
