"""The table of formats: options as texts and as records, and which format an artifact is of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cusprun.errors import CusprunError, ExportError, ModelError, UserError
from cusprun.pipeline.proof import kind_of, verify
from exporters.parity_records import limits_for
from exporters.registry import FORMATS, format_of


@pytest.mark.parametrize("name", FORMATS)
def test_every_precision_has_limits_and_the_default_is_one(name: str) -> None:
    chosen = format_of(name)
    assert chosen.default_quant in chosen.quants
    assert chosen.calibrated <= set(chosen.quants)
    for quant in chosen.quants:
        assert limits_for(name, quant).perplexity_ratio_max


@pytest.mark.parametrize("name", FORMATS)
def test_every_option_has_a_default_of_a_kind_that_a_text_can_give(name: str) -> None:
    for field in format_of(name).option_fields():
        assert field.default is None or isinstance(field.default, bool | int | str | tuple)
    assert format_of(name).options({}) == format_of(name).options(format_of(name).parse_options(()))


def test_options_are_read_as_the_kind_of_their_default() -> None:
    texts = ("imatrix=false", "threads=3", "tensor_types=ffn_down=q6_k", "tensor_types=attn_v=q8_0")
    found: Mapping[str, Any] = FORMATS["gguf"].parse_options(texts)
    assert found == {"imatrix": False, "threads": 3, "tensor_types": ("ffn_down=q6_k", "attn_v=q8_0")}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("imatrx=false", "imatrix"),
        ("imatrix", "NAME=VALUE"),
        ("imatrix=perhaps", "true or false"),
        ("threads=many", "a whole number"),
    ],
)
def test_a_wrong_option_is_refused_with_what_would_do(text: str, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        FORMATS["gguf"].parse_options((text,))


def test_unknown_format_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="onnx"):
        format_of("onx")


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        kind_of(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path / "notes.txt", tmp_path):
        with pytest.raises(CusprunError, match="known format"):
            kind_of(path)


def test_nothing_to_verify_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no artifacts"):
        verify(tmp_path, [])
