"""A device that only seems to be one: host tensors that refuse to meet other host tensors.

A forgotten transfer shows as the error that a real accelerator would raise, on any machine. ``ipu`` is a name
that torch knows and needs no library for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cusprun.walk.device import Device

ELSEWHERE = Device("ipu:0")
_AWAY = torch.device(ELSEWHERE.name)
_MOVES = (torch.ops.aten._to_copy, torch.ops.aten.to)


class AwayTensor(torch.Tensor):
    """Says that it is on the other device; its values are those of the host tensor ``held``."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> AwayTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=_AWAY
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nonzero, torch.Tensor.nonzero):
            return AwayTensor(torch.nonzero(args[0].held))
        with torch._C.DisableTorchFunctionSubclass():  # what comes back to the host is a plain tensor
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    # For these torch would look for the device's library. Reading one value needs no transfer of ours.
    def __getitem__(self, index: Any) -> AwayTensor:
        _refuse_host("index", tree_leaves(index))
        return AwayTensor(self.held[tree_map(_bare, index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        _refuse_host("index_put", tree_leaves((index, value)))
        self.held[tree_map(_bare, index)] = _bare(value)

    def __bool__(self) -> bool:
        return bool(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __float__(self) -> float:
        return float(self.held)

    def contiguous(self, **options: Any) -> AwayTensor:
        return self if self.held.is_contiguous(**options) else AwayTensor(self.held.contiguous(**options))

    def __invert__(self) -> torch.Tensor:
        return torch.bitwise_not(self)

    def item(self) -> Any:
        return self.held.item()

    def tolist(self) -> Any:
        return self.held.tolist()


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        self.operations += any(isinstance(leaf, AwayTensor) for leaf in leaves)
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the host; what it gives is away when a device says so or, without one, an argument is."""
    leaves = tree_leaves((args, kwargs))
    away = [leaf for leaf in leaves if isinstance(leaf, AwayTensor)]
    wanted = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    goes_away = bool(away) if wanted is None else wanted.type == _AWAY.type
    if func.overloadpacket is torch.ops.aten.copy_:
        goes_away = isinstance(args[0], AwayTensor)
    elif away and func.overloadpacket not in _MOVES:
        _refuse_host(func, leaves)
    bare_args, bare_kwargs = tree_map(_bare, (args, kwargs))
    result = func(*bare_args, **bare_kwargs)
    if (
        wanted is not None
        and isinstance(args[0], torch.Tensor)
        and goes_away != isinstance(args[0], AwayTensor)
    ):
        result = result.clone()  # a transfer never shares memory
    own = {id(tensor.held): tensor for tensor in away}  # what works in place returns its argument

    def wrapped(leaf: Any) -> Any:
        return own[id(leaf)] if id(leaf) in own else AwayTensor(leaf)

    return (
        tree_map(lambda leaf: wrapped(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
        if (goes_away)
        else result
    )


def _refuse_host(what: object, leaves: list[Any]) -> None:
    """Single numbers may come from the host, as for a real accelerator."""
    home = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, AwayTensor)]
    shapes = [tuple(tensor.shape) for tensor in home]
    assert not any(shapes), f"{what} got tensors of two devices; those on the host are {shapes}"


def _bare(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu") if leaf.type == _AWAY.type else leaf
    return leaf.held if isinstance(leaf, AwayTensor) else leaf


@contextmanager
def elsewhere() -> Iterator[_Mode]:
    """Let ``ELSEWHERE`` be a device for the length of the block; counts the operations on it."""
    # A wrapper made outside of inference mode cannot be viewed inside.
    with torch.inference_mode(), _Mode() as mode:
        yield mode
