"""An ONNX folder in onnxruntime-genai, behind the benchmark's engine interface."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cusprun.errors import ModelError, reason_of
from serve.bench.measurement import Job, Timing
from serve.bench.stepping import Gauges, timed
from serve.runtimes.onnx_folder import read_settings
from serve.runtimes.onnx_genai import GREEDY, require


class OnnxEngine:
    """The loop that onnxruntime-genai's users write, on the CPU."""

    def __init__(self) -> None:
        require()
        import onnxruntime_genai

        self.num_vocabulary = 0
        self.num_parameters: int | None = None
        self.context_length: int | None = None
        self.library = ""
        self.pids: tuple[int, ...] = ()
        self._library: Any = onnxruntime_genai
        self._model: Any = None
        self._room = 0

    def load(self, job: Job) -> None:
        """Load the model.

        Raises:
            ModelError: the library refuses the folder, or it was exported for shorter texts.
        """
        library = self._library
        library.disable_telemetry_events()
        path = Path(job.path)
        settings = read_settings(path)
        self._room = job.num_context_tokens
        limit = int(settings["context_length"])
        if self._room > limit:
            raise ModelError(
                f"{path} takes {limit} tokens and the benchmark needs {self._room}; measure shorter prompts, "
                "or export it with a longer context_length"
            )
        try:
            config = library.Config(str(path))
            options = {"session_options": {"intra_op_num_threads": job.num_threads}}
            config.overlay(json.dumps({"model": {"decoder": options}}))
            self._model = library.Model(config)
        except Exception as error:  # the library raises plain RuntimeError, with a text
            raise ModelError(
                f"{path} cannot be loaded by onnxruntime-genai ({reason_of(error)}); export it again"
            ) from None
        self.num_vocabulary = int(settings["vocab_size"])
        self.context_length = self._room
        self.library = f"onnxruntime-genai {library.__version__}"

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of the folder's tokenizer."""
        return [int(token) for token in self._library.Tokenizer(self._model).encode(text)]

    def run(self, prompt: Sequence[int], continuation: Sequence[int], gauges: Gauges) -> Timing:
        """Read the prompt and go on for as many tokens as the continuation has.

        The library runs a token that it has chosen itself when it is asked for the next one, so the tokens
        are the model's own; the one that would end the text is kept from being chosen.
        """
        import numpy as np

        options = {**GREEDY, "max_length": self._room, "min_length": self._room}
        params = self._library.GeneratorParams(self._model)
        params.set_search_options(**options)
        generator = self._library.Generator(self._model, params)
        ids = np.array([prompt], dtype=np.int32)

        def step() -> None:
            generator.generate_next_token()
            generator.get_next_tokens()

        return timed(
            len(prompt),
            lambda: generator.append_tokens(ids),
            generator.generate_next_token,
            [step] * len(continuation),
            gauges,
        )

    def close(self) -> None:
        """Free the model."""
        self._model = None
