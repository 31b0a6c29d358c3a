"""What lies beside the graph: genai_config.json, the record of the export, licence and manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cusprun.checkpoint.index import CheckpointIndex, model_hash
from cusprun.errors import ExportError
from cusprun.version import __version__
from exporters.onnx_build import Recipe
from exporters.onnx_tokenizer import OnnxTokenizer

GENAI_NAME = "genai_config.json"
RECORD_NAME = "cusprun-export.json"
_PROVENANCE = ("cusprun.json", "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")


def correct_genai_config(
    out: Path, index: CheckpointIndex, tokenizer: OnnxTokenizer, context_length: int
) -> None:
    """Check the builder's ``genai_config.json`` against the folder and put right what it cannot know.

    The tokens that end a text are those of the tokenizer, the generation config and the config together: the
    builder takes one of the configs, and any of them may be the one that stops a chat. A model without BOS
    has none; the builder writes 1. The padding token must not end a text, see ``onnx_tokenizer``.
    """
    path = out / GENAI_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    model, shape = config["model"], index.shape
    decoder = model["decoder"]
    found = {
        "hidden_size": decoder["hidden_size"],
        "head_dim": decoder["head_size"],
        "num_attention_heads": decoder["num_attention_heads"],
        "num_key_value_heads": decoder["num_key_value_heads"],
        "num_hidden_layers": decoder["num_hidden_layers"],
        "vocab_size": model["vocab_size"],
        "context_length": model["context_length"],
    }
    wanted = {name: getattr(shape, name, context_length) for name in found}
    assert found == wanted, f"the builder wrote {found} where the folder has {wanted}"
    model["eos_token_id"] = list(tokenizer.stop_ids)
    model["pad_token_id"] = tokenizer.pad_id
    if tokenizer.bos_id is None:
        model.pop("bos_token_id", None)
    else:
        model["bos_token_id"] = tokenizer.bos_id
    config["search"]["max_length"] = context_length
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_record(out: Path, index: CheckpointIndex, recipe: Recipe) -> None:
    """Write which export this is, and of which weights; ``genai_config.json`` has no place for it."""
    settings = {key: value for key, value in asdict(recipe).items() if key != "precision"}
    record = {
        "schema_version": 1,
        "format": "onnx",
        "quant": recipe.precision,
        "options": settings,
        "source_sha256": model_hash(index),
        "cusprun_version": __version__,
        "onnxruntime_genai_version": _genai_version(),
    }
    (out / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def copy_provenance(folder: Path, out: Path) -> None:
    """Copy licence, model card and the manifest of the pruning, where there are any."""
    for name in _PROVENANCE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def read_record(path: Path) -> Mapping[str, Any] | None:
    """Return the record of an exported folder; ``None`` when it is no folder for onnxruntime-genai.

    Raises:
        ExportError: it is one, without a sound record.
    """
    if not (path / GENAI_NAME).is_file():
        return None
    advice = "export the model again with cusprun"
    try:
        record = json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(
            f"{path} has no {RECORD_NAME}, so its precision is not known; it was not made by cusprun, "
            f"{advice}"
        ) from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path / RECORD_NAME} cannot be read ({error}); {advice}") from None
    if not isinstance(record, dict) or not isinstance(record.get("quant"), str):
        raise ExportError(f"{path / RECORD_NAME} does not say a precision; {advice}")
    return record


def _genai_version() -> str:
    from importlib import metadata

    return metadata.version("onnxruntime-genai")
