"""An exported ONNX graph in plain onnxruntime: the session, a KV cache and the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cusprun.errors import MissingDependencyError, ModelError, reason_of
from cusprun.records import Message
from serve.runtimes.chat_template import render_template
from serve.runtimes.protocol import SpecialIds

INSTALL = "pip install 'cusprun[onnx]'"
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_MODEL_KEYS = ("decoder", "context_length", "vocab_size", "eos_token_id")
_DECODER_KEYS = ("filename", "num_key_value_heads", "head_size")
_SILENT = 4  # onnxruntime's severity "fatal": errors come as exceptions, with the same text


def require() -> None:
    """Raise ``MissingDependencyError`` when onnxruntime is not installed."""
    from importlib.util import find_spec

    if find_spec("onnxruntime") is None:
        raise MissingDependencyError(f"onnxruntime is not installed; run: {INSTALL}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of an artifact; raises ``ModelError`` when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); export the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a mapping; export the model again")
    return value


def read_settings(path: Path) -> dict[str, Any]:
    """Return the part ``model`` of a folder's ``genai_config.json``, with all that is read from it.

    Raises:
        ModelError: the file is missing or damaged.
    """
    file = path / "genai_config.json"
    model: Any = read_json(file).get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    for name, part, keys in (("model", model, _MODEL_KEYS), ("model.decoder", decoder, _DECODER_KEYS)):
        absent = [key for key in keys if not isinstance(part, dict) or key not in part]
        if absent:
            raise ModelError(f"{file} has no {name}.{absent[0]}; export the model again")
    return dict(model)


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
        from tokenizers import Tokenizer

        self._path = path
        self._config = read_settings(path)
        self._decoder: Mapping[str, Any] = self._config["decoder"]
        self._tokenizer_config = read_json(path / "tokenizer_config.json")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SILENT
        options.intra_op_num_threads = n_threads or 0
        graph = path / str(self._decoder["filename"])
        try:
            self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
            self._session = onnxruntime.InferenceSession(str(graph), options, providers=[provider])
        except Exception as error:  # both libraries raise their own kinds, all with a text
            raise ModelError(f"{path} cannot be loaded by onnxruntime ({reason_of(error)})") from None
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self.vocab_size = int(self._config["vocab_size"])
        self.max_tokens = int(self._config["context_length"])

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """Return the token ids of ``text``; special tokens in the text are recognised."""
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=add_special).ids]

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
        path = self._path / "chat_template.jinja"
        if not path.is_file():
            return None
        bos, eos = (str(self._tokenizer_config.get(f"{name}_token") or "") for name in ("bos", "eos"))
        return render_template(path.read_text(encoding="utf-8"), messages, bos, eos)

    def chat_token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the rendered chat; the template alone decides on BOS."""
        prompt = self.render_chat(messages)
        return [] if prompt is None else self.tokenize(prompt, add_special=False)

    @cached_property
    def special_ids(self) -> SpecialIds:
        """Special tokens as ``genai_config.json`` states them; the first stop is EOS."""
        stops = self._config["eos_token_id"]
        stop = tuple(stops) if isinstance(stops, list) else (stops,)
        return SpecialIds(self._config.get("bos_token_id"), stop[0], stop)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the added tokens."""
        return tuple(str(token.content) for token in self._tokenizer.get_added_tokens_decoder().values())

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
            raise ModelError(f"{self._path} has no token {out_of_range[0]}; its tokenizer and graph disagree")
        feed = {
            "input_ids": np.array([token_ids], dtype=np.int64),
            "attention_mask": np.ones((1, length + len(token_ids)), dtype=np.int64),
            **cache,
        }
        names = [name.replace("past_key_values", "present") for name in cache]
        logits, *present = self._session.run(["logits", *names], feed)
        return logits[0].astype(np.float32), dict(zip(cache, present, strict=True))
