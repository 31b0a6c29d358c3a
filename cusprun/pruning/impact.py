"""Impacts in closed form: how much a sublayer's output changes when one unit alone is removed.

A sublayer's last projection reads channels and sums them: y = W c. Removing a block B of channels removes
W[:, B] c[B], so the impact on a document with tokens t is (arXiv 2506.02561, section 3)

    impact(B)^2 = sum_t |W[:, B] c_t[B]|^2 = <C_B, W[:, B]^T W[:, B]>,   C_B = sum_t c_t[B] c_t[B]^T.

A single FFN channel k is the block of one: impact = |c[k]| * |W[:, k]|. One dense pass that sees the
channels c therefore scores every unit at once.
"""

from __future__ import annotations

import torch

_PRODUCT_ELEMENTS = 1 << 23
"""Entries of the products of groups in memory at one time, 34 MB: short documents come in large batches."""


def masked_channels(channels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return [documents, tokens, channels] with zeros where ``mask`` [documents, tokens] is false."""
    return channels if bool(mask.all()) else torch.where(mask.unsqueeze(-1), channels, 0)


def channel_norms(channels: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm over tokens of every masked channel, [documents, channels]."""
    return channels.square().sum(dim=1).sqrt()  # vector_norm across rows takes six times as long


def channel_sums(channels: torch.Tensor) -> torch.Tensor:
    """Return the sum over all documents and tokens of every masked channel, [channels]."""
    rows = channels.flatten(0, 1)
    return rows.new_ones(len(rows)) @ rows  # as a product at memory speed; sum(0) is half as fast


def channel_impacts(channels: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the impact of every single channel on every document.

    Args:
        channels: input of the projection, [documents, tokens, channels].
        mask: true at real tokens, [documents, tokens].
        weight: the projection, [features, channels].

    Returns:
        Euclidean norms over tokens and features, [documents, channels], in the units of the output.
    """
    column_norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=0)
    return channel_norms(masked_channels(channels, mask)) * column_norms


def head_impacts(
    channels: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    head_dim: int,
    heads_per_group: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the impacts of every query head and of every KV group on every document.

    Args:
        channels: attention-weighted values, [documents, tokens, heads * head_dim], heads of a group adjacent.
        mask: true at real tokens, [documents, tokens]; None when ``channels`` is masked already.
        weight: the output projection, [features, heads * head_dim].
        head_dim: channels of a head.
        heads_per_group: query heads that share a KV head.

    Returns:
        Impacts of heads [documents, heads] and of groups [documents, groups], in the units of the output.
    """
    width = channels.shape[-1]
    block = head_dim * heads_per_group
    groups = width // block
    masked = channels if mask is None else masked_channels(channels, mask)
    columns = weight.view(-1, groups, block).permute(1, 2, 0)
    within = columns @ columns.transpose(-1, -2)  # [groups, block, block]
    step = max(1, _PRODUCT_ELEMENTS // within.numel())
    found = [_group_impacts(part, within, heads_per_group) for part in torch.split(masked, step)]
    heads, whole = zip(*found, strict=True)
    return torch.cat(heads), torch.cat(whole)


def _group_impacts(
    masked: torch.Tensor, within: torch.Tensor, heads_per_group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what :func:`head_impacts` does, of documents whose products are in memory at one time.

    ``within`` is W^T W of each group's columns, [groups, block, block].
    """
    documents, tokens, _ = masked.shape
    groups, block, _ = within.shape
    head_dim = block // heads_per_group
    blocks = masked.view(documents, tokens, groups, block).transpose(1, 2)
    product = (blocks.transpose(-1, -2) @ blocks).mul_(within)  # [documents, groups, block, block]
    # A head is a diagonal block of its group's product.
    heads = product.view(documents, groups, heads_per_group, head_dim, heads_per_group, head_dim)
    head_squares = torch.diagonal(heads.sum(dim=(3, 5)), dim1=-2, dim2=-1)
    # Rounding can take the square of an idle unit below zero.
    return (
        head_squares.reshape(documents, -1).clamp_min(0).sqrt(),
        product.sum(dim=(-2, -1)).clamp_min(0).sqrt(),
    )


def block_impacts(
    before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a whole block's impact on every document, and the sum of its relative increments.

    A block changes the stream x_in to x_out. Its increment is taken relative to |x_out| at each token,
    because a few tokens of huge norm would decide otherwise:
    impact^2 = sum_t |x_out,t - x_in,t|^2 / |x_out,t|^2.

    Args:
        before: the stream that enters, [documents, tokens, features].
        after: the stream that leaves, the same shape.
        mask: true at real tokens, [documents, tokens].

    Returns:
        Impacts [documents, 1], without unit, and the relative increment added up over all tokens [features].
    """
    increment = after - before
    # A stream of exact zeros can only be left by a block that adds nothing to nothing: no increment.
    norms = torch.linalg.vector_norm(after, dim=-1)
    scales = torch.where(mask & (norms > 0), 1 / norms, 0)
    relative = torch.linalg.vector_norm(increment, dim=-1) * scales
    impacts = torch.linalg.vector_norm(relative, dim=1, keepdim=True)
    return impacts, scales.flatten() @ increment.flatten(0, 1)
