"""Looking at models and bringing them in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.cache import fresh_output
from cusprun.errors import ModelError
from cusprun.progress import SILENT, Progress
from cusprun.resolve import StrPath, locate

if TYPE_CHECKING:
    from cusprun.checkpoint.inspect import Inspection


def import_gguf(file: StrPath, out: StrPath, *, dtype: str = "auto", progress: Progress = SILENT) -> Path:
    """Turn a GGUF file into a Hugging Face folder that stock transformers load, and return the folder.

    ``dtype`` is ``auto`` (the type that most weights have, float16 for quantised ones), ``float32``,
    ``float16`` or ``bfloat16``. ``file`` may be ``package:NAME``.

    Raises:
        ModelError: the file is missing, damaged, or holds NaN or infinite weights.
        UnsupportedModelError: an architecture, tokenizer or tensor type that cannot be carried over.
        OutputError: ``out`` exists, cannot be written or does not fit on the disk.
    """
    from cusprun.checkpoint.gguf_import import import_gguf as run_import

    target = fresh_output(out)
    path = locate(file, progress).path
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give a GGUF file")
    return run_import(path, target, dtype=dtype, progress=progress)


def inspect(path: StrPath, *, progress: Progress = SILENT) -> Inspection:
    """Say what a model is made of: parameters, bytes and shapes by part. Reads headers alone.

    A GGUF file is described as it is, not as it would be after an import.

    Raises:
        ModelError: there is no such model, or it is damaged.
        UnsupportedModelError: a family that is not supported.
    """
    from cusprun.checkpoint.inspect import inspect as run_inspect

    return run_inspect(locate(path, progress).path)
