"""A model that does not fit a limit of data, pruned under it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import build_model

ROOT = Path(__file__).parent.parent.parent
ALLOWED = 90_000_000
SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 2000,
    "num_hidden_layers": 40,
}
WORK = """
import resource, sys
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama
from cusprun.checkpoint.index import model_hash, open_checkpoint
from cusprun.checkpoint.reader import layer_tensors
from cusprun.errors import UserError
from cusprun.pruning.folder import Provenance, write_expert
from cusprun.pruning.planner import make_plan
from cusprun.pruning.score import score_model
from cusprun.pruning.store import open_store
from cusprun.records import Corpora, Expert, TokenizedDocument
from cusprun.walk.allocator import give_back_when_freed
from cusprun.walk.workspace import Workspace

model, out, allowed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
generator = torch.Generator().manual_seed(0)
texts = [
    TokenizedDocument("task", str(n), (1, *torch.randint(3, 2000, (39,), generator=generator).tolist()))
    for n in range(8)
]
corpora, index = Corpora(tuple(texts[:6]), tuple(texts[6:])), open_checkpoint(model)
torch.ones(64, 64) @ torch.ones(64, 64)
give_back_when_freed()
status = Path("/proc/self/status").read_text().splitlines()
data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data + allowed, data + allowed))
try:
    held = [t.float() for layer in range(40) for _, t in layer_tensors(index, layer)]
except (RuntimeError, UserError) as error:
    print("the whole model does not fit:", "memory" in str(error))
held = None
workspace = Workspace(out, 600_000_000)
score_model(index, corpora, out / "store", model_hash="m", corpus_hash="c", workspace=workspace)
plan = make_plan(index, open_store(out / "store"), model_hash="m", ratio=0.25, rule="surgeon")
made = write_expert(
    index, plan, out / "expert", corpora=corpora,
    provenance=Provenance("tiny", "m", "c", Expert("tiny", {}), {}), workspace=workspace,
)
print("blocks:", made.plan.after.num_hidden_layers, "ratio:", round(made.plan.block_ratio, 2))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is Linux's")
def test_forty_blocks_are_pruned_under_a_limit_that_a_third_of_them_fill(tmp_path: Path) -> None:
    model = build_model("llama", **SHAPE).to(torch.bfloat16)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    in_float32 = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert in_float32 > 3 * ALLOWED
    del model
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(folder), str(tmp_path / "out"), str(ALLOWED)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the whole model does not fit: True" in done.stdout
    assert "blocks: 40 ratio: 0.25" in done.stdout
    with safe_open(tmp_path / "out" / "expert" / "model.safetensors", framework="pt") as stream:
        assert stream.get_slice("model.layers.39.mlp.down_proj.weight").get_shape()[1] < 1152
