"""What every family keeps: stock models of it are known, run, cut and written, and stay stock models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny import build_model, documents, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from cusprun.checkpoint.files import write_config
from cusprun.checkpoint.index import CheckpointIndex, open_checkpoint
from cusprun.families import axis_length, families, shape_of
from cusprun.pruning.folder import expert_config
from cusprun.pruning.rewrite import write_weights
from cusprun.records import LayerPlan, Plan, Shape
from cusprun.walk.batches import make_batches
from cusprun.walk.shell import DecoderShell
from cusprun.walk.spill import spilled

CUTS: dict[str, frozenset[str]] = {
    "nothing": frozenset(),
    "ffn channels": frozenset({"ffn"}),
    "query heads": frozenset({"heads"}),
    "kv groups": frozenset({"groups"}),
    "blocks": frozenset({"blocks"}),
    "all of these": frozenset({"ffn", "heads", "groups", "blocks"}),
}
TEXTS = documents(4)


def make_plan(shape: Shape, kinds: frozenset[str]) -> Plan:
    """Plan by hand: in each block other units go, as many in each."""
    kept_blocks = [
        layer for layer in range(shape.num_hidden_layers) if not ("blocks" in kinds and layer == 1)
    ]
    layers = tuple(_layer_plan(shape, kinds, layer) for layer in kept_blocks)
    after = replace(
        shape,
        num_hidden_layers=len(layers),
        num_key_value_heads=len(layers[0].kv_groups),
        num_attention_heads=len(layers[0].query_heads),
        intermediate_size=len(layers[0].ffn_channels),
    )
    known: dict[str, Any] = {
        "before": shape, "after": after, "layers": layers, "kept_blocks": tuple(kept_blocks), "rule": "mean",
        "ratio": 0.1, "block_ratio": 0.1, "total_ratio": 0.1, "units": (), "ffn_thresholds": (),
    }  # fmt: skip
    empty: dict[str, Any] = {"str": "", "float": 0.0}
    wanted = [field for field in fields(Plan) if field.default is MISSING]
    return Plan(**{f.name: known.get(f.name, empty.get(str(f.type), ())) for f in wanted})


def _layer_plan(shape: Shape, kinds: frozenset[str], layer: int) -> LayerPlan:
    def without(total: int, gone: int) -> list[int]:
        return [unit for unit in range(total) if unit != gone % total]

    groups = list(range(shape.num_key_value_heads))
    if "groups" in kinds and len(groups) > 1:
        groups = without(len(groups), layer)
    per_group = list(range(shape.queries_per_group))
    if "heads" in kinds and len(per_group) > 1:
        per_group = without(len(per_group), layer + 1)
    heads = [group * shape.queries_per_group + place for group in groups for place in per_group]
    channels = range(shape.intermediate_size)
    if "ffn" in kinds:
        channels = [channel for channel in channels if (channel + layer) % 5]  # type: ignore[assignment]
    return LayerPlan(tuple(groups), tuple(heads), tuple(channels))


def silence(model: Any, plan: Plan) -> None:
    """Set to zero what reads the units that go, and what a block that goes adds to the stream."""
    width = plan.before.head_dim
    blocks = dict(zip(plan.kept_blocks, plan.layers, strict=True))
    for number, block in enumerate(model.model.layers):
        kept = blocks.get(number, LayerPlan((), (), ()))
        for head in set(range(plan.before.num_attention_heads)) - set(kept.query_heads):
            block.self_attn.o_proj.weight.data[:, head * width : (head + 1) * width] = 0
        gone = list(set(range(plan.before.intermediate_size)) - set(kept.ffn_channels))
        block.mlp.down_proj.weight.data[:, gone] = 0
        if number not in blocks:
            for name, parameter in block.named_parameters():
                if name.endswith(("o_proj.bias", "down_proj.bias")):
                    parameter.data.zero_()


def load_strictly(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    assert not any(info.values()), info
    return model.eval()


def logits_of(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([text.token_ids])).logits[0] for text in TEXTS]


def walked_logits(index: CheckpointIndex, head: torch.nn.Module) -> list[torch.Tensor]:
    """Run block by block; only the head is taken from the stock model."""
    batches = make_batches(TEXTS, batch_tokens=64)
    shell = DecoderShell(index)
    found: dict[int, torch.Tensor] = {}
    with spilled(batches, index.shape.hidden_size) as hidden:
        shell.embed_into(hidden, batches)
        states = [hidden.read(position).clone() for position in range(len(batches))]
    for layer in range(index.shape.num_hidden_layers):
        block = shell.load_block(layer)
        with shell.holding(layer, block):
            states = [shell.run(state) for state in states]
    for batch, state in zip(batches, states, strict=True):
        with torch.no_grad():
            logits = head(shell.load_norm()(state))
        for row, text in enumerate(batch.documents):
            found[text] = logits[row, : len(TEXTS[text].token_ids)]
    return [found[text] for text in range(len(TEXTS))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test the variants of its class."""
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", metafunc.cls.variants.values(), ids=metafunc.cls.variants.keys())


