"""llama.cpp in this process, through the low-level functions of llama-cpp-python."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cusprun.errors import MissingDependencyError, ModelError, require_known
from cusprun.llamacpp_log import collect_errors
from cusprun.records import Message
from serve.runtimes.chat_template import render_template
from serve.runtimes.protocol import SpecialIds

KV_CACHE_TYPES = {"f32": 0, "f16": 1}
"""Types of the KV cache by name, as ggml numbers them."""

_BATCH_TOKENS = 512  # logits of a batch lie in memory at once: 512 x 128,000 x 4 bytes = 262 MB
_CONTEXT_STEP = 256


def require() -> None:
    """Raise ``MissingDependencyError`` when llama-cpp-python is not installed."""
    if find_spec("llama_cpp") is None:
        raise MissingDependencyError(
            "llama-cpp-python, which runs GGUF files, is not installed; run: pip install 'cusprun[llamacpp]' "
            "(or export without a proof: --no-verify)"
        )


def load_library() -> tuple[Any, list[str]]:
    """Import llama_cpp, silence it, and return it with the list that its error messages go to.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
    """
    require()
    import llama_cpp

    errors = collect_errors(llama_cpp)
    llama_cpp.llama_backend_init()
    return llama_cpp, errors


class LlamaCppRuntime:
    """A GGUF file in llama.cpp on the CPU.

    ``kv_cache`` is ``f16`` (llama.cpp's default, costs about 0.02 in a logit) or ``f32``. The context grows
    to what the calls need; ``context_length`` sets its first size. ``flash_attention`` is left to llama.cpp
    unless given; it is off with a float32 cache, where exactness is wanted.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        ModelError: the file is missing or llama.cpp refuses it.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_threads: int | None = None,
        kv_cache: str = "f16",
        context_length: int = _CONTEXT_STEP,
        flash_attention: bool | None = None,
    ) -> None:
        require_known(kv_cache, KV_CACHE_TYPES, "KV cache type")
        if not path.is_file():
            raise ModelError(f"{path} is not a file; give a GGUF file")
        self._lib, self._errors = load_library()
        self._path = path
        self._n_threads = n_threads or os.cpu_count() or 1
        self._kv_cache = kv_cache
        self._flash_attention = (
            flash_attention if flash_attention is not None else (None, False)[kv_cache == "f32"]
        )
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ModelError(f"{path} cannot be loaded by llama.cpp ({self._reason()}); export it again")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self._context: Any = None
        self._context_length = 0
        self._wanted_context = context_length
        self.name = f"llama-cpp-python {self._lib.__version__}"
        self.vocab_size = int(self._lib.llama_vocab_n_tokens(self._vocab))
        self.max_tokens = None

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """Return the token ids of ``text``; special tokens in the text are recognised."""
        data = text.encode("utf-8")
        room = len(data) + 8
        buffer = (self._lib.llama_token * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), buffer, room, add_special, True)
        if count < 0:
            raise ModelError(f"{self._path}: llama.cpp cannot tokenise {text[:40]!r}")
        return list(buffer[:count])

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits after each token, float32 ``[tokens, vocab_size]``, in batches of 512."""
        self._start(len(token_ids))
        result = np.empty((len(token_ids), self.vocab_size), dtype=np.float32)
        for start in range(0, len(token_ids), _BATCH_TOKENS):
            chunk = list(token_ids[start : start + _BATCH_TOKENS])
            self._decode(chunk, start, all_logits=True)
            pointer = self._lib.llama_get_logits(self._context)
            view = np.ctypeslib.as_array(pointer, shape=(len(chunk), self.vocab_size))
            result[start : start + len(chunk)] = view
        return result

    def generate(self, token_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """Yield the greedy continuation, token by token; ends before the first stop token."""
        self._start(len(token_ids) + max_new_tokens)
        position = 0
        pending = list(token_ids)
        for _ in range(max_new_tokens):
            for start in range(0, len(pending), _BATCH_TOKENS):
                chunk = pending[start : start + _BATCH_TOKENS]
                self._decode(chunk, position, all_logits=False)
                position += len(chunk)
            pointer = self._lib.llama_get_logits_ith(self._context, -1)
            token = int(np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).argmax())
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                return
            yield token
            pending = [token]

    def render_chat(self, messages: Sequence[Message]) -> str | None:
        """Return the prompt text of a chat from the template in the file; ``None`` without one."""
        source = self._lib.llama_model_chat_template(self._model, None)
        if not source:
            return None
        specials = self.special_ids
        try:
            return render_template(
                source.decode("utf-8"), messages, self._text_of(specials.bos), self._text_of(specials.eos)
            )
        except ModelError as error:
            raise ModelError(f"{self._path}: {error}") from None

    def chat_token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the rendered chat; a BOS from template and tokenizer both is counted once, as
        llama.cpp's server does."""
        prompt = self.render_chat(messages)
        if prompt is None:
            return []
        bos = self._text_of(self.special_ids.bos)
        doubled = bos and prompt.startswith(bos) and self._lib.llama_vocab_get_add_bos(self._vocab)
        return self.tokenize(prompt.removeprefix(bos) if doubled else prompt, add_special=True)

    @cached_property
    def special_ids(self) -> SpecialIds:
        """Special tokens of the file; stops are all ids that llama.cpp takes for the end."""
        stops = (i for i in range(self.vocab_size) if self._lib.llama_vocab_is_eog(self._vocab, i))
        bos, eos = self._lib.llama_vocab_bos(self._vocab), self._lib.llama_vocab_eos(self._vocab)
        return SpecialIds(bos if bos >= 0 else None, eos if eos >= 0 else None, tuple(stops))

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the control tokens."""
        control = (i for i in range(self.vocab_size) if self._lib.llama_vocab_is_control(self._vocab, i))
        return tuple(self._text_of(token) for token in control)

    def close(self) -> None:
        """Free context and model."""
        if self._context:
            self._lib.llama_free(self._context)
            self._context = None
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    def _text_of(self, token: int | None) -> str:
        if token is None:
            return ""
        text = self._lib.llama_vocab_get_text(self._vocab, token)
        return str(text.decode("utf-8", "replace")) if text else ""

    def _start(self, num_tokens: int) -> None:
        """Clear the cache and make the context long enough for ``num_tokens``."""
        needed = max(num_tokens, self._wanted_context, 1)
        if self._context and needed <= self._context_length:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
            return
        if self._context:
            self._lib.llama_free(self._context)
        length = -(-needed // _CONTEXT_STEP) * _CONTEXT_STEP
        params = self._lib.llama_context_default_params()
        params.n_ctx = length
        params.n_batch = params.n_ubatch = min(length, _BATCH_TOKENS)
        params.n_threads = params.n_threads_batch = self._n_threads
        params.type_k = params.type_v = KV_CACHE_TYPES[self._kv_cache]
        if self._flash_attention is not None:
            params.flash_attn_type = int(self._flash_attention)
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise ModelError(
                f"{self._path}: llama.cpp cannot make a context of {length} tokens ({self._reason()})"
            )
        self._context_length = length

    def _decode(self, token_ids: Sequence[int], position: int, all_logits: bool) -> None:
        count = len(token_ids)
        batch = self._lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(token_ids):
                batch.token[i] = token
                batch.pos[i] = position + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = all_logits or i == count - 1
            if self._lib.llama_decode(self._context, batch):
                raise ModelError(f"{self._path}: llama.cpp cannot decode {count} tokens ({self._reason()})")
        finally:
            self._lib.llama_batch_free(batch)

    def _reason(self) -> str:
        return self._errors[-1] if self._errors else "no reason given"
