"""Token counts by a model's own tokenizer, for endpoints that do not state theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cusprun.errors import ModelError

FILE_NAME = "tokenizer.json"


@dataclass(frozen=True)
class Tokens:
    """A tokenizer: the number of tokens of a text, and its beginning of so many tokens."""

    count: Callable[[str], int]
    cut: Callable[[str, int], str]


def load_tokens(path: Path) -> Tokens:
    """Load ``tokenizer.json``, or that of a folder.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from tokenizers import Tokenizer

    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{file} does not exist; give a {FILE_NAME} or the folder that holds one")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{file} is no tokenizer that can be read ({error}); give a {FILE_NAME}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    def cut(text: str, num_tokens: int) -> str:
        # By its place in the text: what decoding gives is not always the text that was encoded.
        ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
        return text if len(ends) <= num_tokens else text[: ends[num_tokens - 1]]

    return Tokens(count, cut)
