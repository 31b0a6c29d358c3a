"""Closed forms against brute force: remove each unit from a real block, run again, compare."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import FAMILIES, build_model

from cusprun.pruning.impact import channel_impacts, head_impacts


def _capture(module: torch.nn.Module, run: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input and output of ``module`` while ``run`` runs."""
    seen: dict[str, torch.Tensor] = {}
    handle = module.register_forward_hook(lambda _m, args, out: seen.update(input=args[0], output=out))
    try:
        run()  # type: ignore[operator]
    finally:
        handle.remove()
    return seen["input"], seen["output"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_impacts_equal_removal_one_by_one(family: str, layer: int) -> None:
    model = build_model(family).double()
    config = model.config
    ids = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 7:] = False
    block = model.model.layers[layer]

    def run() -> None:
        with torch.no_grad():
            model(ids)

    def removal_norms(module: torch.nn.Linear, columns: list[list[int]]) -> torch.Tensor:
        _, full = _capture(module, run)
        rows = []
        own = copy.deepcopy(module.weight.data)
        for unit in columns:
            module.weight.data[:, unit] = 0
            _, without = _capture(module, run)
            rows.append(((full - without) * mask.unsqueeze(-1)).flatten(1).norm(dim=1))
            module.weight.data.copy_(own)
        return torch.stack(rows, dim=1)

    down, out = block.mlp.down_proj, block.self_attn.o_proj
    head_dim, per_group = config.head_dim if getattr(config, "head_dim", None) else 8, 2
    channels, _ = _capture(down, run)
    expected = removal_norms(down, [[k] for k in range(config.intermediate_size)])
    torch.testing.assert_close(channel_impacts(channels, mask, down.weight), expected, rtol=1e-6, atol=1e-12)

    values, _ = _capture(out, run)
    heads, groups = head_impacts(values, mask, out.weight, head_dim, per_group)
    head_columns = [list(range(h * head_dim, (h + 1) * head_dim)) for h in range(6)]
    group_columns = [head_columns[2 * g] + head_columns[2 * g + 1] for g in range(3)]
    torch.testing.assert_close(heads, removal_norms(out, head_columns), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(groups, removal_norms(out, group_columns), rtol=1e-6, atol=1e-12)
