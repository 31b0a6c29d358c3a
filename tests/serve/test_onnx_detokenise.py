"""Tokens to text while they come, against the text of all tokens at once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_exports import byte_level_tokenizer, sentencepiece_tokenizer

from serve.onnx_server.detokenise import Detokenizer


class Decoding:
    """Decoders of both kinds; the tokens of one are bytes of UTF-8, also such as never make a character."""

    byte_level = byte_level_tokenizer().backend_tokenizer
    sentencepiece = sentencepiece_tokenizer().backend_tokenizer


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 386), max_size=30), num_before=st.integers(0, 12))
def test_pieces_are_whole_characters_and_make_the_text(ids: list[int], num_before: int) -> None:
    tokenizer = Decoding.byte_level
    before, after = ids[:num_before], ids[num_before:]
    detokenizer = Detokenizer(tokenizer.decode, before)
    pieces = [detokenizer.push(token) for token in after]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    said = "".join(pieces) + detokenizer.finish()
    if tokenizer.decode(before).endswith("\ufffd"):
        assert said == tokenizer.decode(after).rstrip("\ufffd")
    else:
        assert tokenizer.decode(before) + said == tokenizer.decode(ids).rstrip("\ufffd") or not said


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30), cut=st.integers(0, 99))
def test_texts_come_back_after_any_prompt(text: str, cut: int) -> None:
    """Of the spaces at the beginning of a text decoders drop one; inside a text none may be lost."""
    for tokenizer in (Decoding.byte_level, Decoding.sentencepiece):
        ids = tokenizer.encode(f"go {text}", add_special_tokens=False).ids
        at = 1 + cut % len(ids)
        detokenizer = Detokenizer(tokenizer.decode, ids[:at])
        said = "".join(detokenizer.push(token) for token in ids[at:]) + detokenizer.finish()
        shown = tokenizer.decode(ids[:at])
        if not shown.endswith("\ufffd") and not text.endswith("\ufffd"):
            assert shown + said == tokenizer.decode(ids)
