"""What is said of memory, against what the kernel counts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import documents, save_model

from cusprun.checkpoint.index import CheckpointIndex, open_checkpoint
from cusprun.errors import UserError
from cusprun.pipeline.workspaces import workspace_of
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.refit_memory import refitting
from cusprun.pruning.score import score_model
from cusprun.quality.likelihood import measure_likelihood
from cusprun.records import Corpora
from cusprun.walk.batches import DEFAULT_BATCH_TOKENS
from cusprun.walk.budget import (
    BASE_BYTES,
    Demand,
    batching_within,
    block_bytes,
    measuring,
    require_memory,
    scoring,
)
from cusprun.walk.device import DTYPES
from cusprun.walk.fallback import DEFAULT_BATCHING
from cusprun.walk.workspace import Workspace

ROOT = Path(__file__).parent.parent.parent
SHAPES: dict[str, dict[str, Any]] = {
    "wide FFN": {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4, "head_dim": 64},
    "many heads": {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8, "head_dim": 64},
}
WORK = """
import json, sys
from pathlib import Path
import torch
from cusprun.checkpoint.index import open_checkpoint
from cusprun.pipeline.trial import MemoryWatch, anonymous_bytes
from cusprun.pruning.planner import make_plan
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.rewrite import write_weights
from cusprun.pruning.score import score_model
from cusprun.pruning.store import open_store
from cusprun.quality.likelihood import measure_likelihood
from cusprun.records import Corpora, TokenizedDocument
from cusprun.walk.allocator import give_back_when_freed
from cusprun.walk.device import open_device

torch.manual_seed(0)
texts = tuple(
    TokenizedDocument("task", str(n), tuple(torch.randint(0, 500, (128,)).tolist())) for n in range(18)
)
give_back_when_freed()
device = open_device("cpu", dtype=sys.argv[1])

def prune(index, out, texts, settings):
    names = {"model_hash": "m", "corpus_hash": "c"}
    yield "score", lambda: score_model(index, Corpora(texts, ()), out / "store", device=device, **names)
    plan = make_plan(index, open_store(out / "store"), model_hash="m", ratio=0.25)
    (out / "expert").mkdir()
    yield "refit", lambda: write_weights(
        index, plan, out / "expert", texts, settings=settings, device=device
    )
    yield "measure", lambda: measure_likelihood(index, texts, index)

