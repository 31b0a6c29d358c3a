"""What a deployment has to know of an artifact, read from its headers and small files."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.cache import file_sha256
from cusprun.errors import ModelError, UserError
from cusprun.pipeline.deploy_packages import versions_of
from cusprun.pipeline.deploy_sizing import Request, size
from cusprun.progress import SILENT, Progress
from cusprun.version import __version__

if TYPE_CHECKING:
    from cusprun.checkpoint.gguf_header import GgufFile
    from deploy.facts import Facts

ENGINES: Mapping[str, str] = {"gguf": "llamacpp", "onnx": "onnx", "vllm": "vllm"}
"""The engine that serves each format, as ``cusprun serve`` chooses it."""

_MAX_NAME = 40
_SAMPLING = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""What a model states, in ``generation_config.json`` and below ``general.sampling`` of a GGUF file."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_MANIFEST_NAMES = ("cusprun.json", "cusprun-export.json")


@dataclass(frozen=True)
class Texts:
    """What the tokenizer, the template and the card of an artifact say."""

    context_limit: int
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    stop_strings: tuple[str, ...] = ()
    adds_bos: bool = False
    license: str | None = None
    source: str | None = None
    expert: str | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)


def format_of_artifact(artifact: Path) -> str:
    """Return the export format of an artifact.

    Raises:
        ModelError: it is of none, or damaged.
        ExportError: it is of a precision that no export makes.
    """
    from exporters.registry import FORMATS, kinds_of

    if not artifact.exists():
        raise ModelError(f"{artifact} does not exist; give what cusprun export wrote")
    found = next(kinds_of(artifact), None)
    if found is None:
        raise ModelError(
            f"{artifact} is no artifact of a known format ({', '.join(FORMATS)}); give what cusprun export "
            "wrote"
        )
    return found[0]


def gather(
    artifact: Path,
    format_name: str,
    request: Request,
    *,
    model: str | None = None,
    progress: Progress = SILENT,
) -> Facts:
    """Return the facts of an artifact; every file of it is read once, to be hashed.

    Raises:
        ModelError: a file is missing or damaged.
        UserError: the memory is too little, or a name cannot be used.
        MissingDependencyError: a package that serves the artifact is not installed.
    """
    from deploy.facts import Facts

    path = Path(os.path.abspath(artifact))  # noqa: PTH100 - a link keeps its name, `..` gets one
    called = model or (path.stem if path.is_file() else path.name)
    if not called.isprintable() or not path.name.isprintable():
        raise UserError(f"the name {called!r} holds characters that cannot be printed; rename it")
    texts = _READERS[format_name](path)
    files = _files(path)
    sizing = size(path, ENGINES[format_name], texts.context_limit, request)
    return Facts(
        name=_plain_name(called),
        model=called,
        format=format_name,
        artifact_name=path.name,
        artifact_is_folder=path.is_dir(),
        artifact_bytes=sum(file.stat().st_size for file in files.values()),
        sha256={name: file_sha256(file, progress) for name, file in files.items()},
        engine=ENGINES[format_name],
        license=texts.license,
        source=texts.source,
        expert=texts.expert,
        chat_template=texts.chat_template,
        bos_token=texts.bos_token,
        eos_token=texts.eos_token,
        stop_strings=texts.stop_strings,
        system_prompt=None,
        context_limit=texts.context_limit,
        cusprun_version=__version__,
        versions=versions_of(ENGINES[format_name]),
        sizing=sizing,
        adds_bos=texts.adds_bos,
        sampling=texts.sampling,
    )


def _files(path: Path) -> dict[str, Path]:
    """Return the files of an artifact by their path in it; hidden ones, such as git's, are none of it."""
    if path.is_file():
        return {path.name: path}
    every = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
    found = {
        name.as_posix(): file
        for name, file in every.items()
        if not any(part.startswith(".") for part in name.parts)
    }
    odd = next((name for name in found if not name.isprintable()), None)
    if odd is not None:
        raise UserError(f"{path} holds a file whose name cannot be printed ({odd!r}); rename it")
    return found


def _plain_name(text: str) -> str:
    """Return a name of lower-case ASCII letters, digits and hyphens, a letter first (RFC 1035)."""
    ascii_text = unicodedata.normalize("NFKD", text.casefold()).encode("ascii", "ignore").decode()
    name = re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")
    name = name if name[:1].isalpha() else f"model-{name}".rstrip("-")
    return name[:_MAX_NAME].rstrip("-")


def _gguf_texts(path: Path) -> Texts:
    from cusprun.checkpoint.gguf_header import read_gguf

    file = read_gguf(path)
    tokens = file.array("tokenizer.ggml.tokens", str)
    named = {
        name: _token(tokens, file.metadata.get(f"tokenizer.ggml.{name}_token_id"))
        for name in ("bos", "eos", "eot", "eom")
    }
    stops = dict.fromkeys(text for name, text in named.items() if name != "bos" and text)
    return Texts(
        context_limit=file.integer(f"{file.text('general.architecture')}.context_length"),
        chat_template=_stated(file.metadata.get("tokenizer.chat_template")),
        bos_token=named["bos"],
        eos_token=named["eos"],
        stop_strings=tuple(stops),
        adds_bos=file.flag("tokenizer.ggml.add_bos_token", _adds_bos(file)),
        license=_line(file.metadata.get("general.license")),
        source=_gguf_source(file),
        expert=_line(file.metadata.get("general.finetune")) if _is_ours(file) else None,
        sampling=_numbers(
            {name: file.metadata.get(f"general.sampling.{key}") for name, key in _SAMPLING.items()}
        ),
    )


