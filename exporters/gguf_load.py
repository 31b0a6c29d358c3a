"""Load a finished GGUF file in llama.cpp and run one token, when llama.cpp is there."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.errors import ExportError
from cusprun.llamacpp_log import collect_errors


def load_once(path: Path, vocab_size: int) -> bool:
    """Load ``path``, compare its vocabulary size and decode one token.

    Returns False, having done nothing, when llama-cpp-python is not installed.

    Raises:
        ExportError: llama.cpp refuses the file, or its logits are not finite.
    """
    if find_spec("llama_cpp") is None:
        return False
    import llama_cpp

    messages = collect_errors(llama_cpp)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False  # repacking weights for speed would cost more than the one token
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise ExportError(f"llama.cpp refuses the exported file: {_reason(messages)}")
    try:
        _decode_one(llama_cpp, model, vocab_size, messages)
    finally:
        llama_cpp.llama_model_free(model)
    return True


def _decode_one(llama_cpp: Any, model: Any, vocab_size: int, messages: list[str]) -> None:
    vocab = llama_cpp.llama_model_get_vocab(model)
    found = llama_cpp.llama_vocab_n_tokens(vocab)
    if found != vocab_size:
        raise ExportError(
            f"llama.cpp reads {found} tokens from the exported file where {vocab_size} were written"
        )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 32
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise ExportError(f"llama.cpp cannot run the exported file: {_reason(messages)}")
    try:
        token = (llama_cpp.llama_token * 1)(0)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)):
            raise ExportError(f"llama.cpp cannot run the exported file: {_reason(messages)}")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        if not np.isfinite(np.ctypeslib.as_array(logits, shape=(vocab_size,))).all():
            raise ExportError("llama.cpp computes logits that are not finite from the exported file")
    finally:
        llama_cpp.llama_free(context)


def _reason(messages: list[str]) -> str:
    return messages[0] if messages else "it gives no reason"
