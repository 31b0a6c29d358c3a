"""Look at every weight before anything is written."""

from __future__ import annotations

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import ExportError
from cusprun.progress import Progress

_LARGEST_FLOAT16 = 65504.0


def check_weights(index: CheckpointIndex, quant: str, progress: Progress) -> None:
    """Raise for weights that no export can hold; one tensor is in memory at a time.

    Raises:
        ModelError: a tensor holds NaN or infinite values, or cannot be read.
        ExportError: a weight is too large for float16, when that is the precision.
    """
    import torch

    from cusprun.checkpoint.reader import read_tensor

    with progress.stage("checking weights", len(index.tensors), "tensor") as advance:
        for name in index.tensors:
            tensor = read_tensor(index, name)
            if quant == "fp16":
                largest = max(abs(float(end)) for end in torch.aminmax(tensor))
                if largest > _LARGEST_FLOAT16:
                    raise ExportError(
                        f"{index.folder}: {name} holds {largest:.3g}, too large for fp16; use fp32"
                    )
            advance(1)
