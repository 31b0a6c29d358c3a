"""llama.cpp behind the benchmark's engine interface, on its plain C interface for clean timings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from cusprun.errors import ModelError
from serve.bench.measurement import Job, Timing
from serve.bench.stepping import Gauges, run_in_steps
from serve.runtimes.llamacpp import load_library

_BATCH_TOKENS = 512  # llama.cpp's own default for a physical batch
_CONTEXT_STEP = 256  # llama.cpp pads the cache to this


class LlamaCppEngine:
    """Weights mapped from the file, an f16 cache, no GPU layers."""

    def __init__(self) -> None:
        self.num_vocabulary = 0
        self.num_parameters: int | None = None
        self.context_length: int | None = None
        self.library = ""
        self.pids: tuple[int, ...] = ()
        self._model: Any = None
        self._context: Any = None
        self._lib, self._errors = load_library()

    def load(self, job: Job) -> None:
        """Load the model and make a context.

        Raises:
            ModelError: llama.cpp refuses the file, or the context does not fit into memory.
        """
        lib = self._lib
        model_params = lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(os.fsencode(job.path), model_params)
        if not self._model:
            raise ModelError(f"llama.cpp cannot load {job.path} ({self._reason()}); export or copy it again")
        params = lib.llama_context_default_params()
        params.n_ctx = -(-job.num_context_tokens // _CONTEXT_STEP) * _CONTEXT_STEP
        params.n_batch = params.n_ubatch = min(_BATCH_TOKENS, params.n_ctx)
        params.n_threads = params.n_threads_batch = job.num_threads
        params.no_perf = True
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise ModelError(
                f"llama.cpp cannot make a context of {params.n_ctx} tokens for {job.path} "
                f"({self._reason()}); measure fewer tokens"
            )
        self._vocabulary = lib.llama_model_get_vocab(self._model)
        self.num_vocabulary = int(lib.llama_vocab_n_tokens(self._vocabulary))
        self.num_parameters = int(lib.llama_model_n_params(self._model))
        self.context_length = int(lib.llama_n_ctx(self._context))
        self.library = (
            f"llama.cpp in llama-cpp-python {metadata.version('llama-cpp-python')}: "
            f"{lib.llama_print_system_info().decode(errors='replace').strip()}"
        )

    def _reason(self) -> str:
        return self._errors[0] if self._errors else "no reason given"

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids, with the special tokens that the file asks for."""
        data = text.encode()
        capacity = len(data) + 16  # never more tokens than bytes, plus what is added around them
        buffer = (self._lib.llama_token * capacity)()
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), buffer, capacity, True, False)
        if count < 1:
            raise ModelError("the prompt text gives no token with this model's tokenizer; give another text")
        return list(buffer[:count])

    def run(self, prompt: Sequence[int], continuation: Sequence[int], gauges: Gauges) -> Timing:
        """Read the prompt and go on with the continuation, token by token."""
        return run_in_steps(self, prompt, continuation, gauges)

    def forward(self, tokens: Sequence[int]) -> None:
        """Run the tokens through the model, in batches, and wait for the last one's logits."""
        lib = self._lib
        for start in range(0, len(tokens), _BATCH_TOKENS):
            chunk = tokens[start : start + _BATCH_TOKENS]
            array = (lib.llama_token * len(chunk))(*chunk)
            code = lib.llama_decode(self._context, lib.llama_batch_get_one(array, len(chunk)))
            if code != 0:
                raise ModelError(f"llama.cpp failed to run the model (code {code}, {self._reason()})")
        lib.llama_synchronize(self._context)

    def choose(self) -> int:
        """Return the token with the largest logit."""
        import numpy as np

        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.num_vocabulary,)).argmax())

    def clear(self) -> None:
        """Empty the cache."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def close(self) -> None:
        """Free context and model."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None
