"""onnxruntime-genai through its C interface, whose calls let other Python threads run.

The library's Python module holds the interpreter lock while it reads a prompt or makes a token, and meanwhile
the server could neither send a token nor see that a client has left. ``ctypes`` gives the lock up.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cusprun.errors import MissingDependencyError, ModelError, reason_of
from serve.runtimes.onnx_genai import require
from serve.runtimes.onnx_plain import INSTALL

_LIBRARIES = ("libonnxruntime-genai.so", "libonnxruntime-genai.dylib", "onnxruntime-genai.dll")
_P, _TEXT, _OUT = ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)
_IDS = ctypes.POINTER(ctypes.c_int32)
_SIGNATURES: Mapping[str, tuple[Any, ...]] = {
    "OgaCreateConfig": (_TEXT, _OUT),
    "OgaConfigOverlay": (_P, _TEXT),
    "OgaCreateModelFromConfig": (_P, _OUT),
    "OgaCreateGeneratorParams": (_P, _OUT),
    "OgaGeneratorParamsSetSearchNumber": (_P, _TEXT, ctypes.c_double),
    "OgaGeneratorParamsSetSearchBool": (_P, _TEXT, ctypes.c_bool),
    "OgaCreateGenerator": (_P, _P, _OUT),
    "OgaGenerator_AppendTokens": (_P, _IDS, ctypes.c_size_t),
    "OgaGenerator_GenerateNextToken": (_P,),
    "OgaGenerator_GetNextTokens": (_P, ctypes.POINTER(_IDS), ctypes.POINTER(ctypes.c_size_t)),
}
"""Arguments of the functions of ``ort_genai_c.h`` that are used; each returns null or an error."""
_DESTROYERS = ("Config", "Model", "GeneratorParams", "Generator", "Result")


class GenaiError(RuntimeError):
    """What the library says."""


class _Library:
    """The functions of the shared library that the Python module has loaded."""

    def __init__(self) -> None:
        require()
        import onnxruntime_genai

        onnxruntime_genai.disable_telemetry_events()
        folder = Path(onnxruntime_genai.__file__).parent
        found = next((folder / name for name in _LIBRARIES if (folder / name).is_file()), None)
        if found is None:
            raise MissingDependencyError(
                f"onnxruntime-genai at {folder} has no shared library of its own; run: {INSTALL}"
            )
        self._functions = ctypes.CDLL(str(found))
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._functions, name)
            function.argtypes, function.restype = arguments, _P
        for kind in _DESTROYERS:
            function = getattr(self._functions, f"OgaDestroy{kind}")
            function.argtypes, function.restype = (_P,), None
        self._functions.OgaResultGetError.argtypes = (_P,)
        self._functions.OgaResultGetError.restype = _TEXT

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; raises ``GenaiError`` with the library's text."""
        result = getattr(self._functions, name)(*arguments)
        if result:
            text = (self._functions.OgaResultGetError(result) or b"").decode("utf-8", "replace")
            self._functions.OgaDestroyResult(result)
            raise GenaiError(text.strip() or f"{name} failed")

    def create(self, kind: str, *arguments: Any, by: str = "") -> ctypes.c_void_p:
        """Return a new object of the library."""
        made = ctypes.c_void_p()
        self.call(by or f"OgaCreate{kind}", *arguments, ctypes.byref(made))
        return made

    def destroy(self, kind: str, handle: ctypes.c_void_p) -> None:
        """Free an object."""
        getattr(self._functions, f"OgaDestroy{kind}")(handle)


class GenaiModel:
    """A loaded model; its generators must be closed before it.

    Raises:
        MissingDependencyError: onnxruntime-genai is not installed.
        ModelError: the library refuses the folder.
    """

    def __init__(self, path: Path, *, n_threads: int | None = None) -> None:
        self.library = _Library()
        config = ctypes.c_void_p()
        try:
            config = self.library.create("Config", str(path).encode())
            if n_threads is not None:
                options = {"session_options": {"intra_op_num_threads": n_threads}}
                overlay = json.dumps({"model": {"decoder": options}}).encode()
                self.library.call("OgaConfigOverlay", config, overlay)
            self.handle = self.library.create("Model", config, by="OgaCreateModelFromConfig")
        except GenaiError as error:
            raise ModelError(
                f"{path} cannot be loaded by onnxruntime-genai ({reason_of(error)}); export it again"
            ) from None
        finally:
            if config:
                self.library.destroy("Config", config)

    def start(
        self, token_ids: Sequence[int], max_length: int, search: Mapping[str, bool | float]
    ) -> GenaiGenerator:
        """Return a generator that has read ``token_ids``; raises ``GenaiError``."""
        params = self.library.create("GeneratorParams", self.handle)
        try:
            for name, value in {**search, "max_length": max_length}.items():
                kind = "Bool" if isinstance(value, bool) else "Number"
                self.library.call(f"OgaGeneratorParamsSetSearch{kind}", params, name.encode(), value)
            generator = GenaiGenerator(self.library, self.library.create("Generator", self.handle, params))
        finally:
            self.library.destroy("GeneratorParams", params)
        try:
            generator.append(token_ids)
        except GenaiError:
            generator.close()
            raise
        return generator

    def close(self) -> None:
        """Free the model."""
        handle, self.handle = self.handle, ctypes.c_void_p()
        if handle:
            self.library.destroy("Model", handle)


class GenaiGenerator:
    """One sequence and its KV cache; to be used from one thread at a time."""

    def __init__(self, library: _Library, handle: ctypes.c_void_p) -> None:
        self._library = library
        self._handle = handle
        self._ids = _IDS()
        self._count = ctypes.c_size_t()
        self._where = (ctypes.byref(self._ids), ctypes.byref(self._count))

    def append(self, token_ids: Sequence[int]) -> None:
        """Read tokens."""
        ids = (ctypes.c_int32 * len(token_ids))(*token_ids)
        self._library.call("OgaGenerator_AppendTokens", self._handle, ids, len(token_ids))

    def next(self) -> int:
        """Make one more token and return its id."""
        self._library.call("OgaGenerator_GenerateNextToken", self._handle)
        self._library.call("OgaGenerator_GetNextTokens", self._handle, *self._where)
        return int(self._ids[0])

    def close(self) -> None:
        """Free the sequence."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle:
            self._library.destroy("Generator", handle)
