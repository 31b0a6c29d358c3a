"""What an exported ONNX folder says besides its graph: settings, tokenizer, chat template, stop tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cusprun.errors import ModelError, reason_of
from cusprun.records import Message
from serve.runtimes.chat_template import render_template
from serve.runtimes.protocol import SpecialIds

_MODEL_KEYS = ("decoder", "context_length", "vocab_size", "eos_token_id")
_DECODER_KEYS = ("filename", "num_key_value_heads", "head_size")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of an artifact; raises ``ModelError`` when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); export the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a mapping; export the model again")
    return value


def read_settings(path: Path) -> dict[str, Any]:
    """Return the part ``model`` of a folder's ``genai_config.json``, with all that is read from it.

    Raises:
        ModelError: the file is missing or damaged.
    """
    file = path / "genai_config.json"
    model: Any = read_json(file).get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    for name, part, keys in (("model", model, _MODEL_KEYS), ("model.decoder", decoder, _DECODER_KEYS)):
        absent = [key for key in keys if not isinstance(part, dict) or key not in part]
        if absent:
            raise ModelError(f"{file} has no {name}.{absent[0]}; export the model again")
    return dict(model)


class OnnxFolder:
    """The texts of a folder made by ``exporters.onnx``.

    Token ids come from ``tokenizer.json`` through the tokenizers library, chats from ``chat_template.jinja``.

    Raises:
        ModelError: a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self.path = path
        self.model: Mapping[str, Any] = read_settings(path)
        self.vocab_size = int(self.model["vocab_size"])
        self._tokenizer_config = read_json(path / "tokenizer_config.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception, with a text
            raise ModelError(
                f"{path / 'tokenizer.json'} cannot be read ({reason_of(error)}); export it again"
            ) from None

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """Return the token ids of ``text``; special tokens in the text are recognised."""
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=add_special).ids]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out; bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    @cached_property
    def template(self) -> str | None:
        """The chat template; ``None`` without one."""
        path = self.path / "chat_template.jinja"
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def render_chat(self, messages: Sequence[Message]) -> str | None:
        """Return the prompt text of a chat; ``None`` without a template."""
        if self.template is None:
            return None
        bos, eos = (str(self._tokenizer_config.get(f"{name}_token") or "") for name in ("bos", "eos"))
        return render_template(self.template, messages, bos, eos)

    @cached_property
    def special_ids(self) -> SpecialIds:
        """Special tokens as ``genai_config.json`` states them; the first stop is EOS."""
        stops = self.model["eos_token_id"]
        stop = tuple(stops) if isinstance(stops, list) else (stops,)
        return SpecialIds(self.model.get("bos_token_id"), stop[0], stop)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the added tokens."""
        return tuple(str(token.content) for token in self._tokenizer.get_added_tokens_decoder().values())
