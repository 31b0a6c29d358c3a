"""Which stretch of which tensor holds the neurons of each kind, by the meaning of the tensors' axes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from cusprun.families import TensorSpec, axis_length
from cusprun.pruning.magnitude import squares_along
from cusprun.records import Shape


@dataclass(frozen=True)
class NeuronStretch:
    """Neurons of one kind: ``length`` positions from ``start`` along ``axis`` of the tensor ``name``."""

    name: str
    kind: str
    axis: int
    start: int
    length: int


def neuron_stretches(specs: Iterable[TensorSpec], shape: Shape) -> Iterator[NeuronStretch]:
    """Yield the stretches of a block's tensors that hold neurons.

    Along their first axis, tensors of ``heads`` hold rows of Q; of ``kv``, rows of K in the first tensor (or
    part of a fused axis) that the family lists and of V in the second, weights and biases counted apart.
    Along their second axis, ``heads`` are columns of O. Every ``ffn`` is FFN channels.
    """
    keyed: set[str] = set()
    for spec in specs:
        suffix = spec.name.rpartition(".")[2]
        for axis, name in enumerate(spec.axes):
            start = 0
            for part in name.split("+"):
                length = axis_length(part, shape)
                kind = {"ffn": "ffn_channel", "heads": ("query_row", "output_column")[min(axis, 1)]}.get(part)
                if part == "kv":
                    kind = "value_row" if suffix in keyed else "key_row"
                    keyed.add(suffix)
                if kind is not None:
                    yield NeuronStretch(spec.name, kind, axis, start, length)
                start += length


def neuron_squares(
    tensors: Iterable[tuple[TensorSpec, torch.Tensor]], shape: Shape
) -> dict[str, torch.Tensor]:
    """Return the squared norm of all weights of every neuron, biases too: float64 [neurons] per kind."""
    held = {spec.name: (spec, tensor) for spec, tensor in tensors}
    squares: dict[str, torch.Tensor] = {}
    for stretch in neuron_stretches([spec for spec, _ in held.values()], shape):
        tensor = held[stretch.name][1].narrow(stretch.axis, stretch.start, stretch.length)
        along = squares_along(tensor, stretch.axis)
        squares[stretch.kind] = squares.get(stretch.kind, torch.zeros_like(along)) + along
    return squares
