"""Tokens and the whole way from EXPERT.yaml to corpora, with a tiny tokenizer built in code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cusprun.corpus import build_corpora, corpus_hash, load_expert, load_tokenizer, tokenize
from cusprun.corpus.split import split, text_hash
from cusprun.errors import CorpusError, ModelError
from cusprun.progress import Advance
from cusprun.records import Corpora, Document, Expert, Message, Source

BOS, END = "<s>", "<end>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}[{{ m.role }}] {{ m.content }}<end>{% endfor %}"
)
CHAT = Document("task", messages=(Message("user", "Why so?"), Message("assistant", "Because.")))


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A byte-level tokenizer without merges that adds a BOS, as llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([BOS, END, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[BOS, END],
        chat_template=template,
        model_max_length=64,
    )


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def decoded(document: Document, tokenizer: Any, max_tokens: int = 512) -> str:
    (tokens,) = tokenize([document], tokenizer, max_tokens)
    assert tokens.text_hash == text_hash(document)
    return str(tokenizer.decode(tokens.token_ids))


def test_plain_text_gets_the_models_special_tokens(model_dir: Path) -> None:
    assert decoded(Document("language", "Grüße"), load_tokenizer(model_dir)) == f"{BOS}Grüße"


def test_chat_goes_through_the_template_with_one_bos(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    assert decoded(CHAT, tokenizer) == f"{BOS}[user] Why so?{END}[assistant] Because.{END}"
    (tokens,) = tokenize([CHAT], tokenizer, 512)
    messages = [{"role": message.role, "content": message.content} for message in CHAT.messages]
    assert list(tokens.token_ids) == tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokens.token_ids.count(tokenizer.bos_token_id) == 1


def test_chat_without_a_template_is_paragraphs() -> None:
    assert decoded(CHAT, make_tokenizer(None)) == f"{BOS}user: Why so?\n\nassistant: Because."


def test_dates_in_templates_stand_still() -> None:
    template = "{{ date_string or 'today' }}{% for m in messages %} {{ m.content }}{% endfor %}"
    assert decoded(CHAT, make_tokenizer(template)) == "26 Jul 2024 Why so? Because."


def test_cut_and_dropped() -> None:
    documents = [Document("task", "x" * 1000), Document("task", ""), Document("task", "y")]
    long, short = tokenize(documents, make_tokenizer(), 10)
    assert (len(long.token_ids), len(short.token_ids)) == (10, 2)


def test_template_refusal_is_one_sentence() -> None:
    chat = Document("task", messages=(Message("system", "Be brief."), Message("user", "Why?")))
    with pytest.raises(CorpusError, match=r"task corpus with the roles system, user \(no system turn\)"):
        tokenize([chat], make_tokenizer(), 10)


def test_bad_tokenizers(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "empty")
    (model_dir / "tokenizer.json").write_text('{"version":')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(model_dir)


class _Listener:
    def __init__(self) -> None:
        self.done: dict[str, tuple[int, int]] = {}

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "") -> Iterator[Advance]:
        def advance(number: int) -> None:
            self.done[name] = (self.done.get(name, (0, 0))[0] + number, total)

        yield advance


def expert_files(folder: Path) -> Expert:
    rows = [{"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(60)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "general.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in ["Rain.", "Rain.", "Snow.", "What is 3 + 3?\n6"]),
        encoding="utf-8",
    )
    (folder / "EXPERT.yaml").write_text(
        """\
domain:
  sources:
    - {path: sums.jsonl, template: "{question}\\n{answer}"}
    - {path: sums.jsonl, template: "{question}\\n{answer}", limit: 5}
task:
  sources:
    - path: sums.jsonl
      template: [{role: user, content: "{question}"}, {role: assistant, content: "{answer}"}]
