"""Answers side by side: against stock transformers, only from documents that were held out, in every form."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "exporters"))

from tiny_exports import TinyConfig, make_folder

from cusprun.corpus import build_corpora, load_expert
from cusprun.errors import ConfigError
from cusprun.pipeline.samples import MAX_NEW_TOKENS, SampleReport, sample_answers
from cusprun.recipe import load_recipe
from cusprun.records import Corpora, Expert

EXPERT = """\
name: tiny
language: {sources: [{path: texts.jsonl}]}
task: {sources: [{path: chats.jsonl}]}
held_out: 0.4
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        side: make_folder(
            root / side, TinyConfig("llama", {"tie_word_embeddings": True, "intermediate_size": width})
        )
        for side, width in (("before", 96), ("after", 64))
    }


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Expert:
    folder = tmp_path_factory.mktemp("expert")
    texts = [{"text": f"the quick brown fox number {n} jumps over {n + 3} lazy dogs"} for n in range(12)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"How many are {n} and {n}?"},
                {"role": "assistant", "content": f"Answer: {2 * n}."},
            ]
        }
        for n in range(12)
    ]
    for name, rows in (("texts", texts), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "expert.yaml").write_text(EXPERT)
    return load_expert(folder / "expert.yaml")


def answered(models: dict[str, Path], expert: Expert, count: int) -> tuple[SampleReport, Corpora]:
    corpora = build_corpora(expert, models["before"])
    sides = {side: (path, "torch") for side, path in models.items()}
    return sample_answers(sides, models["before"], expert, corpora, count), corpora


def stock_answer(folder: Path, prompt: str) -> str:
    """The greedy answer by transformers' own generation loop."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        output = model.generate(ids, do_sample=False, max_new_tokens=64, use_cache=False)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_answers_are_those_of_stock_transformers(models: dict[str, Path], expert: Expert) -> None:
    report, _ = answered(models, expert, 1)
    (sample,) = report.answers
    assert sample.dimension == "task"
    assert sample.prompt.startswith("How many are")
    number = int(sample.prompt.split()[3])
    assert sample.reference == f"Answer: {2 * number}."
    assert sample.before == stock_answer(models["before"], sample.prompt)
    assert sample.after == stock_answer(models["after"], sample.prompt)
    assert sample.max_new_tokens == MAX_NEW_TOKENS == 64


def test_only_held_out_documents_are_asked_and_dimensions_take_turns(
    models: dict[str, Path], expert: Expert
) -> None:
    report, corpora = answered(models, expert, 3)
    assert [sample.dimension for sample in report.answers] == ["task", "language", "task"]
    tokenizer = AutoTokenizer.from_pretrained(models["before"])
    seen = [tokenizer.decode(document.token_ids) for document in corpora.calibration]
    unseen = [tokenizer.decode(document.token_ids) for document in corpora.held_out]
    for sample in report.answers:
        asked = sample.prompt if sample.dimension == "task" else sample.prompt + sample.reference
        assert any(asked.strip() in text for text in unseen)
        assert not any(asked.strip() in text for text in seen)


def test_more_prompts_than_documents(models: dict[str, Path], expert: Expert) -> None:
    corpora = build_corpora(expert, models["before"])
    few = Corpora(corpora.calibration, corpora.held_out[:1])
    sides = {side: (path, "torch") for side, path in models.items()}
    assert len(sample_answers(sides, models["before"], expert, few, 3).answers) == 1


def test_no_chat_template(models: dict[str, Path], expert: Expert, tmp_path: Path) -> None:
    import shutil

    bare = {side: Path(shutil.copytree(path, tmp_path / side)) for side, path in models.items()}
    for folder in bare.values():
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        settings = folder / "tokenizer_config.json"
        plain = json.loads(settings.read_text())
        plain.pop("chat_template", None)
        settings.write_text(json.dumps(plain))
    report, _ = answered(bare, expert, 2)
    assert [sample.dimension for sample in report.answers] == ["task", "language"]


def test_gguf_and_folder_answer_the_same(models: dict[str, Path], expert: Expert, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from cusprun.pipeline.artifacts import export

    files = {
        side: export(path, tmp_path / f"{side}.gguf", to="gguf", quant="f32", verify=False)
        for side, path in models.items()
    }
    corpora = build_corpora(expert, models["before"])
    ggufs = {side: (Path(path), "gguf") for side, path in files.items()}
    by_llama_cpp = sample_answers(ggufs, models["before"], expert, corpora, 2)
    by_torch, _ = answered(models, expert, 2)
    assert by_llama_cpp.answers == by_torch.answers
    assert "llama" in by_llama_cpp.runtime


@pytest.mark.parametrize(("value", "count"), [("0", 0), ("3", 3), (None, 2)])
def test_recipes_say_how_many(tmp_path: Path, value: str | None, count: int) -> None:
    asked = "" if value is None else f"samples: {value}\n"
    (tmp_path / "r.yaml").write_text(f"model: m\nexpert: e.yaml\nout: o\nbench: false\n{asked}")
    assert load_recipe(tmp_path / "r.yaml").samples == count


@pytest.mark.parametrize("value", ["4", "-1", "many"])
def test_recipes_with_a_wrong_number(tmp_path: Path, value: str) -> None:
    (tmp_path / "r.yaml").write_text(f"model: m\nexpert: e.yaml\nout: o\nbench: false\nsamples: {value}\n")
    with pytest.raises(ConfigError, match=r"r\.yaml:5.*samples"):
        load_recipe(tmp_path / "r.yaml")
