"""A whole model as transformers runs it, in the type its weights are stored in, for generating text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cusprun.errors import DeviceError, ModelError
from cusprun.walk.device import CPU, Device


def load_stock_model(folder: Path, device: Device = CPU) -> Any:
    """Load a Hugging Face folder into ``AutoModelForCausalLM``; no network, no code from the folder.

    Raises:
        DeviceError: the device has too little memory for the whole model.
        ModelError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _without_bars():
            model = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype="auto",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:  # a damaged file raises whatever its parser raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{folder} cannot be loaded by transformers ({reason}); check its files") from None
    return _moved(model.eval(), device)


def _moved(model: Any, device: Device) -> Any:
    if device.is_host:
        return model
    import torch

    try:
        return model.to(device.name)
    except torch.OutOfMemoryError:
        raise DeviceError(
            f"{device.name} has too little memory for the whole model, which generating text takes; free "
            "some of it, or take another device or the cpu"
        ) from None


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from showing bars of its own beside ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
