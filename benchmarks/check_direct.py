"""What the benchmark's rates in llama.cpp are checked against: a plain loop over llama.cpp's C interface.

``python check_direct.py FILE THREADS PROMPT DECODE`` prints prompt and decode tokens per second as JSON. It
shares no code with cusprun, and does what llama.cpp's own ``llama-bench`` does: random tokens, the prompt as
one batch after a warm-up, then one token after the other, the clock stopped after the last.
"""

from __future__ import annotations

import json
import random
import sys
import time

import llama_cpp as lib


def main() -> None:
    """Measure one file."""
    path, threads, num_prompt, num_decode = sys.argv[1], *map(int, sys.argv[2:])
    lib.llama_backend_init()
    model_params = lib.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(path.encode(), model_params)
    params = lib.llama_context_default_params()
    params.n_ctx = num_prompt + num_decode + 8
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    generator = random.Random(1)
    tokens = [generator.randrange(vocabulary) for _ in range(num_prompt + num_decode)]

    def run(part: list[int]) -> None:
        array = (lib.llama_token * len(part))(*part)
        if lib.llama_decode(context, lib.llama_batch_get_one(array, len(part))) != 0:
            sys.exit("llama_decode failed")
        lib.llama_synchronize(context)

    def clear() -> None:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)

    run(tokens[:num_prompt])
    for token in tokens[num_prompt : num_prompt + 8]:
        run([token])
    clear()
    start = time.perf_counter()
    run(tokens[:num_prompt])
    prompt_s = time.perf_counter() - start
    start = time.perf_counter()
    for token in tokens[num_prompt:]:
        run([token])
    decode_s = time.perf_counter() - start
    print(json.dumps({"prompt": num_prompt / prompt_s, "decode": num_decode / decode_s}))


if __name__ == "__main__":
    main()
