"""A Hugging Face folder in stock transformers on the CPU, behind the benchmark's engine interface."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cusprun.errors import ModelError, reason_of
from serve.bench.measurement import Job, Timing
from serve.bench.stepping import Gauges, run_in_steps


class TorchEngine:
    """The weights in the precision of the folder; float16 becomes float32, since CPUs compute no halves."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.num_vocabulary = 0
        self.num_parameters: int | None = None
        self.context_length: int | None = None  # the cache grows with the text
        self.library = ""
        self.pids: tuple[int, ...] = ()
        self._torch = torch
        self._model_class = AutoModelForCausalLM  # imported by now: that is no part of loading a model
        self._model: Any = None
        self._tokenizer: Any = None
        self._cache: Any = None
        self._last_logits: Any = None

    def load(self, job: Job) -> None:
        """Load the model.

        Raises:
            ModelError: transformers cannot load the folder.
        """
        import transformers

        torch = self._torch
        torch.set_num_threads(job.num_threads)
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            model = self._model_class.from_pretrained(
                Path(job.path), dtype="auto", use_safetensors=True, **options
            )
        except Exception as error:  # the libraries raise many kinds
            raise ModelError(
                f"{job.path} cannot be loaded by transformers ({reason_of(error)}); check its files"
            ) from None
        self._model = (model.float() if model.dtype == torch.float16 else model).eval()
        # Transformers 5.24 calls the cache so, and warns of the name that it had before.
        names = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._path = job.path
        self.num_vocabulary = int(model.config.vocab_size)
        self.num_parameters = int(model.num_parameters())
        precision = str(self._model.dtype).removeprefix("torch.")
        self.library = f"transformers {transformers.__version__}, torch {torch.__version__}, {precision}"

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids, with the special tokens that the tokenizer adds."""
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            self._path, local_files_only=True, trust_remote_code=False
        )
        return [int(token) for token in tokenizer(text)["input_ids"]]

    def run(self, prompt: Sequence[int], continuation: Sequence[int], gauges: Gauges) -> Timing:
        """Read the prompt and go on with the continuation, token by token."""
        with self._torch.inference_mode():
            return run_in_steps(self, prompt, continuation, gauges)

    def clear(self) -> None:
        """Forget the text."""
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)

    def forward(self, tokens: Sequence[int]) -> None:
        """Run the tokens through the model, all at once, for the logits of the last."""
        ids = self._torch.tensor([list(tokens)])
        cache = {self._cache_name: self._cache}
        output = self._model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)
        self._last_logits = output.logits[0, -1]

    def choose(self) -> int:
        """Return the token with the largest logit."""
        return int(self._last_logits.argmax())

    def close(self) -> None:
        """Free the model."""
        self._model = self._cache = self._last_logits = None
