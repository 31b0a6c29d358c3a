"""The roofline: work by counting every weight of a real model, limits by hand, the machine's own speeds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.bench.hardware import measure_hardware
from serve.bench.metrics import metrics_of
from serve.bench.records import BenchOptions, Comparison, Interval
from serve.bench.roofline import Speeds, Work, bound, decode_work, prompt_work, roofline

sys.path.insert(0, str(Path(__file__).parent.parent / "exporters"))

WORK = Work(1000, 10, 4000.0, 500.0, 3.0)


def test_work_of_decoding_by_adding_up_token_by_token() -> None:
    """Token i of the continuation attends to the depth, to those before it and to itself."""
    depth, count = 7, 5
    positions = [depth + i for i in range(1, count + 1)]
    num_bytes = sum(1000 + 10 * position for position in positions) / count
    flops = sum(4000 + 500 + 3 * position for position in positions) / count
    assert decode_work(WORK, depth, count) == pytest.approx((num_bytes, flops))


@pytest.mark.parametrize(("length", "reads"), [(1, 1), (4, 1), (5, 2), (9, 3)])
def test_work_of_a_prompt_by_adding_up(length: int, reads: int) -> None:
    """Weights are read once for each batch of 4, logits made for the last token alone."""
    flops = sum(4000 + 3 * position for position in range(1, length + 1)) + 500
    expected = ((1000 * reads + 10 * length) / length, flops / length)
    assert prompt_work(WORK, length, batch=4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("speeds", "measured", "limit", "reached", "by"),
    [
        (Speeds(1e4, 1e6), 8.0, 10.0, 0.8, "memory"),
        (Speeds(1e6, 1e4), 4.5, 5.0, 0.9, "arithmetic"),
        (Speeds(1e4, 1e6), 2.0, 10.0, 0.2, "overhead"),
    ],
)
def test_a_speed_is_bound_by_the_slower_of_the_two(
    speeds: Speeds, measured: float, limit: float, reached: float, by: str
) -> None:
    found = bound("after", "x", (1000.0, 2000.0), speeds, measured)
    assert found.limit_tokens_per_second == pytest.approx(limit)
    assert found.reached == pytest.approx(reached)
    assert found.bound_by == by


@given(st.floats(1, 1e9), st.floats(1, 1e9), st.floats(1, 1e12), st.floats(1, 1e12))
def test_no_limit_is_above_what_either_allows(
    num_bytes: float, flops: float, rate: float, peak: float
) -> None:
    found = bound("before", "x", (num_bytes, flops), Speeds(rate, peak), 1.0)
    assert found.limit_tokens_per_second <= min(rate / num_bytes, peak / flops) * (1 + 1e-9)


def comparison(name: str, before: float, after: float) -> Comparison:
    one, other, ratio = (Interval(v, v, v) for v in (before, after, after / before))
    return Comparison(name, name, "tokens/s", "higher", one, other, ratio, 0.01, "faster")


def test_every_speed_gets_its_limits_and_a_reason() -> None:
    options = BenchOptions(prompt_lengths=(64,), context_depths=(64, 8), num_decode_tokens=4)
    names = [metric.name for metric in metrics_of(options) if metric.is_speed]
    half = Work(500, 10, 2000.0, 500.0, 3.0)
    speeds = dict.fromkeys(("before", "after"), Speeds(1e5, 1e9))
    found = roofline(
        options, [comparison(name, 60.0, 90.0) for name in names], {"before": WORK, "after": half}, speeds
    )
    assert [entry.metric for entry in found.bounds[::2]] == names
    assert [entry.side for entry in found.bounds] == ["before", "after"] * 3
    assert len(found.notes) == 3
    decode = next(note for note in found.notes if note.startswith("decode_tokens_per_second@8:"))
    # 1000 + 10 * 10.5 bytes before, 500 + 10 * 10.5 after: × 1.83 is allowed, × 1.50 came
    assert "× 1.50, where bytes per token allow × 1.83" in decode
    assert "54% of what this machine allows" in decode
    assert "bound by reading weights and cache from memory" in decode


def test_the_machine_reads_and_multiplies() -> None:
    """No machine that runs this reads under 100 MB/s or over 10 TB/s."""
    found = measure_hardware((1 << 22, 1 << 23), 1)
    assert found is not None
    assert set(found) == {1 << 22, 1 << 23}
    for speeds in found.values():
        assert 1e8 < speeds.bytes_per_second < 1e13
        assert 1e8 < speeds.flops_per_second < 1e14


@pytest.mark.parametrize("tied", [True, False])
def test_the_work_of_real_files_against_the_model_itself(tmp_path: Path, tied: bool) -> None:
    """Products by hooks on every linear layer, bytes by the sizes of the tensors that it reads."""
    import torch
    from tiny_exports import TinyConfig, make_folder
    from transformers import AutoModelForCausalLM

    from cusprun.pipeline.bench_work import work_of
    from exporters.registry import format_of

    folder = make_folder(tmp_path / "tiny", TinyConfig("llama", {"tie_word_embeddings": tied}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    counted = {"head": 0, "block": 0}

    def count(module: torch.nn.Module, inputs: object, _output: object) -> None:
        kind = "head" if module is model.lm_head else "block"
        counted[kind] += 2 * module.weight.numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    with torch.inference_mode():
        cache = model(input_ids=torch.tensor([[1]]), use_cache=True).past_key_values
    items = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    # What no product uses is norms, which are read, and an untied embedding, of which a token reads one row.
    numbers = sum(parameter.numel() for parameter in model.parameters())
    read = numbers if tied else numbers - model.model.embed_tokens.weight.numel()
    heads = model.config.num_attention_heads * model.model.layers[0].self_attn.head_dim
    attention = 4.0 * model.config.num_hidden_layers * heads

    exported = {"torch": (folder, 4, cache.layers[0].keys.element_size())}
    if pytest.importorskip("llama_cpp"):
        exported["llamacpp"] = (format_of("gguf").export(folder, tmp_path / "m.gguf", quant="f32"), 4, 2)
    if pytest.importorskip("onnx_ir"):
        exported["onnx"] = (format_of("onnx").export(folder, tmp_path / "m-onnx", quant="fp32"), 4, 4)
    for runtime, (path, item_bytes, cache_bytes) in exported.items():
        work = work_of(runtime, path)
        assert work is not None, runtime
        assert work.block_flops == counted["block"], runtime
        assert work.head_flops == counted["head"], runtime
        assert work.attention_flops_per_position == attention, runtime
        assert work.cache_bytes_per_position == items * cache_bytes, runtime
        assert work.weight_bytes == pytest.approx(read * item_bytes, rel=0.02), runtime


def test_work_that_headers_do_not_tell_is_none(tmp_path: Path) -> None:
    from cusprun.pipeline.bench_work import work_of

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for runtime in ("torch", "vllm", "onnx"):
        assert work_of(runtime, tmp_path) is None
    assert work_of("llamacpp", tmp_path / "m.gguf") is None
