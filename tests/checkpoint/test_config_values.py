"""Config values of other types and out of range are refused where a folder is opened, in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import FAMILIES, VOCAB, save_model
from transformers import CONFIG_MAPPING

from cusprun.checkpoint.files import stop_ids
from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import ModelError
from cusprun.families import families


def change(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("config") / "tiny")


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> Path:
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return change(tmp_path, **changes)

    return make


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_position_embeddings": -5}, "max_position_embeddings must be a whole number from 1 .* not -5"),
        ({"max_position_embeddings": "512"}, "max_position_embeddings must be a whole number"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings must be a whole number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number from 0 up, not '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number from 0 up, not nan"),
        ({"sliding_window": "8"}, "sliding_window must be a whole number"),
        ({"sliding_window": 0}, "sliding_window must be a whole number"),
        ({"sliding_window": True}, "sliding_window must be a whole number"),
        ({"query_pre_attn_scalar": -4}, "query_pre_attn_scalar must be a number above 0"),
        ({"layer_types": "full_attention"}, "layer_types must be a list of texts"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 blocks"),
        ({"hidden_act": ["silu"]}, "hidden_act must be text"),
        ({"eos_token_id": "2"}, "eos_token_id must be a token id or a list of them, not '2'"),
        ({"eos_token_id": [2, None]}, "eos_token_id must be a token id or a list of them"),
        ({"bos_token_id": [1]}, "bos_token_id must be a token id"),
        ({"rope_parameters": "yarn"}, "rope_parameters must be a mapping, not 'yarn'"),
        ({"rope_scaling": [1]}, "rope_scaling must be a mapping"),
        ({"rope_theta": 0}, "rope_theta must be a number above 0"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0}},
            "rope_parameters.factor must be a number above 0, not 0",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": "1e4"}}},
            "rope_parameters.full_attention.rope_theta must be a number above 0",
        ),
    ],
)
def test_values_that_cannot_be_are_refused(changed: Any, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        open_checkpoint(changed(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None, "rope_scaling": None, "eos_token_id": None, "layer_types": None},
        {"eos_token_id": [2, 3], "pad_token_id": -1, "rms_norm_eps": 0},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4, "attention_factor": None, "truncate": False}},
    ],
)
def test_null_and_odd_but_sound_values_are_taken(changed: Any, changes: dict[str, Any]) -> None:
    assert open_checkpoint(changed(**changes)).shape.vocab_size == VOCAB


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_of_a_family_are_those_of_the_stock_config(name: str) -> None:
    family = families()[FAMILIES[name]["model_type"]]
    stock = CONFIG_MAPPING[family.model_type]()
    for key in ("max_position_embeddings", "rms_norm_eps", "eos_token_id"):
        assert family.config_defaults.get(key) == getattr(stock, key), key


@pytest.mark.parametrize(
    ("config", "generation", "own", "wanted"),
    [
        ({"eos_token_id": 5}, {}, None, [5]),
        ({"eos_token_id": [7, 5]}, {"eos_token_id": [5, 6]}, 9, [9, 5, 6, 7]),
        ({"model_type": "llama"}, {}, None, [2]),  # LlamaConfig's own
        ({"model_type": "llama"}, {"eos_token_id": 4}, None, [4]),
        ({"model_type": "qwen2"}, {}, None, []),
        ({"eos_token_id": [-1, 10, 3]}, {"eos_token_id": 99}, None, [3]),
    ],
)
def test_stop_ids(config: dict[str, Any], generation: dict[str, Any], own: int | None, wanted: Any) -> None:
    assert stop_ids(config, generation, 10, own) == wanted
