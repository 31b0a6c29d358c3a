"""An exported ONNX folder in onnxruntime-genai, the way its users run it."""

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
from serve.runtimes.onnx_folder import read_json, read_settings
from serve.runtimes.onnx_plain import INSTALL
from serve.runtimes.protocol import SpecialIds

GREEDY: Mapping[str, bool | float] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}
"""Search options; what the generation config asks for, such as a penalty, has no place in a greedy answer."""


def require() -> None:
    """Raise ``MissingDependencyError`` when onnxruntime-genai is not installed."""
    from importlib.util import find_spec

    if find_spec("onnxruntime_genai") is None:
        raise MissingDependencyError(f"onnxruntime-genai is not installed; run: {INSTALL}")


class OnnxGenaiRuntime:
    """A folder for onnxruntime-genai: everything, tokenizer and chat template too, is done by that library.

    Its generator gives the logits of all tokens of a prompt in one run. Its tokenizer ends a text at NUL, and
    gives -1 for bytes that have no token. ``serve.runtimes.onnx_plain`` runs the same graph without it.

    Raises:
        MissingDependencyError: onnxruntime-genai is not installed.
        ModelError: a file is missing, or the library refuses the folder.
    """

    def __init__(self, path: Path, *, n_threads: int | None = None) -> None:
        require()
        import onnxruntime_genai

        self._library: Any = onnxruntime_genai
        self._library.disable_telemetry_events()
        self._path = path
        settings = read_settings(path)
        self.max_tokens = int(settings["context_length"])
        self._has_bos = settings.get("bos_token_id") is not None
        try:
            config = self._library.Config(str(path))
            if n_threads is not None:
                options = {"session_options": {"intra_op_num_threads": n_threads}}
                config.overlay(json.dumps({"model": {"decoder": options}}))
            self._model = self._library.Model(config)
            self._tokenizer = self._library.Tokenizer(self._model)
        except Exception as error:  # the library raises plain RuntimeError, with a text
            raise ModelError(
                f"{path} cannot be loaded by onnxruntime-genai ({reason_of(error)}); export it again"
            ) from None
        self.name = f"onnxruntime-genai {self._library.__version__}"
        self.vocab_size = int(settings["vocab_size"])

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """Return the token ids of ``text``; special tokens in the text are recognised."""
        self._tokenizer.update_options(add_special_tokens="true" if add_special else "false")
        try:
            return [int(token) for token in self._tokenizer.encode(text)]
        except RuntimeError as error:
            raise ModelError(
                f"{self._path}: onnxruntime-genai cannot tokenise {text[:40]!r} ({reason_of(error)})"
            ) from None

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits after each token, float32 ``[tokens, vocab_size]``, in one run."""
        if not token_ids:
            return np.zeros((0, self.vocab_size), dtype=np.float32)
        generator = self._start(token_ids, len(token_ids) + 1)
        rows: NDArray[np.float32] = np.asarray(generator.get_output("logits"))[0].astype(np.float32)
        return rows

    def generate(self, token_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """Yield the greedy continuation, token by token; ends before the first stop token."""
        generator = self._start(token_ids, len(token_ids) + max_new_tokens)
        stop = set(self.special_ids.stop)
        for _ in range(max_new_tokens):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in stop:
                return
            yield token

    def render_chat(self, messages: Sequence[Message]) -> str | None:
        """Return the prompt text of a chat; ``None`` without a template."""
        if not (self._path / "chat_template.jinja").is_file():
            return None
        turns = json.dumps([{"role": message.role, "content": message.content} for message in messages])
        try:
            return str(self._tokenizer.apply_chat_template(turns, add_generation_prompt=True))
        except RuntimeError as error:
            raise ModelError(
                f"{self._path}: the chat template refuses these messages ({reason_of(error)})"
            ) from None

    def chat_token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the rendered chat; the template alone decides on BOS."""
        prompt = self.render_chat(messages)
        return [] if prompt is None else self.tokenize(prompt, add_special=False)

    @cached_property
    def special_ids(self) -> SpecialIds:
        """Special tokens as the library reads them from ``genai_config.json``; the first stop is EOS."""
        stop = tuple(int(token) for token in self._tokenizer.eos_token_ids)
        return SpecialIds(int(self._tokenizer.bos_token_id) if self._has_bos else None, stop[0], stop)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the added tokens."""
        added = read_json(self._path / "tokenizer.json").get("added_tokens", [])
        return tuple(str(token["content"]) for token in added)

    def close(self) -> None:
        """Free the model."""
        self._tokenizer = self._model = None

    def _start(self, token_ids: Sequence[int], max_length: int) -> Any:
        """Return a greedy generator that has read ``token_ids``."""
        if max_length > self.max_tokens + 1:
            raise ModelError(
                f"{self._path} takes {self.max_tokens} tokens, not {max_length}; export it with a "
                "longer context_length"
            )
        out_of_range = [token for token in token_ids if not 0 <= token < self.vocab_size]
        if out_of_range:
            raise ModelError(f"{self._path} has no token {out_of_range[0]}, which its own tokenizer may give")
        params = self._library.GeneratorParams(self._model)
        params.set_search_options(**GREEDY, max_length=min(max_length, self.max_tokens))
        generator = self._library.Generator(self._model, params)
        generator.append_tokens(np.array([token_ids], dtype=np.int32))
        return generator
