"""An exported ONNX graph in plain onnxruntime: the session, a KV cache and the tokenizers library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cusprun.errors import MissingDependencyError, ModelError, reason_of
from cusprun.records import Message
from serve.runtimes.onnx_folder import OnnxFolder
from serve.runtimes.protocol import SpecialIds

INSTALL = "pip install 'cusprun[onnx]'"
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_SILENT = 4  # onnxruntime's severity "fatal": errors come as exceptions, with the same text


def require() -> None:
    """Raise ``MissingDependencyError`` when onnxruntime is not installed."""
    from importlib.util import find_spec

    if find_spec("onnxruntime") is None:
        raise MissingDependencyError(f"onnxruntime is not installed; run: {INSTALL}")


class OnnxRuntime:
    """A folder made by ``exporters.onnx`` in ``onnxruntime.InferenceSession``, without onnxruntime-genai.

    Token ids come from ``tokenizer.json`` through the tokenizers library, chats from ``chat_template.jinja``.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ModelError: a file is missing or damaged, or onnxruntime refuses the graph.
    """

    def __init__(
        self, path: Path, *, n_threads: int | None = None, provider: str = "CPUExecutionProvider"
    ) -> None:
        require()
        import onnxruntime

        self._folder = OnnxFolder(path)
        self._decoder: Mapping[str, Any] = self._folder.model["decoder"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SILENT
        options.intra_op_num_threads = n_threads or 0
        graph = path / str(self._decoder["filename"])
        try:
            self._session = onnxruntime.InferenceSession(str(graph), options, providers=[provider])
        except Exception as error:  # the library raises many kinds, all with a text
            raise ModelError(f"{path} cannot be loaded by onnxruntime ({reason_of(error)})") from None
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self.vocab_size = self._folder.vocab_size
        self.max_tokens = int(self._folder.model["context_length"])

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """Return the token ids of ``text``; special tokens in the text are recognised."""
        return self._folder.tokenize(text, add_special)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits after each token, float32 ``[tokens, vocab_size]``, in one run."""
        if not token_ids:
            return np.zeros((0, self.vocab_size), dtype=np.float32)
        rows, _ = self._run(token_ids, self._empty_cache(), 0)
        return rows

    def generate(self, token_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """Yield the greedy continuation, token by token; ends before the first stop token."""
        stop = set(self.special_ids.stop)
        pending, cache, length = list(token_ids), self._empty_cache(), 0
        for _ in range(max_new_tokens):
            rows, cache = self._run(pending, cache, length)
            length += len(pending)
            token = int(rows[-1].argmax())
            if token in stop:
                return
            yield token
            pending = [token]

    def render_chat(self, messages: Sequence[Message]) -> str | None:
        """Return the prompt text of a chat; ``None`` without a template."""
        return self._folder.render_chat(messages)

    def chat_token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the rendered chat; the template alone decides on BOS."""
        prompt = self.render_chat(messages)
        return [] if prompt is None else self.tokenize(prompt, add_special=False)

    @property
    def special_ids(self) -> SpecialIds:
        """Special tokens as ``genai_config.json`` states them; the first stop is EOS."""
        return self._folder.special_ids

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the added tokens."""
        return self._folder.special_texts

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def _empty_cache(self) -> dict[str, NDArray[Any]]:
        shape = (1, self._decoder["num_key_value_heads"], 0, self._decoder["head_size"])
        return {
            entry.name: np.zeros(shape, dtype=_NUMPY_TYPES[entry.type])
            for entry in self._session.get_inputs()
            if entry.name.startswith("past_key_values.")
        }

    def _run(
        self, token_ids: Sequence[int], cache: Mapping[str, NDArray[Any]], length: int
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """Run tokens that follow ``length`` cached ones; return their logits and the cache after them."""
        out_of_range = [token for token in token_ids if not 0 <= token < self.vocab_size]
        if out_of_range:
            raise ModelError(
                f"{self._folder.path} has no token {out_of_range[0]}; its tokenizer and graph disagree"
            )
        feed = {
            "input_ids": np.array([token_ids], dtype=np.int64),
            "attention_mask": np.ones((1, length + len(token_ids)), dtype=np.int64),
            **cache,
        }
        names = [name.replace("past_key_values", "present") for name in cache]
        logits, *present = self._session.run(["logits", *names], feed)
        return logits[0].astype(np.float32), dict(zip(cache, present, strict=True))
