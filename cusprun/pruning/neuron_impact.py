"""Impacts of single neurons in closed form: rows of Q, K and V, columns of O (FFN channels: ``impact``).

Removing a row of V or a column of O takes channels out of the sublayer's output, and their impacts stand in
the Gram matrices of the attention-weighted values, one for each channel, over the heads of a group. Removing
rows of Q or K changes the scores, and the impact is the change of the attention probabilities (arXiv
2506.02561, section 3):

    impact(k) = |softmax(s (Q K^T - q_k k_k^T) + mask) - softmax(s Q K^T + mask)|   (Frobenius, per document)

after rotary embedding (and after the norm of queries and keys, where there is one). A rotary embedding mixes
the two rows of a pair, so that the channels after it are not the rows before it, but the pair's two channels
together are the pair's two rows: pairs live and die together, and both rows have the pair's impact.

The exact change takes one softmax for each pair. For long documents it is estimated: to first order in the
change of the scores, d_ij, the change of the probabilities is -P_ij (d_ij - sum_l P_il d_il), whose squares
over all positions come from a few matrix products for all pairs at once; the ratio of exact to first-order
change at a few positions then corrects each pair. On two texts of 256 tokens, SmolLM2-135M, that ranks the
rows of a block like the exact form (Spearman 0.992 to 0.998), with a median error of 1 to 5 %.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

EXACT_TOKENS = 96
"""Documents up to this length are always computed exactly: it costs little beside their projections."""

ESTIMATED_POSITIONS = 256
"""The most query positions of a document that the estimate sums over: it bounds the cost per token."""

CORRECTED_POSITIONS = 8
"""Query positions of a longer document at which the estimate is held against the exact change."""

_CHUNK_ELEMENTS = 1 << 19
"""Changed scores in memory at once: 2 MB in float32 stay in a core's cache, and bound the memory."""

_CHUNK_ROWS = 64
"""Rows of the first-order estimate at once: few enough that a causal mask saves nearly half of the work."""


def value_and_output_impacts(
    channels: torch.Tensor, weight: torch.Tensor, head_dim: int, heads_per_group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the impacts of every row of V and of every column of O on every document.

    A row of V feeds one channel of every query head of its group, so the parts of the output that go with it
    are added before the norm is taken.

    Args:
        channels: attention-weighted values with zeros at padding, [documents, tokens, heads * head_dim].
        weight: the output projection, [features, heads * head_dim].
        head_dim: channels of a head.
        heads_per_group: query heads that share a KV head.

    Returns:
        Impacts [documents, groups * head_dim] and [documents, heads * head_dim], in the units of the output.
    """
    documents, tokens, width = channels.shape
    groups = width // (head_dim * heads_per_group)
    cut = channels.view(documents, tokens, groups, heads_per_group, head_dim)
    columns = weight.view(-1, groups, heads_per_group, head_dim)
    value_squares = channels.new_zeros(documents, groups, head_dim)
    output_squares = channels.new_zeros(documents, groups, heads_per_group, head_dim)
    # Two heads at a time: batched products of such small matrices take six times as long.
    for first in range(heads_per_group):
        for second in range(first, heads_per_group):
            gram = (cut[:, :, :, first] * cut[:, :, :, second]).sum(dim=1)
            product = gram * (columns[:, :, first] * columns[:, :, second]).sum(dim=0)
            value_squares += product if first == second else 2 * product
            if first == second:
                output_squares[:, :, first] = product
    # Rounding can take the square of an idle row below zero.
    return (
        value_squares.reshape(documents, -1).clamp_min(0).sqrt(),
        output_squares.reshape(documents, -1).sqrt(),
    )


def rotary_units(head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Return which unit of a head each channel belongs to, int64 [head_dim].

    Channels k and k + rotary_dim / 2 are a pair, one unit, for k below rotary_dim / 2; channels from
    ``rotary_dim`` on are not rotated, and each is a unit by itself.
    """
    half = rotary_dim // 2
    channel = torch.arange(head_dim)
    return torch.where(channel < rotary_dim, channel % max(half, 1), channel - half)


def spread_positions(tokens: int, count: int) -> torch.Tensor:
    """Return ``count`` (at most ``tokens``) distinct positions, evenly spread over a document, int64.

    Each stands in the middle of an equal share of the document, so that early positions, which see few keys,
    count as often as late ones.
    """
    count = min(count, tokens)
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * (tokens / count)).floor().long()


