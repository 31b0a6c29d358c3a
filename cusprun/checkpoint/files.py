"""The files of a model folder that are not weights: tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cusprun.errors import ExportError, ModelError
from cusprun.families import families

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


_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def tokenizer_hash(folder: Path) -> str:
    """Return a SHA-256 over the files that turn text into token ids, empty when a folder has none.

    Raises:
        ModelError: a file cannot be read.
    """
    files = [folder / name for name in _VOCABULARY_FILES if (folder / name).is_file()]
    digest = hashlib.sha256()
    for path in files:
        try:
            digest.update(f"{path.name}|{hashlib.sha256(path.read_bytes()).hexdigest()}|".encode())
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}); check the file") from None
    return digest.hexdigest() if files else ""


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return ``generation_config.json``, empty when a folder has none.

    Raises:
        ExportError: it cannot be read as JSON, or holds no mapping.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read as JSON ({error}); mend or remove it") from None
    if not isinstance(plain, dict):
        raise ExportError(f"{path} does not hold a mapping; mend or remove it")
    return plain


def stop_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], vocab_size: int, own: int | None = None
) -> list[int]:
    """Return the ids that end a text, each once: the tokenizer's ``own``, then those of both configs.

    Where neither config states any, the stock config has a default of its own. Ids that no embedding row
    stands for (-1, say) can never come and are left out.
    """
    stated = [values.get("eos_token_id") for values in (generation_config, config)]
    if stated == [None, None]:
        family = families().get(str(config.get("model_type")))
        stated = [family.config_defaults.get("eos_token_id") if family else None]
    found = [item for value in (own, *stated) for item in (value if isinstance(value, list) else [value])]
    ids = [item for item in found if isinstance(item, int) and not isinstance(item, bool)]
    return list(dict.fromkeys(item for item in ids if 0 <= item < vocab_size))


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
