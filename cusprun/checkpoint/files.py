"""The files of a model folder that are not weights: tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
CARRIED_FILES = (
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
)
"""Files that a pruned model carries over to the byte."""

CARRIED_FOLDERS = ("additional_chat_templates",)


def copy_carried_files(source: Path, target: Path) -> None:
    """Copy every file that pruning does not change, byte for byte."""
    for name in CARRIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name in CARRIED_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)


def write_config(target: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` in the layout that transformers writes."""
    (target / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
