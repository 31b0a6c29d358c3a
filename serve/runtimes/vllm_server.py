"""vLLM's own OpenAI server as a process of its own, spoken to over loopback HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.errors import ModelError
from cusprun.records import Message
from serve.runtimes.protocol import SpecialIds, TopLogProbs
from serve.runtimes.vllm_process import RequestRefused, VllmProcess, find_python

TOP_TOKENS = 64
"""Likeliest tokens that are asked for after each token; the rest of the probability is one outcome more."""

_DEFAULT_CONTEXT_TOKENS = 1024  # the gate's documents have 512 tokens
_MODEL = "model"


def require() -> None:
    """Raise ``MissingDependencyError`` with the command that adds vLLM when no interpreter has it."""
    find_python()


class VllmRuntime:
    """A folder served by unmodified vLLM, on CPU or GPU as the installed vLLM does.

    ``python`` is the interpreter of the environment that has vLLM (see ``find_python`` for where it is looked
    for otherwise); ``dtype`` what vLLM computes in, that of the folder when None (vLLM's own ``auto`` rounds
    float32 folders to bfloat16); ``context_length`` the longest text in tokens, cut to what the model takes.
    A start takes 20 to 60 s. vLLM gives no whole logits: the runtime has ``top_log_probs`` instead.

    Raises:
        MissingDependencyError: no interpreter has vLLM.
        ModelError: the folder has no config, or vLLM does not start on it; the text ends with vLLM's reason.
    """

    def __init__(
        self,
        path: Path,
        *,
        python: Path | None = None,
        dtype: str | None = None,
        context_length: int = _DEFAULT_CONTEXT_TOKENS,
        n_threads: int | None = None,
        start_timeout_s: float = 600.0,
    ) -> None:
        self._path = path
        self._config = _read_json(path / "config.json")
        if not self._config:
            raise ModelError(f"{path} has no readable config.json; give a folder that was exported for vLLM")
        limit = self._config.get("max_position_embeddings")
        length = min(context_length, limit) if isinstance(limit, int) else context_length
        self.vocab_size = int(self._config["vocab_size"])
        self.max_tokens = length - 1  # one token is made even where only those of the prompt are asked for
        self._top_tokens = min(TOP_TOKENS, self.vocab_size)
        options = [
            "--served-model-name", _MODEL, "--max-model-len", str(length),
            "--dtype", dtype or str(self._config.get("dtype") or "auto"),
            "--max-num-seqs", "4", "--max-logprobs", str(self._top_tokens), "--no-enable-prefix-caching",
        ]  # fmt: skip
        self._process = VllmProcess(find_python(python), path, options, n_threads, start_timeout_s)
        try:
            self.name = f"vllm {self._process.call('/version')['version']}"
        except BaseException:
            self.close()
            raise

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """Return the token ids of ``text``; special tokens in the text are recognised."""
        return self._tokens({"prompt": text, "add_special_tokens": add_special})

    def top_log_probs(self, token_ids: Sequence[int]) -> TopLogProbs:
        """Return the 64 likeliest tokens after each token (all of a smaller vocabulary), in one request."""
        ids = list(token_ids)
        count = self._top_tokens
        if not ids:
            empty = np.zeros((0, count))
            return TopLogProbs(empty.astype(np.int64), empty.astype(np.float32), np.zeros(0, np.float32))
        choice = self._complete(
            ids, 1, prompt_logprobs=count, logprobs=count, return_tokens_as_token_ids=True, ignore_eos=True
        )
        found = [
            {int(token): entry["logprob"] for token, entry in row.items()}
            for row in choice["prompt_logprobs"][1:]
        ]
        following = np.array([row[token] for row, token in zip(found, ids[1:], strict=True)], np.float32)
        last = choice["logprobs"]["top_logprobs"][0]
        found.append({int(token.removeprefix("token_id:")): value for token, value in last.items()})
        rows = [sorted(row.items(), key=lambda item: -item[1])[:count] for row in found]
        return TopLogProbs(
            np.array([[token for token, _ in row] for row in rows], np.int64),
            np.array([[value for _, value in row] for row in rows], np.float32),
            following,
        )

    def generate(self, token_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """Yield the greedy continuation, made in one request; ends before the first stop token."""
        if max_new_tokens < 1:
            return
        choice = self._complete(list(token_ids), max_new_tokens, return_token_ids=True)
        for token in choice["token_ids"]:
            if token in self.special_ids.stop:
                return
            yield int(token)

    def render_chat(self, messages: Sequence[Message]) -> str | None:
        """Return the prompt text of a chat: what vLLM's ids of it stand for; ``None`` without a template."""
        ids = self.chat_token_ids(messages)
        return self._post("/detokenize", {"tokens": ids})["prompt"] if ids else None

    def chat_token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that vLLM feeds the model for a chat; the template alone decides on BOS."""
        if not self._has_template:
            return []
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._tokens({"messages": turns, "add_generation_prompt": True})
        except RequestRefused as refusal:
            raise ModelError(
                f"{self._path}: vLLM refuses the chat ({refusal}); mend the chat template"
            ) from None

    @cached_property
    def special_ids(self) -> SpecialIds:
        """Special tokens of vLLM's tokenizer; it stops at its EOS and those of the generation config."""
        bos, eos = (self._id_of(self._tokenizer.get(key)) for key in ("bos_token", "eos_token"))
        generation = _read_json(self._path / "generation_config.json") or self._config
        named = generation.get("eos_token_id")
        stops = [eos, *(named if isinstance(named, list) else [named])]
        return SpecialIds(bos, eos, tuple(dict.fromkeys(i for i in stops if isinstance(i, int))))

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the added tokens of the folder's tokenizer."""
        added = _read_json(self._path / "tokenizer.json").get("added_tokens", [])
        return tuple(str(entry["content"]) for entry in added)

    def close(self) -> None:
        """Stop the server."""
        self._process.close()

    @cached_property
    def _tokenizer(self) -> dict[str, Any]:
        """The settings of the tokenizer as vLLM holds it."""
        return self._process.call("/tokenizer_info")

    @cached_property
    def _has_template(self) -> bool:
        """Whether vLLM finds a chat template; it says so only when it is asked for a chat."""
        try:
            self._tokens({"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": True})
        except RequestRefused as refusal:
            return "default chat template" not in str(refusal)
        return True

    def _id_of(self, text: Any) -> int | None:
        ids = self._tokens({"prompt": text, "add_special_tokens": False}) if isinstance(text, str) else []
        return ids[0] if len(ids) == 1 else None

    def _tokens(self, request: dict[str, Any]) -> list[int]:
        return [int(token) for token in self._post("/tokenize", request)["tokens"]]

    def _complete(self, token_ids: list[int], max_tokens: int, **extra: Any) -> dict[str, Any]:
        """Ask for a greedy completion; sampling defaults of the folder are switched off one by one."""
        request = {
            "prompt": token_ids, "max_tokens": max_tokens, "temperature": 0.0, "top_p": 1.0, "top_k": 0,
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            **extra,
        }  # fmt: skip
        try:
            choice: dict[str, Any] = self._post("/v1/completions", request)["choices"][0]
        except RequestRefused as refusal:
            raise ModelError(f"{self._path}: vLLM refuses {len(token_ids)} tokens ({refusal})") from None
        return choice

    def _post(self, route: str, request: dict[str, Any]) -> dict[str, Any]:
        return self._process.call(route, {"model": _MODEL, **request})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plain if isinstance(plain, dict) else {}
