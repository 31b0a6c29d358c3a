"""The packs that ship: complete, well formed, and worth calibrating on."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import cusprun
from cusprun.corpus.packs import pack_names, read_pack
from cusprun.corpus.sources import read_source
from cusprun.corpus.split import text_hash
from cusprun.errors import CorpusError
from cusprun.records import Source

EXPECTED = {
    f"{kind}{dash}{language}"
    for kind, dash in (
        ("lang", "/"),
        ("general", "/"),
        ("domain/maths", "-"),
        ("domain/linux", "-"),
        ("task/worked-answers", "-"),
        ("task/passage-qa", "-"),
        ("task/summarise", "-"),
    )
    for language in ("en", "de")
}


def test_every_pack_is_there() -> None:
    assert set(pack_names()) >= EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_pack_quality(name: str) -> None:
    rows = list(read_pack(name))
    assert len(rows) >= 40
    for row in rows:
        assert set(row.fields) in ({"text"}, {"messages"}), row.place
        messages = row.fields.get("messages", [])
        assert {role for message in messages for role in message} <= {"role", "content"}, row.place
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2), row.place
        words = " ".join([row.fields.get("text", ""), *(message["content"] for message in messages)]).split()
        assert 80 <= len(words) <= 300, f"{row.place} has {len(words)} words"
    documents = read_source(Source(pack=name), "task")
    assert len(documents) == len(rows)
    twice = [key for key, number in Counter(map(text_hash, documents)).items() if number > 1]
    assert not twice


def test_task_packs_are_mostly_chats() -> None:
    for name in EXPECTED:
        chats = ["messages" in row.fields for row in read_pack(name)]
        assert not name.startswith("task/") or sum(chats) > len(chats) / 2, name


def test_unknown_pack_names_the_nearest() -> None:
    with pytest.raises(CorpusError, match="did you mean 'lang/en'"):
        read_pack("lang/eng")
    with pytest.raises(CorpusError, match="unknown pack"):
        read_pack("../../secret")


def test_packs_are_read_from_a_zip_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    root = Path(cusprun.__file__).parent
    archive = tmp_path / "cusprun.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in [*root.glob("*.py"), *root.glob("corpus/*.py"), *root.glob("corpus/packs/*/*.jsonl")]:
            file.write(path, Path("cusprun") / path.relative_to(root))
    code = (
        f"import sys, json; sys.path.insert(0, {str(archive)!r}); import cusprun.corpus as c; "
        "print(json.dumps([c.__file__, c.pack_names(), len(list(c.read_pack('lang/en'))), "
        "[m for m in ('torch', 'transformers', 'yaml', 'pyarrow', 'datasets') if m in sys.modules]]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    place, names, number, heavy = json.loads(result.stdout)
    assert place.startswith(str(archive))
    assert set(names) >= EXPECTED
    assert number >= 40
    assert heavy == []
