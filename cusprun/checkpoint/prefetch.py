"""Blocks read ahead of their use: the disk works while the processor does."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.safetensors_header import TensorInfo


def prefetch_layer(index: CheckpointIndex, layer: int) -> threading.Thread | None:
    """Ask the system to read decoder block ``layer`` into its cache, and return at once.

    The pages are the system's, which drops them when memory is short. Asking can itself wait for the disk, so
    a thread does it; it is returned to be waited for by who wants to. None where there is no such block, or
    where the system cannot be asked. What cannot be read is passed over: whoever reads it will say so.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    wanted = [
        index.tensors[spec.name] for spec in index.family.layer_specs(layer) if spec.name in index.tensors
    ]
    if not wanted:
        return None
    thread = threading.Thread(target=_ask, args=(wanted,), name=f"prefetch-{layer}", daemon=True)
    thread.start()
    return thread


def _ask(tensors: Sequence[TensorInfo]) -> None:
    for info in tensors:
        with suppress(OSError), info.file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), info.offset, info.num_bytes, os.POSIX_FADV_WILLNEED)
