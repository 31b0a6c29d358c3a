"""Where models are run: the one place that chooses a device and moves tensors to it and back.

Weights, one batch and Gram matrices are on the device; documents, hidden states and results on the host.
Importing this costs no torch, so that a device can be named, and a misspelt one refused, without it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cusprun.errors import DeviceError, nearest, require_kind, require_known

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DEFAULT_DEVICE = "cpu"
"""The same command then gives the same bytes with and without a GPU, and takes no GPU unasked."""

DTYPES = ("float32", "bfloat16")
DEFAULT_DTYPE = "float32"

_NAMES = ("auto", "cpu", "cuda")
_PATTERN = re.compile(r"auto|cpu|cuda(:\d{1,4})?")


@dataclass(frozen=True)
class Device:
    """A device by torch's name for it, ``cpu`` or ``cuda:N``, and how blocks are computed there.

    ``dtype`` is the type in which the linear layers of scoring and refit multiply, one of ``DTYPES``.
    """

    name: str = "cpu"
    dtype: str = DEFAULT_DTYPE

    @property
    def is_host(self) -> bool:
        """Whether nothing needs to be moved."""
        return self.name == "cpu"

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.name.partition(":")[0]

    @property
    def in_float32(self) -> Device:
        """The same device for what is to be computed exactly: likelihoods and importances."""
        return replace(self, dtype=DEFAULT_DTYPE)

    @property
    def arithmetic(self) -> str:
        """The kind, and the type of products where it is not float32: ``cpu``, ``cuda, bfloat16``."""
        return self.kind if self.dtype == DEFAULT_DTYPE else f"{self.kind}, {self.dtype}"

    @property
    def key(self) -> tuple[str, ...]:
        """What the key of a cached result says of the device: nothing for the CPU, else what it computes in.

        Sums are added in another order there, so results agree to rounding and not bit by bit. One kind's
        devices are taken as alike, as CPUs are, whose results also depend on their vector units.
        """
        return () if self.arithmetic == DEFAULT_DEVICE else (self.arithmetic,)

    @property
    def label(self) -> str:
        """The device for people, like ``cuda:0 (NVIDIA H100, CUDA 13.0)`` or ``cpu, bfloat16``."""
        if self.dtype != DEFAULT_DTYPE:
            return f"{self.in_float32.label}, {self.dtype}"
        if not self.name.startswith("cuda"):
            return self.name
        import torch

        version = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        return f"{self.name} ({torch.cuda.get_device_name(self.name)}, {version})"

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the device; itself when it is there."""
        return tensor if self.is_host else tensor.to(self.name)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the host; itself when it is there."""
        return tensor if self.is_host else tensor.cpu()

    def free(self) -> None:
        """Give memory that no tensor uses back to the device; the host's needs no help."""
        if self.name.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Multiply float32 matrices in float32 for the length of the block.

        TF32 keeps 10 of 23 bits: impacts would agree with the CPU's to 1e-3 and Gram matrices lose their
        Cholesky factors. It is off unless this process or its environment has turned it on.
        """
        if self.is_host:
            yield
            return
        import torch

        before = torch.get_float32_matmul_precision()
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if before != "highest":
                torch.set_float32_matmul_precision(before)


CPU = Device()


def check_device(name: str) -> None:
    """Raise ``DeviceError`` when a name is not of the form ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    require_kind(name, str, "the device", DeviceError)
    if not _PATTERN.fullmatch(name):
        raise DeviceError(f"unknown device {name!r}{nearest(name, _NAMES)} (known: auto, cpu, cuda, cuda:N)")


def check_dtype(dtype: str) -> None:
    """Raise ``DeviceError`` when a type is not one that blocks can multiply in."""
    require_kind(dtype, str, "the dtype", DeviceError)
    require_known(dtype, DTYPES, "dtype", DeviceError)


def open_device(name: str = DEFAULT_DEVICE, number: int = 0, dtype: str = DEFAULT_DTYPE) -> Device:
    """Return a device that works; ``auto`` is a CUDA device that does, else the CPU.

    ``number`` is that of the CUDA device when ``name`` has none; ``dtype`` what blocks multiply in.

    Raises:
        DeviceError: the name or the type is unknown, or the device is not there or does not work.
    """
    check_dtype(dtype)
    device = replace(_opened(name, number), dtype=dtype)
    if dtype == "bfloat16" and not _has_bfloat16(device):
        log.info("note: %s has no products of bfloat16 and makes them in more steps; float32 is faster", name)
    return device


def _has_bfloat16(device: Device) -> bool:
    import torch

    if not device.is_host:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def _opened(name: str, number: int) -> Device:
    check_device(name)
    if name == "cpu":
        return CPU
    try:
        return _open_cuda(name if name.startswith("cuda:") else f"cuda:{number}")
    except DeviceError:
        if name != "auto":
            raise
        return CPU


def _open_cuda(name: str) -> Device:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        cause = (
            "torch finds no GPU or driver; check both with `cusprun doctor`"
            if built
            else f"torch {torch.__version__} is built without CUDA; install a build of torch with it"
        )
        raise DeviceError(f"the device {name} cannot be used: {cause}, or take the device cpu")
    number, count = int(name.partition(":")[2]), torch.cuda.device_count()
    if number >= count:
        highest = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0"
        raise DeviceError(f"there is no device {name}: torch sees {count} ({highest}); take one of these")
    device = Device(f"cuda:{number}")
    try:
        probe = torch.ones(8, 8, device=device.name)
        float((probe @ probe).sum())
    except RuntimeError as error:  # a driver too old, a GPU that torch has no code for, no memory left
        reason = " ".join(str(error).split())
        raise DeviceError(
            f"the device {device.name} does not work ({reason:.200}); see `cusprun doctor`, or take the "
            "device cpu"
        ) from None
    return device
