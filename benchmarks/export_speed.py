"""How fast, and in how much memory, a folder becomes GGUF: cusprun against llama.cpp's own converter."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import Row
from processes import anonymous_bytes

from cusprun.checkpoint.files import copy_carried_files, write_config
from cusprun.checkpoint.writer import CheckpointWriter, Declared

REPEATS = 3
_POLL_S = 0.01
_SHAPE_1_5B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "head_dim": 128,
}
"""The widths of Qwen2-1.5B as a llama; the vocabulary is that of the tokenizer that is put beside it, which
the converter knows in that family alone."""


@dataclass(frozen=True)
class Spent:
    """What one process took: seconds, and the most memory of its own (file pages apart) at any time."""

    seconds: float
    peak_anonymous_bytes: int


def spend(command: list[str], environment: dict[str, str] | None = None) -> Spent:
    """Run a command to its end and measure it; raises ``CalledProcessError`` when it fails."""
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(_POLL_S)
    seconds = time.monotonic() - started
    if process.returncode:
        assert process.stderr is not None
        raise subprocess.CalledProcessError(process.returncode, command, stderr=process.stderr.read())
    return Spent(seconds, peak)


def random_model(folder: Path, tokenizer: Path) -> Path:
    """Write a random bfloat16 model of that shape, with the tokenizer files of another folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    copy_carried_files(tokenizer, folder)
    known = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    config = {**_SHAPE_1_5B, "vocab_size": known["vocab_size"]}
    config |= {key: known[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in known}
    write_config(folder, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name != "lm_head.weight"}
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(
        folder, [Declared(name, "BF16", shape) for name, shape in shapes.items()]
    ) as writer:
        for name, shape in shapes.items():
            weights = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            writer.write(name, weights)
    return folder


def speed_row(folder: Path, converter: Path | None, scratch: Path) -> Row:
    """Measure both writers in turns, each in a process of its own, and return medians with the spread."""
    out = scratch / "speed.gguf"
    ours = [sys.executable, "-m", "cusprun", "export", str(folder), "--no-verify", "--out", str(out)]
    sides: dict[str, list[str]] = {"cusprun": ours}
    if converter is not None:
        sides["converter"] = [
            sys.executable, str(converter), str(folder), "--outtype", "f16", "--outfile", str(out),
        ]  # fmt: skip
    # The converter's own gguf package, before whatever it needs besides.
    paths = [str(converter.parent / "gguf-py")] if converter else []
    library = {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    spent: dict[str, list[Spent]] = {side: [] for side in sides}
    for _ in range(REPEATS):
        for side, command in sides.items():
            spent[side].append(spend(command, library if side == "converter" else None))
            out.unlink()
    row: Row = {side: _summary(runs) for side, runs in spent.items()}
    row["model_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    row["free_bytes"] = shutil.disk_usage(scratch).free
    return row


def _summary(runs: list[Spent]) -> dict[str, Any]:
    seconds = [run.seconds for run in runs]
    return {
        "seconds": statistics.median(seconds),
        "fastest_seconds": min(seconds),
        "slowest_seconds": max(seconds),
        "peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in runs),
    }
