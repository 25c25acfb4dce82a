"""Text of a growing sequence: never a cut character, and in the end what decoding all ids at once gives."""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.text.detokenizer import Detokenizer
from router.text.tokenizer import Tokenizer

CHUNKS = st.lists(st.lists(st.integers(0, 2**16), max_size=5), max_size=40)


@pytest.fixture(scope="session")
def default_tokenizer(default_model: Path) -> Tokenizer:
    return Tokenizer.from_folder(default_model)


def pieces_of(tokenizer: Tokenizer, chunks: list[list[int]]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.token_bytes)
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.flush()]


@given(chunks=CHUNKS)
def test_byte_level_equals_one_shot(byte_level: Tokenizer, chunks: list[list[int]]) -> None:
    chunks = [[n % byte_level.vocab_size for n in chunk] for chunk in chunks]
    assert "".join(pieces_of(byte_level, chunks)) == byte_level.decode(list(chain.from_iterable(chunks)))


@given(chunks=CHUNKS)
def test_default_model_equals_one_shot(default_tokenizer: Tokenizer, chunks: list[list[int]]) -> None:
    """Ids above the vocabulary are among them: both skip them."""
    assert "".join(pieces_of(default_tokenizer, chunks)) == default_tokenizer.decode(list(chain.from_iterable(chunks)))


@given(text=st.text(), cuts=st.lists(st.integers(0, 200)))
def test_byte_level_text_comes_in_whole_characters(byte_level: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = byte_level.encode(text, add_special=False)
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    pieces = pieces_of(byte_level, [ids[a:b] for a, b in pairwise(edges)])
    assert "".join(pieces) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert pieces[-1] == ""
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_byte_fallback_continues_a_prompt(byte_fallback: Tokenizer, text: str) -> None:
    """The space before the first word belongs to the answer, unlike in a text that stands alone."""
    ids = [token_id for byte in text.encode() for token_id in [byte + 3]] + [260, 261, 262]
    prompt = [263]
    whole = byte_fallback.decode(prompt + ids)
    assert "".join(pieces_of(byte_fallback, [[n] for n in ids])) == whole.removeprefix("é") == text + " hello world"


def test_cut_character_waits_and_is_replaced_at_the_end(byte_level: Tokenizer) -> None:
    smile = byte_level.encode("🙂", add_special=False)
    detokenizer = Detokenizer(byte_level.token_bytes)
    assert [detokenizer.push([n]) for n in smile] == ["", "", "", "🙂"]
    assert detokenizer.push(smile[:3]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_add_nothing(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<|im_end|>b", add_special=False)
    assert "".join(pieces_of(byte_level, [ids])) == "ab"
