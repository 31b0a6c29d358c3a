"""Artifacts and facts to deploy, made without a model library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from deploy.facts import Facts, Sizing

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT_LIMIT = 8192
LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 128, 4, 2, 16
TOKENS = ("<unk>", "<s>", "<|im_end|>", *(f"t{number}" for number in range(29)))
SIZING = Sizing(4096, 4, None, 70 << 20, 30 << 20, 120 << 20, 220 << 20, 242 << 20, "planned")


def make_gguf(
    path: Path,
    template: str | None = CHATML,
    license_: str | None = "apache-2.0",
    keys: Mapping[str, str | float] | None = None,
    adds_bos: bool | None = True,
) -> Path:
    """Write a GGUF file of a llama with random weights and a tokenizer of 32 tokens; ``keys`` are added."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(int(gguf.LlamaFileType.ALL_F32))
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT_LIMIT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(TOKENS))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if adds_bos is not None:
        writer.add_add_bos_token(adds_bos)
    if template is not None:
        writer.add_chat_template(template)
    if license_ is not None:
        writer.add_license(license_)
    for key, value in (keys or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)  # type: ignore[operator]
    generator = np.random.default_rng(0)
    writer.add_tensor(
        "token_embd.weight", generator.standard_normal((len(TOKENS), HIDDEN)).astype(np.float32)
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def facts_of(**changes: Any) -> Facts:
    """Return facts of a GGUF file, some of them changed."""
    facts = Facts(
        name="maths-expert",
        model="maths expert",
        format="gguf",
        artifact_name="maths expert.gguf",
        artifact_is_folder=False,
        artifact_bytes=70 << 20,
        sha256={"maths expert.gguf": "0" * 64},
        engine="llamacpp",
        license="apache-2.0",
        source="owner/model",
        expert="maths",
        chat_template=CHATML,
        bos_token="<s>",
        eos_token="<|im_end|>",
        stop_strings=("<|im_end|>",),
        system_prompt=None,
        context_limit=CONTEXT_LIMIT,
        cusprun_version="1.2.3",
        versions={"jinja2": "3.1.6"},
        sizing=SIZING,
        adds_bos=True,
    )
    return replace(facts, **changes)


def tree(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Return the bytes, mode and time of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): (
            path.read_bytes(),
            path.stat().st_mode,
            int(path.stat().st_mtime),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return the manifest of a deployment."""
    plain: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
    return plain
