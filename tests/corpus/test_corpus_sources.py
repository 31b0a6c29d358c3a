"""Sources: every kind is read, every bad one is refused in one sentence with its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cusprun.corpus.readers import CHUNK_BYTES, READERS, chunks
from cusprun.corpus.sources import read_source
from cusprun.errors import CorpusError, MissingDependencyError
from cusprun.records import Document, Message, Source

QA = "Question: {question}\nAnswer: {answer}"
CHAT = [{"role": "system", "content": "{hint}"}, {"role": "user", "content": "{question}"}]


def read(path: Path, **options: Any) -> list[Document]:
    return read_source(Source(path=str(path), **options), "task")


def texts(path: Path, **options: Any) -> list[str]:
    return [document.text for document in read(path, **options)]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CorpusError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value).replace(str(path), path.name)


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_short_text_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo.\r\n")
    assert texts(tmp_path / "a.txt") == ["One.\n\nTwo."]
    assert texts(tmp_path / "a.txt", template="Text: {text}") == ["Text: One.\n\nTwo."]


def test_long_text_is_cut_between_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "word " * 60 for i in range(20)]
    (tmp_path / "a.MD").write_text("\n\n".join(paragraphs), encoding="utf-8")
    found = texts(tmp_path / "a.MD")
    assert 4 <= len(found) <= 7
    assert all(text.startswith("Paragraph") for text in found)
    assert "\n\n".join(found).split() == " ".join(paragraphs).split()
    assert texts(tmp_path / "a.MD", limit=2) == found[:2]


@given(st.text(alphabet="ab .\n!。界", max_size=6000))
def test_chunks_lose_nothing_and_fit(text: str) -> None:
    found = chunks(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(len(chunk.encode()) <= CHUNK_BYTES or not set(chunk) & set(" \n。") for chunk in found)


def test_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.md").write_text("# Z")
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "rows.jsonl").write_text("broken")
    assert texts(tmp_path) == ["A", "# Z"]
    (tmp_path / "none").mkdir()
    assert "has no text files" in refusal(tmp_path / "none")


def test_jsonl(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", {"question": "2+2?", "answer": 4}, {"question": "Why?", "answer": None}
    )
    assert texts(path, template=QA) == ["Question: 2+2?\nAnswer: 4", "Question: Why?\nAnswer:"]
    assert texts(path, template="{{{question}}}", limit=1) == ["{2+2?}"]
    path = jsonl(
        tmp_path / "b.jsonl", {"text": "a"}, {"text": " "}, {"text": None}, {"text": "b"}, {"text": "c"}
    )
    path.write_text("\n" + path.read_text())
    assert texts(path, limit=2) == ["a", "b"]


def test_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "Ho"}]
    broken = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]
    path = jsonl(
        tmp_path / "a.jsonl", {"messages": chat, "text": "x"}, {"messages": broken}, {"messages": []}
    )
    assert read(path) == [Document("task", messages=(Message("user", "Hi"), Message("assistant", "Ho")))]
    path = jsonl(tmp_path / "b.jsonl", {"question": "a", "hint": "b"}, {"question": "c", "hint": ""})
    roles = [[message.role for message in document.messages] for document in read(path, template=CHAT)]
    assert roles == [["system", "user"], ["user"]]


@pytest.mark.parametrize(("delimiter", "name"), [(",", "a.csv"), (";", "a.csv"), ("\t", "a.tsv")])
def test_csv(tmp_path: Path, delimiter: str, name: str) -> None:
    lines = ["question| answer", '"Two\nlines"|4', "", '"a|b"|5']
    (tmp_path / name).write_text("\r\n".join(lines).replace("|", delimiter), newline="")
    wanted = ["Question: Two\nlines\nAnswer: 4", f"Question: a{delimiter}b\nAnswer: 5"]
    assert texts(tmp_path / name, template=QA) == wanted


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"question": ["a", "b"], "answer": [1.5, None], "extra": [[1], [2]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", template=QA) == ["Question: a\nAnswer: 1.5", "Question: b\nAnswer:"]
    assert "row 1: the field 'extra' is a list" in refusal(tmp_path / "a.parquet", template="{extra}")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    refusal(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"")
    refusal(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", b"", "has no documents"),
        ("a.txt", b" \n ", "has no documents"),
        ("a.csv", b"", "has no documents"),
        ("a.csv", b"text\n", "has no documents"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "a.jsonl:2 is not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', "a.jsonl:3 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "a.jsonl:2 has half a character"),
        ("a.jsonl", b'{"text": ["a"]}\n', "a.jsonl:1: the field 'text' is not text"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "a.jsonl:1: the field 'messages'"),
        ("a.jsonl", b'{"messages": "hi"}\n', "a.jsonl:1: the field 'messages'"),
        ("a.jsonl", b'{"question": "a"}\n', "a.jsonl:1 has no field 'text' or 'messages' (fields: question)"),
        ("a.txt", b"a\nb\nK\xfcche\n", "a.txt:3 is not UTF-8"),
        ("a.csv", b"text,b\n1,2\n1,2,3\n", "a.csv:3 has 3 cells and the header has 2"),
        ("a.csv", b"text,text\n1,2\n", "a.csv:1 names a column twice"),
        ("a.csv", b"text\n" + b"a" * 200_000, "a.csv:2 is not CSV"),
        ("a.csv", b"text\n\xff\n", "a.csv:2 is not UTF-8"),
        ("a.pdf", b"a", "has the suffix '.pdf', which cannot be read; use one of .txt"),
        ("a", b"a", "has the suffix 'none'"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert part in refusal(tmp_path / name)


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "a.jsonl")
    assert "no corpus file matches" in refusal(tmp_path / "*.jsonl")
    assert all(suffix == suffix.lower() for suffix in READERS)


def test_template_names_a_missing_field(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "a", "answer": "b"}, {"question": "a"})
    assert refusal(path, template="{questoin}") == (
        "a.jsonl:1 has no field 'questoin', which the template names; did you mean 'question'? "
        "(fields: question, answer)"
    )
    assert "a.jsonl:2 has no field 'answer'" in refusal(path, template=QA)


@pytest.mark.parametrize(
    "template", ["{a.b}", "{a[0]}", "{a!r}", "{a:9}", "{", "plain", [{"role": "user"}], [3], 3]
)
def test_bad_templates_are_refused_without_a_yaml_too(tmp_path: Path, template: Any) -> None:
    refusal(jsonl(tmp_path / "a.jsonl", {"a": "b"}), template=template)


def test_a_value_is_never_a_template(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"a": "{b.__class__}", "b": "secret"})
    assert texts(path, template="{a}") == ["{b.__class__}"]


def test_source_of_nothing() -> None:
    with pytest.raises(CorpusError, match="none of path, dataset and pack"):
        read_source(Source(), "task")


def test_dataset_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'cusprun\[datasets\]'"):
        read_source(Source(dataset="openai/gsm8k"), "task")


class _FakeDatasets:
    """Stands in for the library; keeps the arguments and gives rows, or fails."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.called: tuple[Any, ...] = ()

    def load_dataset(self, *names: Any, split: str, streaming: bool) -> Any:
        self.called = (*names, split, streaming)
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _FakeDatasets([{"question": "a", "answer": "b"}] * 3)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    source = Source(dataset="openai/gsm8k", config="main", split="test", template=QA, limit=2)
    assert [document.text for document in read_source(source, "task")] == ["Question: a\nAnswer: b"] * 2
    assert fake.called == ("openai/gsm8k", "main", "test", True)
    assert len(read_source(Source(dataset="x", template=QA), "task")) == 3
    assert fake.called == ("x", None, "train", False)


def test_dataset_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "datasets", _FakeDatasets(ConnectionError("Couldn't reach the Hub\nTrace"))
    )
    with pytest.raises(CorpusError) as caught:
        read_source(Source(dataset="x", config="c"), "task")
    assert str(caught.value) == (
        "dataset x (c), split train cannot be loaded (Couldn't reach the Hub); "
        "check its id, config and split, and the network"
    )


def test_dataset_by_the_real_library(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    jsonl(tmp_path / "train.jsonl", {"text": "a"}, {"text": "b"})
    source = Source(dataset=str(tmp_path), limit=1)
    assert [document.text for document in read_source(source, "task")] == ["a"]