def _adds_bos(file: GgufFile) -> bool:
    """Tell whether llama.cpp adds BOS where the file does not say: to SentencePiece, and to some others."""
    from cusprun.checkpoint.gguf_tokenizer import pre_tokenizers

    if file.text("tokenizer.ggml.model", "") == "llama":
        return True
    pre = pre_tokenizers().get(file.text("tokenizer.ggml.pre", ""))
    return pre is not None and pre.add_bos


def _is_ours(file: GgufFile) -> bool:
    """Tell whether a file was made from an expert: what others call a fine-tune is none."""
    return "cusprun.model_hash" in file.metadata


def _gguf_source(file: GgufFile) -> str | None:
    name = _line(file.metadata.get("general.base_model.0.name"))
    owner = _line(file.metadata.get("general.base_model.0.organization"))
    return f"{owner}/{name}" if owner and name else name


def _token(tokens: list[str], token_id: object) -> str | None:
    is_known = isinstance(token_id, int) and 0 <= token_id < len(tokens)
    return tokens[token_id] if is_known and isinstance(token_id, int) else None


def _stated(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _line(value: object) -> str | None:
    """Return what a card says on one line, of what can be printed: it goes into files of one-line values."""
    words = value.split() if isinstance(value, str) else ()
    return "".join(letter for letter in " ".join(words) if letter.isprintable()) or None


def _numbers(values: Mapping[str, object]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _onnx_texts(path: Path) -> Texts:
    model = _json(path / "genai_config.json").get("model")
    if not isinstance(model, dict) or not isinstance(model.get("context_length"), int):
        raise ModelError(f"{path / 'genai_config.json'} has no model.context_length; export the model again")
    return _folder_texts(path, int(model["context_length"]), model.get("eos_token_id"))


def _vllm_texts(path: Path) -> Texts:
    config = _json(path / "config.json")
    limit = config.get("max_position_embeddings")
    if not isinstance(limit, int):
        raise ModelError(f"{path / 'config.json'} has no max_position_embeddings; export the model again")
    stated = _json(path / "generation_config.json", needed=False).get("eos_token_id")
    return _folder_texts(path, limit, config.get("eos_token_id") if stated is None else stated)


def _folder_texts(path: Path, context_limit: int, stop_ids: object) -> Texts:
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{path} has no tokenizer, without which it cannot be served; export the model again"
        )
    words = _json(path / "tokenizer_config.json", needed=False)
    ids = stop_ids if isinstance(stop_ids, list) else [stop_ids]
    texts = _added_tokens(path)
    eos = _token_text(words.get("eos_token"))
    stops = [texts.get(item) for item in ids if isinstance(item, int)] + [eos]
    template_file = path / "chat_template.jinja"
    template = template_file.read_text("utf-8") if template_file.is_file() else words.get("chat_template")
    manifest = next((found for name in _MANIFEST_NAMES if (found := _json(path / name, needed=False))), {})
    expert = manifest.get("expert")
    card = _card(path)
    generation = _json(path / "generation_config.json", needed=False)
    return Texts(
        context_limit=context_limit,
        chat_template=_stated(template),
        bos_token=_token_text(words.get("bos_token")),
        eos_token=eos,
        stop_strings=tuple(dict.fromkeys(text for text in stops if text)),
        adds_bos=bool(words.get("add_bos_token", False)),
        license=_line(card.get("license")),
        source=_line(manifest.get("source")) or _line(card.get("base_model")),
        expert=_line(expert.get("name") if isinstance(expert, dict) else expert),
        sampling=_numbers({name: generation.get(name) for name in _SAMPLING}),
    )


def _added_tokens(path: Path) -> dict[int, str]:
    """Return the texts of a tokenizer's added tokens, which those that end an answer are among."""
    entries = _json(path / "tokenizer.json", needed=False).get("added_tokens")
    return {
        entry["id"]: entry["content"]
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and isinstance(entry.get("id"), int)
    }


def _token_text(value: object) -> str | None:
    return _stated(value.get("content")) if isinstance(value, dict) else _stated(value)


def _json(path: Path, *, needed: bool = True) -> dict[str, Any]:
    if not needed and not path.is_file():
        return {}
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); export the model again") from None
    if not isinstance(plain, dict):
        raise ModelError(f"{path} does not hold a mapping; export the model again")
    return plain


def _card(path: Path) -> dict[str, Any]:
    """Return what a model card says at its top; one that says nothing is no reason to refuse."""
    import yaml

    try:
        text = (path / "README.md").read_text(encoding="utf-8")
        plain = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return {}
    return plain if isinstance(plain, dict) else {}


_READERS: Mapping[str, Callable[[Path], Texts]] = {
    "gguf": _gguf_texts,
    "onnx": _onnx_texts,
    "vllm": _vllm_texts,
}
