"""Files to rows: one reader per suffix, each lazy, each naming file and line when a row is bad."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from cusprun.errors import CorpusError

CHUNK_BYTES = 1600
"""The longest piece of a text file that is one document, in bytes of UTF-8.

About 400 tokens in any script (Latin text has about 4 bytes to a token, Chinese 3 bytes to a character),
which fits the default ``max_tokens`` of 512, so that nothing of a long file is cut away.
"""

# From the best place to break a text to the worst.
_BREAKS = tuple(re.compile(p) for p in (r"\n[^\S\n]*\n\s*", r"\n", r"(?<=[.!?…])\s+|(?<=[。！？])", r"\s+"))

_DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Row:
    """One row of a source: its fields by name, and its place (``file:line``) for error texts."""

    place: str
    fields: Mapping[str, Any]


Reader = Callable[[Path], Iterator[Row]]


def decoded_lines(lines: Iterable[bytes], where: str) -> Iterator[str]:
    """Decode UTF-8 lines one by one, with or without a byte order mark.

    Raises:
        CorpusError: a line is not UTF-8; the text has its number.
    """
    encoding = "utf-8-sig"
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode(encoding)
        except UnicodeDecodeError:
            raise CorpusError(f"{where}:{number} is not UTF-8 text; save the file as UTF-8") from None
        encoding = "utf-8"


def json_rows(lines: Iterable[bytes], where: str) -> Iterator[Row]:
    """Parse JSON lines; blank lines are passed over.

    Raises:
        CorpusError: a line is not UTF-8, not JSON, or not an object.
    """
    for number, line in enumerate(decoded_lines(lines, where), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = getattr(error, "msg", "it cannot be parsed")
            raise CorpusError(
                f"{where}:{number} is not JSON ({problem}); mend the line or remove it"
            ) from None
        if not isinstance(fields, dict):
            raise CorpusError(
                f'{where}:{number} is not a JSON object; write one object like {{"text": ...}} a line'
            )
        yield Row(f"{where}:{number}", fields)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        yield from json_rows(lines, str(path))


def _read_text(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        text = "".join(decoded_lines(lines, str(path))).replace("\r\n", "\n").replace("\r", "\n")
    line, counted = 1, 0
    for start, stop in _spans(text, 0, len(text), 0):
        line, counted = line + text.count("\n", counted, start), start
        yield Row(f"{path}:{line}", {"text": text[start:stop]})


def chunks(text: str) -> list[str]:
    """Cut a text into documents of at most ``CHUNK_BYTES``, at the best breaks there are.

    Whole paragraphs are joined as long as they fit; a longer paragraph is broken at its lines, a longer line
    at its sentences, a longer sentence at its words. A word is never broken, so one may be longer.
    """
    return [text[start:stop] for start, stop in _spans(text, 0, len(text), 0)]


def _spans(text: str, start: int, stop: int, level: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the chunks of ``text[start:stop]``, broken at ``_BREAKS[level]`` or worse."""
    if level == len(_BREAKS) or _size(text, start, stop) <= CHUNK_BYTES:
        yield start, stop
        return
    first = start
    end = start
    for piece_start, piece_stop in _pieces(text, start, stop, level):
        if end > first and _size(text, first, piece_stop) > CHUNK_BYTES:
            yield first, end
            first = end = piece_start
        first = piece_start if end == first else first
        if _size(text, piece_start, piece_stop) > CHUNK_BYTES:
            yield from _spans(text, piece_start, piece_stop, level + 1)
            first = end = piece_stop
        else:
            end = piece_stop
    if end > first:
        yield first, end


def _pieces(text: str, start: int, stop: int, level: int) -> Iterator[tuple[int, int]]:
    position = start
    for match in _BREAKS[level].finditer(text, start, stop):
        if match.start() > position:
            yield position, match.start()
        position = match.end()
    if stop > position:
        yield position, stop


def _size(text: str, start: int, stop: int) -> int:
    return (
        len(text[start:stop].encode("utf-8", "surrogatepass"))
        if stop - start <= CHUNK_BYTES
        else stop - start
    )


def _read_csv(path: Path) -> Iterator[Row]:
    """Read CSV with a header; the delimiter is the comma, semicolon or tab that the header has most of."""
    with path.open("rb") as lines:
        texts = decoded_lines(lines, str(path))
        header = next(texts, "")
        reader = csv.reader(chain([header], texts), delimiter=max(_DELIMITERS, key=header.count))
        try:
            names = [name.strip() for name in next(reader, [])]
            if len(set(names)) < len(names):
                raise CorpusError(f"{path}:1 names a column twice; give each column its own name")
            for cells in filter(None, reader):
                place = f"{path}:{reader.line_num}"
                if len(cells) != len(names):
                    raise CorpusError(
                        f"{place} has {len(cells)} cells and the header has {len(names)}; mend the line, "
                        "texts with a delimiter or a line break stand in double quotes"
                    )
                yield Row(place, dict(zip(names, cells, strict=True)))
        except csv.Error as error:
            raise CorpusError(f"{path}:{reader.line_num} is not CSV ({error}); mend the line") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", fields)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # Damaged pages surface as whatever met them first: the reader, a codec, or the text's decoding.
        problem = " ".join(str(error).split()) or type(error).__name__
        raise CorpusError(f"{path} is not a sound Parquet file ({problem}); make it again") from None


TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown")

READERS: Mapping[str, Reader] = {
    **dict.fromkeys(TEXT_SUFFIXES, _read_text),
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""The reader of each suffix, in lower case."""


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, of every file that a pattern like ``notes/*.md`` names, or of every text and
    Markdown file of a folder, in the order of their names.

    A text or Markdown file of at most ``CHUNK_BYTES`` is one row; a longer one is cut by ``chunks``, because
    a whole manual as one document would be cut at ``max_tokens`` and mostly lost, and a paragraph alone is
    often a heading or a line. Other files have one row each line or row. JSONL, CSV and Parquet files in a
    folder are not read, because their fields may need different templates.

    Raises:
        CorpusError: the path is missing, unreadable, of an unknown suffix, or a row in it is bad.
    """
    if not _exists(path):
        yield from _read_pattern(path)
        return
    if path.is_dir():
        yield from _read_folder(path)
        return
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise CorpusError(
            f"{path} has the suffix {path.suffix or 'none'!r}, which cannot be read; "
            f"use one of {', '.join(READERS)}"
        )
    try:
        yield from reader(path)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror or error}); check the file") from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for any file
        return False


def _read_pattern(pattern: Path) -> Iterator[Row]:
    """Read the files that match; the folders that are there are taken by name, whatever signs are in it."""
    base = next(folder for folder in pattern.absolute().parents if _exists(folder))
    try:
        found = sorted(base.glob(str(pattern.absolute().relative_to(base))))
    except (OSError, ValueError):  # too long for a name, or no pattern either
        found = []
    if not found:
        if any(sign in str(pattern.absolute().relative_to(base)) for sign in "*?["):
            raise CorpusError(f"no corpus file matches {pattern!s:.200}; check the path and the pattern")
        raise CorpusError(f"the corpus file {pattern!s:.200} does not exist; check the path")
    for path in found:
        yield from read_file(path)


def _read_folder(folder: Path) -> Iterator[Row]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in TEXT_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise CorpusError(
            f"the folder {folder} has no text files ({', '.join(TEXT_SUFFIXES)}); "
            "name other files one by one, each as a source"
        )
    for path in files:
        yield from read_file(path)
