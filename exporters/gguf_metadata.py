"""The key-value part of a GGUF file: widths, rope, tokenizer, and where the model came from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import yaml

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.version import __version__
from exporters.gguf_rope import Rope
from exporters.gguf_support import sliding_blocks
from exporters.gguf_vocab import GgufVocab

MANIFEST_NAME = "cusprun.json"
_STRIPPING_NAME = re.compile(r"phi-?3", re.IGNORECASE)
_TELLING_NAMES = re.compile(r"(phi)-?(3)|(modern)-(bert)", re.IGNORECASE)
"""Names by which llama.cpp changes how tokens take the space around them (src/llama-vocab.cpp)."""

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*)/([\w.-]+)")


def add_architecture(writer: gguf.GGUFWriter, index: CheckpointIndex, rope: Rope) -> None:
    """Write the widths and the rope settings; every width is stated, also those llama.cpp could guess."""
    shape = index.shape
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(int(index.stated("max_position_embeddings")))
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(float(index.stated("rms_norm_eps")))
    writer.add_vocab_size(shape.vocab_size)
    writer.add_rope_dimension_count(rope.stated_dimensions)
    writer.add_rope_freq_base(rope.theta)
    _add_windows(writer, index, rope)
    if rope.scaling == "none":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope.scaling))
    writer.add_rope_scaling_factor(rope.factor)
    if rope.scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.original_context_length)
        writer.add_rope_scaling_attn_factors(rope.attention_factor)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)


def _add_windows(writer: gguf.GGUFWriter, index: CheckpointIndex, rope: Rope) -> None:
    """Write which blocks have a window, and how wide; a family in which all might says that none has."""
    blocks = sliding_blocks(index)
    if any(blocks):
        assert rope.sliding_theta is not None
        writer.add_sliding_window(int(index.family.setting(index.config, "sliding_window")))
        writer.add_sliding_window_pattern(blocks)
        writer.add_rope_freq_base_swa(rope.sliding_theta)
    elif index.family.sliding_window == "always":
        writer.add_sliding_window(0)


def add_vocab(writer: gguf.GGUFWriter, vocab: GgufVocab) -> None:
    """Write the tokenizer; whether BOS and EOS are added is stated either way, since defaults vary."""
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.token_types)
    if vocab.scores:
        writer.add_token_scores(vocab.scores)
    if vocab.merges:
        writer.add_token_merges(vocab.merges)
    if vocab.add_space_prefix is not None:
        writer.add_add_space_prefix(vocab.add_space_prefix)
    if vocab.remove_extra_whitespaces:
        writer.add_remove_extra_whitespaces(True)
    if vocab.precompiled_charsmap:
        writer.add_precompiled_charsmap(vocab.precompiled_charsmap)
    setters = {
        "bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "eot": writer.add_eot_token_id,
        "eom": writer.add_eom_token_id, "unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id,
    }  # fmt: skip
    for name, token_id in vocab.special_ids.items():
        setters[name](token_id)
    writer.add_add_bos_token(vocab.add_bos)
    writer.add_add_eos_token(vocab.add_eos)
    if vocab.chat_templates:
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in vocab.chat_templates.items()]
        )


def add_provenance(writer: gguf.GGUFWriter, index: CheckpointIndex, vocab: GgufVocab) -> None:
    """Write name, licence and source as far as the folder's model card and manifest state them."""
    card, manifest = _model_card(index.folder), _manifest(index.folder)
    expert = manifest.get("expert")
    expert_name = expert.get("name") if isinstance(expert, dict) else None
    bases = _bases(card, manifest)
    name = str(expert_name or index.folder.absolute().name)
    writer.add_type("model")
    writer.add_name(_told_name(name, vocab.strips_as_phi3))
    writer.add_basename(_basename(bases[0][1] if bases else name))
    if expert_name:
        writer.add_finetune(str(expert_name))
    writer.add_size_label(gguf.size_label(index.num_parameters, index.num_parameters, 0, 0))
    writer.add_quantized_by(f"cusprun {__version__}")
    _add_card(writer, card)
    if bases:
        writer.add_base_model_count(len(bases))
    for number, (organization, base) in enumerate(bases):
        writer.add_base_model_name(number, base)
        if organization:
            writer.add_base_model_organization(number, organization)
    for key in ("cusprun_version", "source_hash", "model_hash", "corpus_hash", "rule", "created"):
        if isinstance(manifest.get(key), str):
            writer.add_string(f"cusprun.{key.removeprefix('cusprun_')}", manifest[key])
    plan = manifest.get("plan")
    if isinstance(plan, dict) and isinstance(plan.get("ratio"), int | float):
        writer.add_float32("cusprun.ratio", float(plan["ratio"]))


def _told_name(name: str, strips_as_phi3: bool) -> str:
    """Return the name in a spelling from which llama.cpp concludes about tokens what is true of them.

    By a name with ``phi-3`` in it, special tokens swallow the space after them, and a vocabulary without
    ``</s>`` cannot be loaded.
    """
    if strips_as_phi3:
        return name if _STRIPPING_NAME.search(name) else f"{name} (phi-3)"
    return _TELLING_NAMES.sub(lambda match: "_".join(filter(None, match.groups())), name)


def _bases(card: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return organisation and name of each model this one was made from; a path gives its last part only."""
    stated = manifest.get("source") or card.get("base_model")
    sources = [source for source in (stated if isinstance(stated, list) else [stated]) if source]
    bases = []
    for source in sources:
        named = _HUB_ID.fullmatch(str(source))
        bases.append((named[1], named[2]) if named else ("", str(source).rstrip("/").rsplit("/", 1)[-1]))
    return bases


def _basename(name: str) -> str:
    """Return the name of the model without size, version and fine-tune, where it follows the usual form."""
    return str(gguf.Metadata.get_model_id_components(name)[2] or name)


def _add_card(writer: gguf.GGUFWriter, card: Mapping[str, Any]) -> None:
    """Write what a model card says about the licence, the languages and the model's tags."""
    for key, add in (
        ("license", writer.add_license),
        ("license_name", writer.add_license_name),
        ("license_link", writer.add_license_link),
    ):
        if isinstance(card.get(key), str):
            add(card[key])
    for key, add_list in (("tags", writer.add_tags), ("language", writer.add_languages)):
        stated = card.get(key)
        found = [str(entry) for entry in (stated if isinstance(stated, list) else [stated]) if entry]
        if found:
            add_list(found)


def _manifest(folder: Path) -> Mapping[str, Any]:
    """Return the manifest leniently: a label in the file is not worth refusing an export for."""
    try:
        plain = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _model_card(folder: Path) -> Mapping[str, Any]:
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        head = text.split("---", 2)[1] if text.startswith("---") else ""
        plain = yaml.safe_load(head)
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return plain if isinstance(plain, dict) else {}
