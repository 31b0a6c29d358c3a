"""The program that cusprun's ONNX server is compared with: a plain loop over onnxruntime-genai.

``python serve_onnx_direct.py FOLDER THREADS`` reads requests from stdin, one JSON object a line
(``token_ids``, ``max_new_tokens``), and writes an answer for each, with seconds since it had read the
request. Nothing is turned into text, so the loop does less than any user of it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime_genai as og

GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}


def answer(model: Any, token_ids: list[int], max_new_tokens: int) -> dict[str, Any]:
    """Generate greedily until the model ends or the limit is reached."""
    started = time.perf_counter()
    params = og.GeneratorParams(model)
    params.set_search_options(**GREEDY, max_length=len(token_ids) + max_new_tokens)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([token_ids], dtype=np.int32))
    made: list[int] = []
    first_s = 0.0
    while not generator.is_done():
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
        if len(made) == 1:
            first_s = time.perf_counter() - started
    return {"first_s": first_s, "seconds": time.perf_counter() - started, "token_ids": made}


def main() -> None:
    """Answer until stdin ends."""
    folder, num_threads = sys.argv[1:]
    og.disable_telemetry_events()
    config = og.Config(folder)
    session = {"session_options": {"intra_op_num_threads": int(num_threads)}}
    config.overlay(json.dumps({"model": {"decoder": session}}))
    model = og.Model(config)
    for line in sys.stdin:
        print(json.dumps(answer(model, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