def attention_bias(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    """Return what is added to the scores before the softmax, [documents or 1, heads or 1, tokens, tokens].

    Args:
        mask: as attention functions get it: None (causal), true where a key is seen, or added as it is.
        query: [documents, heads, tokens, head_dim]; gives length, type and device.
    """
    if mask is not None and mask.dtype != torch.bool:
        return mask.to(query.dtype)
    if mask is None:
        size = query.shape[2]
        mask = torch.ones(1, 1, size, size, dtype=torch.bool, device=query.device).tril()
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, -torch.inf)


def softmax_changes(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor,
    scaling: float,
    units: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the squared change of one document's attention when each unit of each head alone is removed.

    Args:
        query: after rotary embedding and norm, [heads, tokens, head_dim], heads of a group adjacent.
        key: the same, [groups, tokens, head_dim].
        bias: added to the scores, [heads or 1, tokens, tokens].
        scaling: factor of the scores.
        units: the unit of each channel, [head_dim], as :func:`rotary_units` returns.
        positions: the query positions to sum over; all when None.

    Returns:
        Squared Frobenius norms, [heads, units].
    """
    heads, tokens, _ = query.shape
    key = key.repeat_interleave(heads // key.shape[0], dim=0)
    if positions is not None:
        positions = positions.to(query.device)
        query, bias = query[:, positions], bias[:, positions]
    members = _members(units)
    squares = query.new_zeros(heads, len(members))
    queries, keys = _gathered(query, members), _gathered(key, members).mT
    step = max(1, _CHUNK_ELEMENTS // (tokens * len(members)))
    for first, last, low, high in _visible_chunks(bias, step):
        added = bias[:, first:last, low:high].expand(heads, -1, -1)
        scores = torch.baddbmm(added, query[:, first:last], key[:, low:high].mT, alpha=scaling)
        before = torch.softmax(scores, dim=-1)
        for head in range(heads):
            without = torch.baddbmm(
                scores[head].unsqueeze(0),
                queries[head, :, first:last],
                keys[head, :, :, low:high],
                alpha=-scaling,
            )
            change = torch.softmax(without, dim=-1).sub_(before[head])
            squares[head] += torch.linalg.vector_norm(change.flatten(1), dim=1).square()
    return squares


def first_order_changes(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, scaling: float, units: torch.Tensor
) -> torch.Tensor:
    """Return the squared change at each query position to first order, [heads, positions, units].

    Arguments as of :func:`softmax_changes`, with ``query`` and the rows of ``bias`` at any positions. With
    queries a, b and keys u, w of a pair, d_ij = s (a_i u_j + b_i w_j), and with R = P * P the sum over j of
    R_ij (d_ij - sum_l P_il d_il)^2 is a quadratic form in a_i and b_i whose coefficients are the products of
    P and R with u, w, u^2, w^2 and u w.
    """
    (heads, rows, _), groups = query.shape, key.shape[0]
    # A constant added to all keys changes no softmax; without it the squares keep their digits.
    key = key - key.mean(dim=1, keepdim=True)
    members = _members(units)
    size = len(members)
    a, b = _channels(query, members.T.flatten()).chunk(2, dim=-1)  # [heads, positions, units]
    values = _channels(key, members.T.flatten())  # u and w, [groups, tokens, 2 * units]
    u, w = values.chunk(2, dim=-1)
    monomials = torch.cat([values, values * values, u * w, torch.ones_like(u[..., :1])], dim=-1)
    changes = query.new_empty(heads, rows, size)
    for first, last, low, high in _visible_chunks(bias, _CHUNK_ROWS):
        added = bias[:, first:last, low:high].expand(heads, -1, -1)
        own = key[:, low:high].repeat_interleave(heads // groups, dim=0)
        scores = torch.baddbmm(added, query[:, first:last], own.mT, alpha=scaling)
        # The heads of a group share its keys: one product for them all.
        chances = torch.softmax(scores, dim=-1).view(groups, -1, high - low)
        means = (chances @ values[:, low:high]).view(heads, -1, 2 * size)
        sums = (chances.square_() @ monomials[:, low:high]).view(heads, -1, 5 * size + 1)
        mean_u, mean_w = means.chunk(2, dim=-1)
        of_u, of_w, of_uu, of_ww, of_uw, weight = sums.split_with_sizes([size] * 5 + [1], dim=-1)
        from_a = of_uu - mean_u * (2 * of_u - mean_u * weight)
        from_b = of_ww - mean_w * (2 * of_w - mean_w * weight)
        both = of_uw - mean_u * of_w - mean_w * of_u + mean_u * mean_w * weight
        left, right = a[:, first:last], b[:, first:last]
        changes[:, first:last] = left * (left * from_a + 2 * right * both) + right * right * from_b
    return changes.clamp_min_(0).mul_(scaling**2)  # rounding can take an idle pair below zero


def estimated_changes(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor,
    scaling: float,
    units: torch.Tensor,
    rough_positions: int = ESTIMATED_POSITIONS,
    exact_positions: int = CORRECTED_POSITIONS,
) -> torch.Tensor:
    """Return :func:`softmax_changes` over all positions, estimated from some.

    The mean first-order change at ``rough_positions`` evenly spread positions stands for all, and is
    corrected for each unit of each head by the ratio of exact to first-order change at ``exact_positions`` of
    them: exact when these are all positions, and for changes so small that the first order is.
    """
    tokens = query.shape[1]
    rough_at = spread_positions(tokens, rough_positions).to(query.device)
    rough = first_order_changes(query[:, rough_at], key, bias[:, rough_at], scaling, units)
    chosen = spread_positions(len(rough_at), exact_positions).to(query.device)
    exact = softmax_changes(query, key, bias, scaling, units, rough_at[chosen])
    seen = rough[:, chosen].sum(dim=1)
    ratio = torch.where(seen > 0, exact / seen, 1)
    return rough.mean(dim=1) * tokens * ratio


def _members(units: torch.Tensor) -> torch.Tensor:
    """Return the channels of each unit, [units, 2]; -1 where a unit has only one."""
    members = torch.full((int(units.max()) + 1, 2), -1)
    for channel, unit in enumerate(units.tolist()):
        members[unit, int(members[unit, 0] >= 0)] = channel
    return members


def _channels(vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return channels [..., tokens, chosen] of [..., tokens, head_dim]; zeros where ``chosen`` is -1."""
    whole, chosen = bool((chosen >= 0).all()), chosen.to(vectors.device)
    taken = vectors.index_select(-1, chosen.clamp_min(0))
    return taken if whole else taken * (chosen >= 0)


def _gathered(vectors: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Return the channels of each unit from [heads, tokens, head_dim], as [heads, units, tokens, 2]."""
    taken = _channels(vectors, members.flatten())
    return taken.view(*taken.shape[:2], *members.shape).transpose(1, 2).contiguous()


def _visible_chunks(bias: torch.Tensor, step: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``(first, last, low, high)``: chunks of rows, and the range of keys that some row of each sees.

    Under a causal mask half of the keys are never computed, under a sliding window most.
    """
    lowest = torch.finfo(bias.dtype).min
    for first in range(0, bias.shape[1], step):
        last = min(first + step, bias.shape[1])
        seen = torch.nonzero((bias[:, first:last] > lowest).flatten(0, 1).any(dim=0))
        yield first, last, int(seen[0]), int(seen[-1]) + 1


def query_and_key_impacts(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor,
    scaling: float,
    rotary_dim: int,
    exact: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the impacts of every row of Q and of every row of K on every document.

    A row of K serves all query heads of its group: their squared changes are added.

    Args:
        query: [documents, heads, tokens, head_dim], after rotary embedding and norm.
        key: [documents, groups, tokens, head_dim], the same.
        mask: as attention functions get it (see :func:`attention_bias`).
        lengths: real tokens of each document, which stand before the padding, [documents].
        scaling: factor of the scores.
        rotary_dim: leading channels of a head that are rotated.
        exact: compute documents of more than :data:`EXACT_TOKENS` tokens exactly too, not estimated.

    Returns:
        Frobenius norms, without unit, [documents, heads * head_dim] and [documents, groups * head_dim].
    """
    documents, heads, _, head_dim = query.shape
    groups = key.shape[1]
    units = rotary_units(head_dim, rotary_dim)
    bias = attention_bias(mask, query).expand(documents, -1, -1, -1)
    changes = []
    for row, length in enumerate(lengths.tolist()):
        given = (query[row, :, :length], key[row, :, :length], bias[row, :, :length, :length], scaling, units)
        if exact or length <= EXACT_TOKENS:
            changes.append(softmax_changes(*given))
        else:
            changes.append(estimated_changes(*given))
    squares, units = torch.stack(changes), units.to(query.device)
    of_keys = squares.view(documents, groups, heads // groups, -1).sum(dim=2)
    return (
        squares[..., units].sqrt().reshape(documents, -1),
        of_keys[..., units].sqrt().reshape(documents, -1),
    )
