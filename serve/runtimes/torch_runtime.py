"""The reference runtime: stock transformers in float32, from a local folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cusprun.errors import ModelError, reason_of
from cusprun.records import Message
from serve.runtimes.protocol import SpecialIds


class TorchRuntime:
    """A Hugging Face folder in ``AutoModelForCausalLM``, weights cast to float32 as they are loaded.

    Raises:
        ModelError: transformers cannot load the model or its tokenizer.
    """

    def __init__(self, folder: Path, *, n_threads: int | None = None) -> None:
        import torch
        import transformers

        if n_threads is not None:
            torch.set_num_threads(n_threads)
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, **options
            )
        except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
            reason = reason_of(error)
            raise ModelError(
                f"{folder} cannot be loaded by transformers ({reason}); check its files"
            ) from None
        self._model.eval()
        self._folder = folder
        self.name = f"transformers {transformers.__version__}"
        self.vocab_size = int(self._model.config.vocab_size)
        self.max_tokens = None

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """Return the token ids of ``text``."""
        return [int(i) for i in self._tokenizer(text, add_special_tokens=add_special)["input_ids"]]

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits after each token, float32 ``[tokens, vocab_size]``, in one forward pass."""
        import torch

        if not token_ids:
            return np.zeros((0, self.vocab_size), dtype=np.float32)
        with torch.inference_mode():
            output = self._model(input_ids=torch.tensor([list(token_ids)]), use_cache=False)
        logits: NDArray[np.float32] = output.logits[0].float().numpy()
        return logits

    def generate(self, token_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """Yield the greedy continuation, token by token; ends before the first stop token."""
        import inspect

        import torch

        # transformers 5.24 calls "cache" what earlier versions call "past_key_values"
        known = inspect.signature(self._model.forward).parameters
        keyword = "cache" if "cache" in known else "past_key_values"
        stop = set(self.special_ids.stop)
        ids, cache = torch.tensor([list(token_ids)]), None
        for _ in range(max_new_tokens):
            with torch.inference_mode():
                output = self._model(input_ids=ids, use_cache=True, **{keyword: cache})
            token = int(output.logits[0, -1].argmax())
            if token in stop:
                return
            yield token
            ids, cache = torch.tensor([[token]]), getattr(output, keyword)

    def render_chat(self, messages: Sequence[Message]) -> str | None:
        """Return the prompt text of a chat; ``None`` without a template."""
        import jinja2

        if not self._tokenizer.chat_template:
            return None
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except jinja2.TemplateError as error:
            raise ModelError(f"{self._folder}: the chat template refuses these messages ({error})") from None

    def chat_token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the rendered chat; the template alone decides on BOS, as in transformers."""
        prompt = self.render_chat(messages)
        return [] if prompt is None else self.tokenize(prompt, add_special=False)

    @cached_property
    def special_ids(self) -> SpecialIds:
        """Special tokens of the tokenizer; stops also of the generation config and the config."""
        stops: list[int] = []
        config = self._model.config
        # as the file says it: the default of the class counts only where no generation config says otherwise
        stated = type(config).get_config_dict(self._folder, local_files_only=True)[0].get("eos_token_id")
        for value in (
            self._tokenizer.eos_token_id,
            self._model.generation_config.eos_token_id,
            stated,
        ):
            for stop in value if isinstance(value, list) else [value]:
                # an id without a row, such as -1, can never come
                if isinstance(stop, int) and stop not in stops and 0 <= stop < self.vocab_size:
                    stops.append(stop)
        return SpecialIds(self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, tuple(stops))

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the added tokens."""
        return tuple(str(token) for token in self._tokenizer.added_tokens_encoder)

    def close(self) -> None:
        """Free the model."""
        self._model = None
