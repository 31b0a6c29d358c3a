"""Sources to documents: rows from files, datasets and packs, through a template or as they are."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from cusprun.corpus.packs import read_pack
from cusprun.corpus.readers import Row, read_file
from cusprun.corpus.templates import Parts, field_names, parse_template, render, require_fields
from cusprun.errors import CorpusError, MissingDependencyError, nearest, reason_of
from cusprun.records import Document, Message, Source

_DEFAULT_SPLIT = "train"

# JSON can spell half of a surrogate pair, which no tokenizer takes.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")

Maker = Callable[[Row], tuple[str, tuple[Message, ...]]]
"""Makes (text, messages) of a row; both are empty when the row is."""


def read_source(source: Source, dimension: str) -> list[Document]:
    """Read the documents of one source, at most ``source.limit``, in the order of the source.

    A row becomes a document through the template, or by its ``messages`` field (a chat) or its ``text``
    field. Rows that are empty, or chats with an empty turn other than the system's, are passed over. How
    text files become rows is told at ``readers.read_file``. A dataset is streamed when there is a limit, so
    that a few documents of a large one do not download the whole; else it is downloaded and cached.

    Raises:
        CorpusError: the source is missing, empty, unreadable, or has rows that cannot be documents.
        MissingDependencyError: the source is a dataset and the library ``datasets`` is not installed.
    """
    name = source_name(source)
    make = _maker(source, name)
    limit = None if source.limit is None else min(source.limit, sys.maxsize)
    documents = list(islice(_documents(_rows(source, name), make, dimension), limit))
    if not documents:
        raise CorpusError(f"{name} has no documents, or only empty ones; add some text or remove the source")
    return documents


def source_name(source: Source) -> str:
    """Return what error texts call a source."""
    if source.path is not None:
        return source.path
    if source.pack is not None:
        return f"pack {source.pack}"
    config = f" ({source.config})" if source.config else ""
    return f"dataset {source.dataset}{config}, split {source.split or _DEFAULT_SPLIT}"


def _rows(source: Source, name: str) -> Iterator[Row]:
    if source.path is not None:
        return read_file(Path(source.path))
    if source.pack is not None:
        return read_pack(source.pack)
    if source.dataset is not None:
        return _read_dataset(source, name)
    raise CorpusError("a source names none of path, dataset and pack; give it one of them")


def _read_dataset(source: Source, name: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"{name} needs the library 'datasets', which is not installed; "
            "run pip install 'cusprun[datasets]'"
        ) from None
    try:
        rows = datasets.load_dataset(
            source.dataset,
            source.config,
            split=source.split or _DEFAULT_SPLIT,
            streaming=source.limit is not None,
        )
        for number, fields in enumerate(rows, 1):
            yield Row(f"{name}, row {number}", fields)
    except Exception as error:  # its library raises what its many back ends raise, with no common base
        problem = reason_of(error)
        raise CorpusError(
            f"{name} cannot be loaded ({problem.rstrip('.')}); "
            "check its id, config and split, and the network"
        ) from None


def _documents(rows: Iterator[Row], make: Maker, dimension: str) -> Iterator[Document]:
    for row in rows:
        text, messages = make(row)
        if any(map(_HALF_CHARACTER.search, (text, *(message.content for message in messages)))):
            raise CorpusError(f"{row.place} has half a character (a lone surrogate); mend or remove it")
        if text or messages:
            yield Document(dimension, text, messages)


def _maker(source: Source, name: str) -> Maker:
    template = source.template
    if template is None:
        return _as_it_is
    try:
        if isinstance(template, str):
            parts = parse_template(template)
            require_fields([parts])
            return lambda row: (_filled(parts, row).strip(), ())
        roles = [(str(item["role"]), parse_template(item["content"])) for item in template]
        require_fields(parts for _, parts in roles)
    except (ValueError, TypeError, KeyError) as error:
        problem = error if isinstance(error, ValueError) else "a message needs the keys 'role' and 'content'"
        raise CorpusError(f"{name}: {problem}") from None
    return lambda row: ("", _chat([Message(role, _filled(parts, row)) for role, parts in roles]))


def _filled(parts: Parts, row: Row) -> str:
    try:
        return render(parts, row.fields)
    except KeyError:
        missing = next(name for name in field_names(parts) if name not in row.fields)
        raise CorpusError(
            f"{row.place} has no field {missing!r}, which the template names"
            f"{nearest(missing, row.fields)} (fields: {', '.join(row.fields)})"
        ) from None
    except TypeError as error:
        raise CorpusError(
            f"{row.place}: the field {str(error)!r} is a list or an object, and a template shows only "
            "texts and numbers; flatten it or use another field"
        ) from None


def _as_it_is(row: Row) -> tuple[str, tuple[Message, ...]]:
    if row.fields.get("messages") is not None:
        return "", _chat(_messages(row, row.fields["messages"]))
    if "text" not in row.fields:
        raise CorpusError(
            f"{row.place} has no field 'text' or 'messages' (fields: {', '.join(row.fields) or 'none'}); "
            "add a template that names its fields"
        )
    text = row.fields["text"]
    if text is not None and not isinstance(text, str):
        raise CorpusError(
            f"{row.place}: the field 'text' is not text but {text!r:.40}; mend it or use a template"
        )
    return (text or "").strip(), ()


def _messages(row: Row, value: Any) -> list[Message]:
    sound = isinstance(value, list) and all(
        isinstance(item, Mapping)
        and isinstance(item.get("role"), str)
        and isinstance(item.get("content"), str)
        for item in value
    )
    if not sound:
        raise CorpusError(
            f"{row.place}: the field 'messages' is not a list of messages with the texts 'role' and "
            "'content'; mend it or use a template"
        )
    return [Message(item["role"], item["content"]) for item in value]


def _chat(messages: list[Message]) -> tuple[Message, ...]:
    """Strip the turns; leave an empty system turn out; a chat with another empty turn is empty."""
    stripped = [Message(message.role, message.content.strip()) for message in messages]
    kept = [message for message in stripped if message.content or message.role != "system"]
    only_system = all(message.role == "system" for message in kept)
    return () if only_system or not all(message.content for message in kept) else tuple(kept)