class FamilyContract:
    """Every family keeps all of this; a family is a subclass with its tiny models."""

    tiny: ClassVar[str]
    variants: ClassVar[Mapping[str, dict[str, Any]]] = {"plain": {}}
    windows: ClassVar[tuple[tuple[dict[str, Any], bool], ...]]
    """Configs of one block, and whether its first token is beyond the sight of the last of 20."""

    def test_the_config_loads_and_its_widths_are_those_of_the_stock_class(
        self, variant: dict[str, Any], tmp_path: Path
    ) -> None:
        index = open_checkpoint(save_model(tmp_path / "model", self.tiny, **variant))
        model = load_strictly(index.folder)
        attention, shape = model.model.layers[0].self_attn, index.shape
        assert index.family.architecture == type(model).__name__
        assert shape.head_dim == attention.head_dim
        assert attention.o_proj.in_features == shape.num_attention_heads * shape.head_dim
        assert shape.tie_word_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
        assert getattr(model.config, index.family.activation_key) == index.family.activation

    def test_keys_that_a_config_leaves_out_mean_what_stock_code_takes(self) -> None:
        model = build_model(self.tiny)
        stated = {key: value for key, value in model.config.to_dict().items() if key in _WIDTHS}
        family = families()[model.config.model_type]
        # Head counts that go with any default of the key and value heads.
        stated |= {"num_attention_heads": 32, "hidden_size": 64, "model_type": model.config.model_type}
        stock = AutoConfig.for_model(**stated)
        shape = shape_of(stated, "here")
        for key in ("num_key_value_heads", "tie_word_embeddings"):
            assert getattr(shape, key) == getattr(stock, key), key
        assert shape.head_dim == (getattr(stock, "head_dim", None) or 2)
        for key, value in family.config_defaults.items():
            assert getattr(type(stock), key) == value, key

    def test_every_tensor_is_known_and_has_the_stated_shape(
        self, variant: dict[str, Any], tmp_path: Path
    ) -> None:
        index = open_checkpoint(save_model(tmp_path / "model", self.tiny, **variant))
        stock = dict(load_strictly(index.folder).named_parameters())
        assert index.tensors.keys() == stock.keys()
        specs = {spec.name: spec for spec in index.family.specs(index.shape.num_hidden_layers)}
        for name, parameter in stock.items():
            assert tuple(axis_length(axis, index.shape) for axis in specs[name].axes) == parameter.shape, name
            assert specs[name].is_norm == ("norm" in name)
        assert {name for name, spec in specs.items() if not spec.optional} <= stock.keys()

    def test_a_norm_that_does_nothing_has_the_stated_weight(self) -> None:
        norm = type(build_model(self.tiny).model.norm)(8)
        family = families()[build_model(self.tiny).config.model_type]
        assert torch.equal(norm.weight, torch.full((8,), 1 - family.norm_offset))

    def test_the_walk_equals_the_stock_model(self, variant: dict[str, Any], tmp_path: Path) -> None:
        index = open_checkpoint(save_model(tmp_path / "model", self.tiny, **variant))
        model = load_strictly(index.folder)
        for ours, theirs in zip(walked_logits(index, model.lm_head), logits_of(model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kinds", CUTS.values(), ids=CUTS.keys())
    def test_a_cut_model_is_the_stock_model_with_the_units_silenced(
        self, kinds: frozenset[str], variant: dict[str, Any], tmp_path: Path
    ) -> None:
        index = open_checkpoint(save_model(tmp_path / "model", self.tiny, **variant))
        plan = make_plan(index.shape, kinds)
        folder = tmp_path / "expert"
        folder.mkdir()
        write_config(folder, expert_config(index, plan))
        write_weights(index, plan, folder)
        cut, original = load_strictly(folder), load_strictly(index.folder)
        silence(original, plan)
        assert open_checkpoint(folder).shape == plan.after
        assert cut.config.head_dim == index.shape.head_dim
        assert len(cut.model.layers) == plan.after.num_hidden_layers
        assert (cut.num_parameters() < original.num_parameters()) == (plan.after != plan.before)
        for ours, theirs in zip(logits_of(cut), logits_of(original), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def test_it_is_known_which_configs_have_a_sliding_window(self) -> None:
        for overrides, windowed in self.windows:
            model = build_model(self.tiny, num_hidden_layers=1, **overrides)
            first, other = torch.arange(20).unsqueeze(0) + 3, torch.arange(20).unsqueeze(0) + 3
            other[0, 0] = 50
            with torch.no_grad():
                same = torch.equal(model(first).logits[0, -1], model(other).logits[0, -1])
            stated = families()[model.config.model_type].has_sliding_window(model.config.to_dict())
            assert (same, stated) == (windowed, windowed), overrides


_WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
_SLIDING, _FULL = {"layer_types": ["sliding_attention"]}, {"layer_types": ["full_attention"]}


class TestLlama(FamilyContract):
    tiny = "llama"
    variants: ClassVar = {
        "tied": {},
        "untied": {"tie_word_embeddings": False},
        "biased": {"attention_bias": True, "mlp_bias": True},
        "wide heads": {"head_dim": 16},
    }
    windows = (({}, False),)


class TestMistral(FamilyContract):
    tiny = "mistral"
    variants: ClassVar = {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "sliding": {"sliding_window": 4},
        "wide heads": {"head_dim": 16, "sliding_window": 4},
    }
    windows = (({"sliding_window": None}, False), ({"sliding_window": 4}, True))


class TestQwen2(FamilyContract):
    tiny = "qwen2"
    variants: ClassVar = {
        "tied": {},
        "untied": {"tie_word_embeddings": False},
        "sliding": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    }
    windows = (
        ({"sliding_window": 4}, False),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, True),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, False),
    )


class TestQwen3(FamilyContract):
    tiny = "qwen3"
    variants: ClassVar = {
        "tied": {},
        "untied": {"tie_word_embeddings": False},
        "biased": {"attention_bias": True},
        "sliding": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    }
    windows = TestQwen2.windows


class TestGemma3(FamilyContract):
    tiny = "gemma3"
    variants: ClassVar = {
        "sliding and full": {},
        "one kv head": {"num_key_value_heads": 1, "num_attention_heads": 4},
        "biased": {"attention_bias": True},
        "two rotary tables far apart": {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
        "untied": {"tie_word_embeddings": False},
    }
    windows = ((_SLIDING, True), (_FULL, False))


class TestPhi3(FamilyContract):
    tiny = "phi3"
    variants: ClassVar = {
        "plain": {},
        "tied": {"tie_word_embeddings": True},
        "sliding": {"sliding_window": 4},
        "partly rotated": {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    }
    windows = TestMistral.windows


def test_every_family_has_its_contract() -> None:
    tested = {build_model(each.tiny).config.model_type for each in FamilyContract.__subclasses__()}
    assert tested == families().keys()
