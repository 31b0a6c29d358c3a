"""A loaded ONNX folder: texts to tokens and back, and generators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cusprun.errors import UserError
from serve.onnx_server.genai import GenaiGenerator, GenaiModel
from serve.runtimes.onnx_folder import OnnxFolder


class OnnxModel:
    """What the server needs of a folder; ``context_tokens`` bounds a prompt with its answer.

    Raises:
        MissingDependencyError: onnxruntime-genai is not installed.
        ModelError: a file is missing or damaged, or the library refuses the folder.
        UserError: the context is longer than the model's.
    """

    def __init__(
        self, path: Path, *, context_tokens: int | None = None, n_threads: int | None = None
    ) -> None:
        self.folder = OnnxFolder(path)
        longest = int(self.folder.model["context_length"])
        if context_tokens is not None and not 2 <= context_tokens <= longest:
            raise UserError(
                f"{path} was exported for a context of {longest} tokens; --context must be 2 to {longest}, "
                f"not {context_tokens}"
            )
        self.context_tokens = context_tokens or longest
        self.vocab_size = self.folder.vocab_size
        self.stop_ids = frozenset(self.folder.special_ids.stop)
        self._genai = GenaiModel(path, n_threads=n_threads)

    def start(
        self, token_ids: Sequence[int], max_new_tokens: int, search: Mapping[str, bool | float]
    ) -> GenaiGenerator:
        """Return a generator that has read ``token_ids``; raises ``GenaiError``."""
        return self._genai.start(token_ids, len(token_ids) + max_new_tokens, search)

    def close(self) -> None:
        """Free the model."""
        self._genai.close()
