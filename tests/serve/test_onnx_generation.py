"""When the pieces of a stream come, with a clock that moves with the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace

import pytest

from serve.onnx_server.generation import PIECE_INTERVAL_S, Counts, Piece, generate
from serve.onnx_server.prompts import Prompt
from serve.onnx_server.wishes import Wish

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class FakeModel:
    """Makes the alphabet, a letter every ``token_s``."""

    context_tokens = 100
    stop_ids = frozenset({99})

    def __init__(self, token_s: float) -> None:
        self.token_s, self.now, self.made = token_s, 1000.0, 0
        self.folder = SimpleNamespace(detokenize=self.detokenize)

    @staticmethod
    def detokenize(ids: Sequence[int]) -> str:
        return "".join(LETTERS[token] for token in ids)

    def start(self, *_: object) -> FakeModel:
        return self

    def next(self) -> int:
        self.now += self.token_s
        self.made += 1
        return self.made - 1

    def close(self) -> None: ...

    def clock(self) -> float:
        return self.now


def pieces(token_s: float, count: int, in_pieces: bool = True) -> list[tuple[float, Piece]]:
    model = FakeModel(token_s)
    wish = Wish({}, (), count)
    steps = generate(model, Prompt((1,), False), wish, 0, in_pieces, Counts(), model.clock)  # type: ignore[arg-type]
    return [(model.now - 1000, piece) for piece in steps if piece is not None]


@pytest.mark.parametrize("token_s", [0.001, 0.01, 0.02, 0.05, 0.5])
def test_a_stream_has_its_first_token_at_once_and_then_a_piece_at_most_30_times_a_second(
    token_s: float,
) -> None:
    found = pieces(token_s, 26)
    assert "".join(piece.text for _, piece in found) == LETTERS
    assert found[0][1].text == "a"
    assert found[0][0] == pytest.approx(token_s)
    times = [time for time, _ in found]
    apart = [later - earlier for earlier, later in pairwise(times[:-1])]
    assert all(gap >= PIECE_INTERVAL_S - 1e-9 for gap in apart)
    # No token waits longer than the interval and the token that ends it.
    assert all(gap <= PIECE_INTERVAL_S + token_s + 1e-9 for gap in apart)
    assert found[-1][1].finish_reason == "length"
    assert found[-1][1].num_tokens == 26


def test_a_slow_model_shows_every_token_by_itself() -> None:
    assert [piece.text for _, piece in pieces(0.05, 5)] == list("abcde")


def test_what_is_no_stream_comes_whole() -> None:
    ((_, piece),) = pieces(0.01, 9, in_pieces=False)
    assert piece.text == LETTERS[:9]