for place in map(Path, sys.argv[2:]):
    index, settings = open_checkpoint(place / "model"), RefitSettings(revise=True, anchors=0)
    (place / "first").mkdir()
    for _, work in prune(index, place / "first", texts[:1], settings):
        work()  # what is loaded and kept on first use is no part of a stage
    for stage, work in prune(index, place, texts, settings):
        watch, before = MemoryWatch(), anonymous_bytes()
        with watch.during(stage):
            work()
        print(json.dumps([str(place), stage, before, watch.highest[stage]]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    return open_checkpoint(save_model(tmp_path_factory.mktemp("budget") / "model"))


def demand_of(stage: str, index: CheckpointIndex, lengths: list[int], dtype: str = "float32") -> Demand:
    settings = RefitSettings(revise=True, anchors=0)
    return {
        "score": lambda: scoring(index, lengths, dtype),
        "refit": lambda: refitting(index, lengths, settings, dtype=dtype),
        "measure": lambda: measuring([index, index], lengths),
    }[stage]()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel is Linux")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stage_takes_no_more_than_is_said_and_not_far_less(dtype: str, tmp_path: Path) -> None:
    for name, shape in SHAPES.items():
        save_model(
            tmp_path / name / "model", "llama", num_key_value_heads=4, vocab_size=4000,
            max_position_embeddings=128, num_hidden_layers=1, **shape,
        )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WORK, dtype, *(str(tmp_path / name) for name in SHAPES)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3 * len(SHAPES)
    for place, stage, before, highest in found:
        index = open_checkpoint(Path(place) / "model")
        said = demand_of(stage, index, [128] * 18, dtype).total_bytes(DEFAULT_BATCH_TOKENS) - BASE_BYTES
        assert before < BASE_BYTES
        assert 0.2 * said < highest - before < said, (place, stage, highest - before, said)


def test_a_block_in_float32_is_as_large_as_the_block(tiny: CheckpointIndex) -> None:
    from cusprun.walk.shell import DecoderShell

    block = DecoderShell(tiny).load_block(1)
    assert block_bytes(tiny) == sum(p.numel() * p.element_size() for p in block.parameters())


@given(
    fixed=st.integers(0, 10**10),
    per_token=st.integers(1, 10**7),
    longest=st.integers(1, 5000),
    memory=st.integers(1, 2 * 10**11),
)
def test_batches_fit_and_larger_ones_would_not(fixed: int, per_token: int, longest: int, memory: int) -> None:
    demand = Demand("it", {"this": fixed}, per_token, longest)
    tokens = demand.batch_tokens(memory)
    if tokens == 0:
        assert memory < demand.least_bytes
        with pytest.raises(UserError, match="too little for it"):
            batching_within(memory, demand)
        return
    assert demand.total_bytes(tokens) <= memory + 1  # rounded
    assert tokens >= longest
    if longest < tokens < DEFAULT_BATCH_TOKENS:
        assert demand.total_bytes(tokens + 1) > memory
    assert batching_within(memory, demand).tokens == tokens


def test_without_a_budget_batches_are_the_usual_ones() -> None:
    assert batching_within(None, Demand("it", {"this": 10**15}, 1, 1)) is DEFAULT_BATCHING


def test_of_several_stages_the_largest_is_refused_with_what_would_do() -> None:
    small, large = Demand("small", {"a": 10**6}, 10, 100), Demand("large", {"the block": 10**9}, 10, 100)
    with pytest.raises(UserError, match=r"500 MB is too little for large.*1\.0 GB for the block") as caught:
        require_memory(5 * 10**8, [small, large])
    told = float(re.search(r"at least ([0-9.]+) GB", str(caught.value))[1]) * 1e9  # type: ignore[index]
    require_memory(round(told), [small, large])


@pytest.mark.parametrize(
    ("memory", "found"), [(None, None), ("4GB", 4 * 10**9), ("500M", 5 * 10**8), (123, 123)]
)
def test_memory_as_people_and_programs_write_it(memory: Any, found: Any) -> None:
    assert workspace_of(memory).memory_bytes == found


@pytest.mark.parametrize("memory", [0, -1, "", "much", "4 gallons", 1.5, True])
def test_what_is_no_amount_of_memory_is_refused(memory: Any) -> None:
    with pytest.raises(UserError):
        workspace_of(memory)


def test_a_budget_makes_smaller_batches_and_gives_the_same(tiny: CheckpointIndex, tmp_path: Path) -> None:
    texts = documents(40)
    corpora, lengths = Corpora(texts, ()), [len(text.token_ids) for text in texts]
    demand = scoring(tiny, lengths)
    workspace = Workspace(memory_bytes=demand.total_bytes(60) + 1)
    assert batching_within(workspace.memory_bytes, demand).tokens in range(30, 70)
    for name, room in (("usual", Workspace()), ("small", workspace)):
        score_model(tiny, corpora, tmp_path / name, model_hash="m", corpus_hash="c", workspace=room)
    from cusprun.pruning.store import open_store

    one, other = (open_store(tmp_path / name) for name in ("usual", "small"))
    torch.testing.assert_close(one.layer(1)["ffn_channel"], other.layer(1)["ffn_channel"])


@pytest.mark.parametrize("stage", ["score", "measure"])
def test_too_little_memory_is_refused_before_anything_is_written(
    stage: str, tiny: CheckpointIndex, tmp_path: Path
) -> None:
    texts = documents(4)
    least = demand_of(stage, tiny, [len(text.token_ids) for text in texts]).least_bytes
    names = {"model_hash": "m", "corpus_hash": "c"}

    def work(memory_bytes: int) -> object:
        room = Workspace(tmp_path, memory_bytes)
        if stage == "measure":
            return measure_likelihood(tiny, texts, tiny, workspace=room)
        return score_model(tiny, Corpora(texts, ()), tmp_path / "out", workspace=room, **names)

    with pytest.raises(UserError, match="too little"):
        work(least - 10**6)
    assert not list(tmp_path.iterdir())
    work(least)
