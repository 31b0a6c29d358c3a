"""The gate lets equal models pass and catches faults planted in an artifact."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_exports import TinyConfig, documents, make_folder

from cusprun.codec import load_json
from cusprun.errors import ExportError, GateError
from exporters.gguf import export
from exporters.parity import compare, verify_artifact
from exporters.parity_records import Limits, ParityReport, limits_for
from exporters.parity_text import probe_texts
from serve.runtimes.llamacpp import LlamaCppRuntime
from serve.runtimes.torch_runtime import TorchRuntime

pytest.importorskip("llama_cpp")
TINY = TinyConfig("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("gate") / "tiny", TINY)


@pytest.fixture
def artifact(folder: Path, tmp_path: Path) -> Path:
    return export(folder, tmp_path / "m.gguf", quant="f32")


def verify(folder: Path, artifact: Path) -> ParityReport:
    candidate = LlamaCppRuntime(artifact, n_threads=1, kv_cache="f32")
    try:
        return verify_artifact(
            TorchRuntime(folder),
            candidate,
            folder=folder,
            artifact=artifact,
            format_name="gguf",
            quant="f32",
            token_documents=documents(candidate.vocab_size, count=6),
        )
    finally:
        candidate.close()


def test_sound_artifact_passes_and_the_report_round_trips(folder: Path, artifact: Path) -> None:
    report = verify(folder, artifact)
    assert report.verdict == "pass"
    path = artifact.with_name("m.gguf.parity.json")
    assert load_json(ParityReport, path) == report
    plain = json.loads(path.read_text(encoding="utf-8"))
    assert len(plain["artifact_sha256"]) == len(plain["reference_sha256"]) == 64
    assert plain["text"]["probe_texts"] >= 220
    assert artifact.is_file()


def swap_rows(path: Path) -> None:
    """Swap two rows of one matrix inside the finished file."""
    reader = gguf.GGUFReader(path, "r+")
    data = next(tensor.data for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight")
    data[[3, 4]] = data[[4, 3]]
    data.flush()


def flip(path: Path, key: str) -> None:
    """Turn a boolean field of the finished file around."""
    reader = gguf.GGUFReader(path, "r+")
    field = reader.fields[key]
    field.parts[field.data[0]][0] = not field.contents()
    reader.data.flush()


def change_text(path: Path, key: str, old: str, new: str) -> None:
    """Replace text of equal length in a string field of the finished file."""
    reader = gguf.GGUFReader(path, "r+")
    field = reader.fields[key]
    text = field.contents().replace(old, new)
    assert text != field.contents()
    field.parts[field.data[0]][:] = np.frombuffer(text.encode(), dtype=np.uint8)
    reader.data.flush()


def set_id(path: Path, key: str, value: int) -> None:
    reader = gguf.GGUFReader(path, "r+")
    field = reader.fields[key]
    field.parts[field.data[0]][0] = value
    reader.data.flush()


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (swap_rows, "largest logit difference"),
        (lambda path: flip(path, "tokenizer.ggml.add_bos_token"), "probe texts have other token ids"),
        (lambda path: change_text(path, "tokenizer.chat_template", "assistant", "assistent"), "rendered as"),
        (lambda path: set_id(path, "tokenizer.ggml.eos_token_id", 7), "EOS token is 7"),
    ],
    ids=["swapped-rows", "no-bos", "chat-template", "eos"],
)
def test_planted_fault_is_caught(
    folder: Path, artifact: Path, plant: Callable[[Path], None], message: str
) -> None:
    plant(artifact)
    with pytest.raises(GateError, match=message) as caught:
        verify(folder, artifact)
    assert caught.value.exit_code == 3
    assert not artifact.exists()
    assert artifact.with_name("m.gguf.rejected").is_file()
    report = load_json(ParityReport, artifact.with_name("m.gguf.parity.json"))
    assert report.verdict == "fail"
    assert report.failures


class Scripted:
    """A runtime with given logits that spells text as its code points."""

    name = "scripted"
    max_tokens: int | None = None
    special_texts: tuple[str, ...] = ("<s>",)

    def __init__(self, table: NDArray[np.float32], **changes: Any) -> None:
        self.table = table
        self.special_ids = SimpleNamespace(bos=1, eos=2, stop=(2,))
        self.__dict__.update(changes)

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        return [1] * add_special + [ord(letter) for letter in text]

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        return self.table[: len(token_ids)]

    def generate(self, token_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        yield from (int(row.argmax()) for row in self.table[:max_new_tokens])

    def render_chat(self, messages: Sequence[Any]) -> str | None:
        return "".join(message.content for message in messages)

    def chat_token_ids(self, messages: Sequence[Any]) -> list[int]:
        return self.tokenize(self.render_chat(messages) or "", True)


def random_logits(seed: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).standard_normal((130, 11))).astype(np.float32)


def test_measures_equal_torch() -> None:
    wanted, found = random_logits(0), random_logits(0) + random_logits(1, 0.3)
    document = np.random.default_rng(2).integers(0, 11, 130).tolist()
    measured = compare(Scripted(wanted), Scripted(found), ("a",), [document], Limits()).logits
    p, q = (torch.log_softmax(torch.tensor(x).double(), -1) for x in (wanted, found))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    targets = torch.tensor(document[1:])
    assert measured.tokens == 130
    assert measured.mean_kl == pytest.approx(kl.mean().item(), rel=1e-9)
    assert measured.max_kl == pytest.approx(kl.max().item(), rel=1e-9)
    assert measured.top1_agreement == np.mean(wanted.argmax(1) == found.argmax(1))
    assert measured.max_abs_logit_difference == np.abs(wanted - found).max()
    for log_probabilities, value in ((p, measured.perplexity_reference), (q, measured.perplexity_candidate)):
        nll = torch.nn.functional.nll_loss(log_probabilities[:-1], targets)
        assert value == pytest.approx(math.exp(nll.item()), rel=1e-9)


def test_each_limit_is_enforced() -> None:
    wanted, found = random_logits(0), random_logits(3)
    document = [1] * 130
    for limits, message in (
        (Limits(max_abs_logit_difference=0.1), "largest logit difference"),
        (Limits(mean_kl_max=1e-4), "mean KL"),
        (Limits(top1_agreement_min=0.99), "most likely token"),
        (Limits(perplexity_ratio_max=0.5), "perplexity ratio"),
    ):
        report = compare(Scripted(wanted), Scripted(found), (), [document], limits)
        assert report.verdict == "fail"
        assert message in report.failures[0]
        assert compare(Scripted(wanted), Scripted(wanted), (), [document], Limits()).verdict == "pass"


def test_a_logit_that_is_not_finite_fails() -> None:
    found = random_logits(0)
    found[5, 3] = np.nan
    report = compare(Scripted(random_logits(0)), Scripted(found), (), [[1] * 130], limits_for("gguf", "q8_0"))
    assert report.verdict == "fail"
    assert any("not finite" in failure for failure in report.failures)


def test_missing_stop_token_fails_and_an_extra_one_is_reported() -> None:
    ours = Scripted(random_logits(0), special_ids=SimpleNamespace(bos=1, eos=2, stop=(2, 5)))
    theirs = Scripted(random_logits(0), special_ids=SimpleNamespace(bos=1, eos=2, stop=(2, 9)))
    report = compare(ours, theirs, (), [[1] * 9], Limits())
    assert report.text.extra_stop_ids == (9,)
    assert any("does not stop" in failure for failure in report.failures)


def test_doubled_bos_in_a_chat_fails() -> None:
    class Doubled(Scripted):
        def chat_token_ids(self, messages: Sequence[Any]) -> list[int]:
            return [1, *super().chat_token_ids(messages)]

    report = compare(Scripted(random_logits(0)), Doubled(random_logits(0)), (), [[1] * 9], Limits())
    assert any("2 BOS tokens" in failure for failure in report.failures)


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ExportError, match="held-out documents"):
        compare(Scripted(random_logits(0)), Scripted(random_logits(0)), (), [[1]], Limits())


def test_probes_are_many_and_in_many_scripts() -> None:
    texts = probe_texts()
    assert len(set(texts)) == len(texts) >= 220
    blocks = {ord(letter) >> 8 for text in texts for letter in text}
    assert len(blocks) > 40


def test_unknown_limits_name_the_nearest() -> None:
    with pytest.raises(ExportError, match="did you mean 'q8_0'"):
        limits_for("gguf", "q8_1")
