"""Random texts for comparing tokenizers: many scripts, emoji, code, control characters, lookalikes."""

from __future__ import annotations

import random
from collections.abc import Sequence

_SCRIPTS: tuple[tuple[int, int], ...] = (
    (0x41, 0x7A), (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x531, 0x586), (0x5D0, 0x5EA),
    (0x621, 0x64A), (0x904, 0x939), (0x985, 0x9B9), (0xB85, 0xBB9), (0xC05, 0xC39), (0xE01, 0xE3A),
    (0x10D0, 0x10F0), (0x1200, 0x1248), (0x1780, 0x17B3), (0x3041, 0x3096), (0x30A1, 0x30FA),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x10400, 0x1044F), (0x20000, 0x2A6DF),
)  # fmt: skip
"""Ranges of code points: Latin to Hangul, and two beyond the basic plane."""

_EMOJI = ("😀", "👩‍💻", "🏳️‍🌈", "🇩🇪", "👍🏽", "❤️", "🧑🏿‍🚀", "☕", "#️⃣", "🤷")
_CODE = (
    "def f(x):\n    return x**2\n", "for (int i=0;i<n;++i) {", "SELECT * FROM t WHERE a='b';", "\tif x != y:",
    '<div class="a">&nbsp;</div>', "x = {'k': [1, 2.5e-3]}", "// TODO:", "\\frac{a}{b}", "git commit -m 'x'",
    "https://example.org/a?b=c&d=%20", "0x1F4A9", "a->b::c<T>()", "#!/bin/sh\r\n", "```python\n```",
    "fn() => {}",
)  # fmt: skip
_LOOKALIKES = (
    "<|im_start|>", "<|im_end", "<s>", "</s >", "<bos>", "<eos", "<|endoftext|>", "[INST]", "<<SYS>>",
    "<unk>", "<start_of_turn>user", "<|begin_of_text|>", "<|", "|>", "<0x0A>", "▁", "Ġ", "<pad>", "<|user|>",
    "<unused1>",
)  # fmt: skip
_SPACES = (
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "   \n ",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\u2009",
    "\x0b",
    "",
)
_ODD = (
    "\u0301", "\u0308", "\u200d", "\ufeff", "\ufffd", "\x01", "\x1b[0m", "\x7f", "\x0c", "ﬁ", "ǆ", "İ", "ß",
    "e\u0301", "\u200f", "\x85",
)  # fmt: skip
_CONTRACTIONS = (
    "don't", "I'LL", "they've", "it’s", "D'Angelo", "'s", "1,234.56", "12345678", "3rd", "v1.0.2", "½",
)  # fmt: skip
_MAX_PIECES = 8


def random_texts(count: int, seed: int, specials: Sequence[str] = ()) -> list[str]:
    """Return ``count`` texts, the same for the same seed; ``specials`` are mixed in, whole and broken.

    No text holds NUL, which C runtimes take for the end, or half of a surrogate pair.
    """
    source = random.Random(seed)
    return [
        "".join(_piece(source, specials) for _ in range(source.randint(1, _MAX_PIECES))) for _ in range(count)
    ]


def _piece(source: random.Random, specials: Sequence[str]) -> str:
    roll = source.random()
    if roll < 0.45:
        return _word(source) + source.choice(_SPACES)
    if roll < 0.9:
        return source.choice(source.choice((_EMOJI, _CODE, _SPACES, _ODD, _CONTRACTIONS, _LOOKALIKES)))
    special = source.choice(specials or _LOOKALIKES)
    return special if source.random() < 0.5 else special[: source.randint(1, max(len(special), 1))]


def _word(source: random.Random) -> str:
    low, high = source.choice(_SCRIPTS)
    return "".join(chr(source.randint(low, high)) for _ in range(source.randint(1, 9)))
