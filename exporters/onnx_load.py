"""Check a finished ONNX folder: onnx.checker, one run in plain onnxruntime, one token in
onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.errors import ExportError, reason_of
from exporters.onnx_build import MODEL_NAME
from exporters.onnx_files import GENAI_NAME

_PROMPT_TOKENS = 3
_SILENT = 4  # onnxruntime's severity "fatal": errors come as exceptions, with the same text
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def load_once(folder: Path, context_length: int) -> None:
    """Load ``folder`` as its users will and generate one token, the same in both runtimes.

    Raises:
        ExportError: the checker or a runtime refuses the model, logits are not finite, or the two disagree.
    """
    import onnx

    try:
        onnx.checker.check_model(str(folder / MODEL_NAME))
        config = json.loads((folder / GENAI_NAME).read_text(encoding="utf-8"))["model"]
        # padding at the end of a prompt is not read by onnxruntime-genai
        prompt = [token for token in range(_PROMPT_TOKENS + 1) if token != config["pad_token_id"]]
        prompt = prompt[:_PROMPT_TOKENS]
        plain = _plain_token(folder, config, prompt)
        genai = _genai_token(folder, prompt, context_length)
    except Exception as error:  # both libraries raise their own kinds, all with a text
        reason = reason_of(error)
        raise ExportError(f"the exported model does not run: {reason}") from error
    if plain != genai:
        raise ExportError(f"onnxruntime gives the token {plain} and onnxruntime-genai {genai} for one prompt")


def _plain_token(folder: Path, config: Mapping[str, Any], prompt: list[int]) -> int:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    session = onnxruntime.InferenceSession(
        str(folder / MODEL_NAME), options, providers=["CPUExecutionProvider"]
    )
    decoder = config["decoder"]
    shape = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
    feed: dict[str, Any] = {
        "input_ids": np.array([prompt], dtype=np.int64),
        "attention_mask": np.ones((1, len(prompt)), dtype=np.int64),
    }
    for entry in session.get_inputs():
        if entry.name not in feed:
            feed[entry.name] = np.zeros(shape, dtype=_NUMPY_TYPES[entry.type])
    (logits,) = session.run(["logits"], feed)
    last = logits[0, -1]
    if len(last) != config["vocab_size"] or not np.isfinite(last).all():
        raise ExportError(f"it computes {len(last)} logits, not all of them finite")
    return int(last.argmax())


def _genai_token(folder: Path, prompt: list[int], context_length: int) -> int:
    import onnxruntime_genai

    onnxruntime_genai.disable_telemetry_events()
    model = onnxruntime_genai.Model(str(folder))
    onnxruntime_genai.Tokenizer(model).encode("a")
    params = onnxruntime_genai.GeneratorParams(model)
    length = min(len(prompt) + 1, context_length)
    params.set_search_options(do_sample=False, repetition_penalty=1.0, min_length=0, max_length=length)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    generator.generate_next_token()
    return int(generator.get_next_tokens()[0])