general: {sources: [{path: general.jsonl}]}
held_out: 0.3
seed: 1
""",
        encoding="utf-8",
    )
    return load_expert(folder / "EXPERT.yaml")


def test_from_yaml_to_corpora(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expert = expert_files(tmp_path)
    monkeypatch.chdir(model_dir)
    listener = _Listener()
    corpora = build_corpora(expert, model_dir, listener)
    calibration = {item.text_hash for item in corpora.calibration}
    assert len(calibration) * 2 == len(corpora.calibration)
    assert not calibration & {item.text_hash for item in (*corpora.held_out, *corpora.general)}
    assert {item.dimension for item in corpora.held_out} == {"domain", "task"}
    assert {item.dimension for item in corpora.general} == {"general"}
    assert len(calibration) + len({item.text_hash for item in corpora.held_out}) == 60
    assert len(corpora.general) in (2, 3)
    assert corpora == build_corpora(expert, model_dir)
    assert all(done == total > 0 for done, total in listener.done.values())
    assert set(listener.done) == {"reading corpora", "tokenising documents"}


def test_texts_that_differ_only_beyond_the_cut_are_one(tmp_path: Path, model_dir: Path) -> None:
    rows = [{"text": "same beginning " * 3 + str(i)} for i in range(30)]
    source = Source(path=str(tmp_path / "a.jsonl"))
    expert = Expert("x", {"task": (source,)}, max_tokens=20)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(CorpusError, match="all 30 documents of the task corpus of 'x' are the same text in"):
        build_corpora(expert, model_dir)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": "other"}])), "utf-8")
    corpora = build_corpora(expert, model_dir)
    assert len({item.token_ids for item in corpora.calibration}) in (1, 2)
    assert not {item.token_ids for item in corpora.held_out} & {
        item.token_ids for item in corpora.calibration
    }


@pytest.mark.parametrize("other", ["one text", " one\u00a0text\n"])
def test_several_documents_that_are_one_text_are_refused(tmp_path: Path, model_dir: Path, other: str) -> None:
    rows = [{"text": "one text"}, {"text": other}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n', encoding="utf-8")
    same, different = (Source(path=str(tmp_path / f"{name}.jsonl")) for name in "ab")
    with pytest.raises(CorpusError, match="all 2 documents of the task corpus of 'x' are the same text"):
        build_corpora(Expert("x", {"domain": (different,), "task": (same,)}), model_dir)
    one = Expert("x", {"task": (replace(same, limit=1),)})
    assert len(build_corpora(one, model_dir).calibration) == 1


def test_a_document_too_short_to_count_makes_no_double_of_the_other(tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one text"}\n{"text": "x"}\n', encoding="utf-8")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    tokenizer.save_pretrained(model_dir)
    both = (Document("task", "one text"), Document("task", "x"))
    seed = next(seed for seed in range(99) if split(both, 0.2, seed)[0] == both[:1])
    expert = Expert("x", {"task": (Source(path=str(tmp_path / "a.jsonl")),)}, seed=seed)
    assert len(build_corpora(expert, model_dir).calibration) == 1


def test_corpora_that_are_too_small(tmp_path: Path, model_dir: Path) -> None:
    source = Source(path=str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    tokenizer.save_pretrained(model_dir)
    with pytest.raises(
        CorpusError, match=r"task corpus of 'x' \(.*a\.jsonl\) has 2 documents, 1 of them for"
    ):
        build_corpora(Expert("x", {"task": (source,)}), model_dir)


def test_general_that_is_all_calibration(tmp_path: Path, model_dir: Path) -> None:
    source = Source(path=str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(CorpusError, match="general corpus of 'x' has no document"):
        build_corpora(Expert("x", {"task": (source,)}, general=(source,)), model_dir)


def test_corpus_hash_knows_calibration_only(tmp_path: Path, model_dir: Path) -> None:
    corpora = build_corpora(expert_files(tmp_path), model_dir)
    reordered = Corpora(corpora.calibration[::-1], ())
    assert corpus_hash(reordered) == corpus_hash(corpora)
    assert corpus_hash(Corpora(corpora.calibration[1:], ())) != corpus_hash(corpora)
