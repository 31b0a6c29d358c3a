"""llama.cpp's quantiser, called in this process: one GGUF file into another of a smaller type."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as QuantType
from numpy.typing import NDArray

from cusprun.errors import ExportError, MissingDependencyError, OutputError
from cusprun.llamacpp_log import collect_errors
from cusprun.progress import SILENT, Progress
from exporters.gguf_types import FILE_TYPES

_BUFFER_BYTES = 1 << 29  # rows of a tensor in memory at once; llama.cpp's own default is 8 GiB
_POLL_SECONDS = 0.1
_INSTALL = "pip install -U 'cusprun[llamacpp]'"
_WRITE_FAILURE = "iostream error"  # of the C++ standard library, for a disk that is full or gone


def require_quantiser() -> None:
    """Raise ``MissingDependencyError`` when llama-cpp-python is missing or too old."""
    if find_spec("llama_cpp") is None:
        raise MissingDependencyError(
            f"llama-cpp-python is not installed, and its quantiser makes this type; run: {_INSTALL}"
        )
    import llama_cpp

    if not hasattr(llama_cpp, "llama_model_imatrix_data"):
        raise MissingDependencyError(
            f"llama-cpp-python {llama_cpp.__version__} takes no importance matrix; run: {_INSTALL}"
        )


def quantise(
    source: Path,
    target: Path,
    quant: str,
    *,
    num_bytes: int,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    types: Mapping[str, QuantType] | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> None:
    """Quantise ``source`` into ``target``, which appears when the quantiser opens it.

    Args:
        source: a GGUF file in f32, f16 or bf16.
        target: the file to write.
        quant: what the file is named after.
        num_bytes: about how large ``target`` will be, for the progress.
        importance: float32 vectors by GGUF tensor name, finite, as long as the tensor's rows.
        types: the types of single tensors by GGUF tensor name.
        threads: threads of the quantiser, at most one per core; all cores when not given.
        progress: told how many bytes have been written.

    Raises:
        ExportError: the quantiser fails; the text says why.
        OutputError: the disk refuses to be written.
    """
    import llama_cpp

    errors = collect_errors(llama_cpp)
    llama_cpp.llama_backend_init()
    params, kept = _parameters(llama_cpp, quant, importance, types, threads)
    names = str(source).encode(), str(target).encode()
    codes: list[int] = []
    # In a thread: a Ctrl-C that arrives inside the log callback of a blocking call would be swallowed there.
    worker = threading.Thread(
        target=lambda: codes.append(llama_cpp.llama_model_quantize(*names, ctypes.byref(params))),
        daemon=True,
    )
    _watch(worker, target, quant, num_bytes, progress)
    del kept
    if codes != [0]:
        reason = (
            errors[-1].partition("failed to quantize: ")[2] or errors[-1] if errors else "no reason given"
        )
        if _WRITE_FAILURE in reason:
            raise OutputError(f"{target.parent} cannot be written; free some space or choose another disk")
        raise ExportError(f"llama.cpp cannot quantise the model to {quant}: {' '.join(reason.split())}")


def _parameters(
    llama_cpp: Any,
    quant: str,
    importance: Mapping[str, NDArray[np.float32]] | None,
    types: Mapping[str, QuantType] | None,
    threads: int | None,
) -> tuple[Any, list[Any]]:
    """Return the quantiser's parameters, and what they point to: it must live as long as they do."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(FILE_TYPES[quant])
    cores = os.cpu_count() or 1
    params.nthread = min(threads or cores, cores)
    if hasattr(params, "max_buf_size"):
        params.max_buf_size = _BUFFER_BYTES
    kept: list[Any] = []
    if importance:
        # Zeroed memory behind the last entry ends the list: its name is NULL.
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, vector) in zip(entries, importance.items(), strict=False):
            values = np.ascontiguousarray(vector, dtype=np.float32)
            kept.append(values)
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
        kept.append(entries)
    if types:
        overrides = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
        for override, (name, kind) in zip(overrides, types.items(), strict=False):
            override.pattern = f"^{name.replace('.', '[.]')}$".encode()
            override.type = int(kind)
        params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
        kept.append(overrides)
    return params, kept


def _watch(worker: threading.Thread, target: Path, quant: str, num_bytes: int, progress: Progress) -> None:
    """Run the worker to its end and report how far the file has grown; stop it when interrupted."""
    with progress.stage(f"quantising to {quant}", num_bytes, "byte") as advance:
        worker.start()
        try:
            written = 0
            while worker.is_alive():
                worker.join(_POLL_SECONDS)
                written = _report(target, written, num_bytes, advance)
            advance(num_bytes - written)
        except BaseException:
            _stop(worker, target)
            raise


def _report(target: Path, written: int, num_bytes: int, advance: Callable[[int], None]) -> int:
    with suppress(OSError):
        grown = min(target.stat().st_size, num_bytes)
        advance(grown - written)
        return grown
    return written


def _stop(worker: threading.Thread, target: Path) -> None:
    """Wait for the worker, which ends at its next write: its descriptor is turned into one for reading.

    The quantiser has no way to be told to stop, but gives up when a write fails; where descriptors cannot be
    listed, it is waited for.
    """
    while worker.is_alive():
        with suppress(OSError):
            file = target.stat()
            for name in os.listdir("/dev/fd"):  # noqa: PTH208 (numbers, not paths)
                with suppress(OSError):
                    found = os.fstat(int(name))
                    if (found.st_dev, found.st_ino) == (file.st_dev, file.st_ino):
                        _blind(int(name))
        worker.join(_POLL_SECONDS)


def _blind(descriptor: int) -> None:
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), descriptor, inheritable=False)
