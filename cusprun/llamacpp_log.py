"""llama.cpp's log: kept off the user's terminal, its errors kept for our own sentences."""

from __future__ import annotations

import ctypes
from typing import Any

_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR in ggml.h
# llama.cpp keeps the address of one callback for the whole process: dropped, the next message is a crash.
_callbacks: list[Any] = []


def collect_errors(llama_cpp: Any) -> list[str]:
    """Silence llama.cpp in this process; its error messages go to the returned list from here on."""
    errors: list[str] = []

    def collect(level: int, text: bytes, _user_data: Any) -> None:
        if level == _LEVEL_ERROR:
            errors.append(text.decode("utf-8", errors="replace").strip())

    callback = llama_cpp.llama_log_callback(collect)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    _callbacks[:] = [callback]
    return errors
