"""The process that runs llama.cpp's server: ``python -m serve.engines.llamacpp_child``.

What to serve is JSON in the environment variable ``CUSPRUN_LLAMACPP``, since it holds the key.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

VARIABLE = "CUSPRUN_LLAMACPP"
_DRAFT_TOKENS = 8  # at most that many tokens are guessed before the model checks them
_NAP_S = 3600.0  # a signal ends the process at once; Windows has no call that waits for one
_DRAFT_P_MIN = 0.6  # a guess less likely than this ends the draft


def parameters_of(plain: dict[str, Any]) -> Any:
    """Return xllamacpp's parameters for what the parent asks."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = plain["path"]
    parameters.model_alias = {plain["model"]}
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = plain["port"]
    parameters.api_keys = [plain["key"]]
    parameters.n_parallel = plain["parallel"]
    parameters.n_ctx = plain["context_tokens"] * plain["parallel"]
    parameters.endpoint_metrics = True
    parameters.endpoint_slots = False
    parameters.ui = False
    # Prompts that have left their slot would be kept in up to 8 GB; a slot still keeps its last one.
    parameters.cache_ram_mib = 0
    parameters.cache_idle_slots = False
    if plain["num_threads"]:
        parameters.cpuparams.n_threads = plain["num_threads"]
        parameters.cpuparams_batch.n_threads = plain["num_threads"]
    if plain["draft"]:
        speculative = parameters.speculative
        speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        speculative.draft.mparams.path = plain["draft"]
        speculative.draft.n_max = _DRAFT_TOKENS
        speculative.draft.p_min = _DRAFT_P_MIN
    for name, value in plain["options"].items():
        holder = parameters
        *path, last = name.split(".")
        for part in path:
            holder = getattr(holder, part)
        setattr(holder, last, value)
    return parameters


def main() -> int:
    """Serve until a signal ends the process."""
    import xllamacpp

    plain = json.loads(os.environ.pop(VARIABLE))
    try:
        server = xllamacpp.Server(parameters_of(plain))
    except Exception as error:  # the library raises plain RuntimeError
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    while server.listening_address:
        time.sleep(_NAP_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
