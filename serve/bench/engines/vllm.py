"""A folder in vLLM's own server, over HTTP, behind the benchmark's engine interface."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cusprun.errors import ModelError
from serve.bench.measurement import Job, Timing
from serve.bench.stepping import Gauges, difference
from serve.runtimes.vllm_process import RequestRefused, VllmProcess, find_python

_MODEL = "measured"
_START_S = 600.0


class VllmEngine:
    """One server, one request at a time. Its load time is that of the server, its times are a client's."""

    def __init__(self) -> None:
        self.num_vocabulary = 0
        self.num_parameters: int | None = None
        self.context_length: int | None = None
        self.library = ""
        self._python = find_python()
        self._server: VllmProcess | None = None

    @property
    def pids(self) -> Sequence[int]:
        """The server and what it started."""
        return () if self._server is None else self._server.pids()

    def load(self, job: Job) -> None:
        """Start the server.

        Raises:
            ModelError: vLLM refuses the folder.
        """
        path = Path(job.path)
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            self.num_vocabulary = int(config["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ModelError(f"{path} has no readable config.json; give a folder exported for vLLM") from None
        options = [
            "--served-model-name", _MODEL, "--max-model-len", str(job.num_context_tokens),
            "--dtype", str(config.get("dtype") or "auto"), "--max-num-seqs", "1",
            "--no-enable-prefix-caching",
        ]  # fmt: skip
        self._server = VllmProcess(self._python, path, options, job.num_threads, _START_S)
        self.context_length = job.num_context_tokens
        self.library = f"vllm {self._server.call('/version')['version']}"

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of the server's tokenizer."""
        assert self._server is not None
        return [
            int(token)
            for token in self._server.call("/tokenize", {"model": _MODEL, "prompt": text})["tokens"]
        ]

    def run(self, prompt: Sequence[int], continuation: Sequence[int], gauges: Gauges) -> Timing:
        """Ask for the prompt's first token and as many more as the continuation has; the text cannot end.

        Chunks of a stream may hold several tokens; the time to a chunk is then shared among its tokens.

        Raises:
            ModelError: the server refuses, fails, or makes another number of tokens.
        """
        try:
            return self._run(prompt, continuation, gauges)
        except RequestRefused as error:
            raise ModelError(
                f"vLLM refuses a prompt of {len(prompt)} tokens ({error}); measure shorter ones"
            ) from None

    def _run(self, prompt: Sequence[int], continuation: Sequence[int], gauges: Gauges) -> Timing:
        assert self._server is not None
        request = {
            "model": _MODEL, "prompt": list(prompt), "max_tokens": len(continuation) + 1, "temperature": 0.0,
            "ignore_eos": True, "stream": True, "return_token_ids": True,
        }  # fmt: skip
        energy_start = gauges.joules()
        energy_first = None
        first_s, latencies = 0.0, []
        start = last = gauges.clock()
        for chunk in self._server.stream("/v1/completions", request):
            choices = chunk.get("choices") or [{}]
            num_tokens = len(choices[0].get("token_ids") or ())
            if not num_tokens:
                continue
            now = gauges.clock()
            if not first_s:
                first_s, energy_first = now - start, gauges.joules()
                num_tokens -= 1
            latencies += [(now - last) / num_tokens] * num_tokens if num_tokens else []
            last = now
        if len(latencies) != len(continuation):
            raise ModelError(
                f"vLLM made {len(latencies) + bool(first_s)} tokens and was asked for {len(continuation) + 1}"
            )
        return Timing(
            num_prompt_tokens=len(prompt),
            prefill_s=first_s,
            first_token_s=first_s,
            latencies_s=tuple(latencies),
            prompt_joules=difference(energy_start, energy_first),
            decode_joules=difference(energy_first, gauges.joules()),
        )

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.close()
