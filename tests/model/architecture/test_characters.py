"""States within a character, and the tokens that may follow, against Python's own decoder."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.architecture.tokenizer import REJECT, STATES, StreamDecoder, TokenMasks, open_state, state_after
from tests.model.engines import TOKENIZER

BORDERS = bytes(
    [0x61, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEE, 0xF0, 0xF1, 0xF4, 0xF5]
)
"""Both sides of each border between bytes that UTF-8 tells apart."""
TOKEN_OF = {TOKENIZER.token_bytes(token): token for token in range(TOKENIZER.vocab_size)}


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@cache
def completions(data: bytes) -> bool:
    """Whether some continuation bytes make one character of `data`, which is none yet."""
    more = range(0x80, 0xC0)
    short = (bytes([one, *rest]) for one in more for rest in ((), (0x80,), (0x80, 0x80)))
    return not is_text(data) and any(is_text(data + rest) for rest in short)


def test_a_state_is_open_exactly_where_something_completes_the_character() -> None:
    for length in (1, 2, 3):
        for letters in itertools.product(BORDERS, repeat=length):
            data = bytes(letters)
            assert (state_after(data) not in (0, REJECT)) == any(
                is_text(data[:at]) and completions(data[at:]) for at in range(length)
            )
            assert (state_after(data) == 0) == is_text(data)
            assert (open_state(data) > 0) == any(completions(data[at:]) for at in range(length))


@given(st.lists(st.sampled_from(BORDERS), max_size=12))
def test_a_byte_is_allowed_exactly_where_it_goes_on_with_a_character(letters: list[int]) -> None:
    """A story of single bytes, of which those that the tables forbid are left out."""
    masks = TOKENIZER.masks(TOKENIZER.vocab_size)
    state, text = 0, b""
    for byte in letters:
        begun = next(text[at:] for at in range(len(text), -1, -1) if is_text(text[:at]))
        longer, token = begun + bytes([byte]), TOKEN_OF[bytes([byte])]
        allowed = bool(masks.forbidden_SV[state, token] == 0)
        assert allowed == (is_text(longer) or completions(longer))
        if allowed:
            state, text = masks.following[state][token], text + bytes([byte])
            assert masks.state_of([TOKEN_OF[bytes([each])] for each in text]) == state


def test_the_end_of_a_story_and_ids_that_no_token_has() -> None:
    vocab = TOKENIZER.vocab_size
    forbidden_SV = np.isneginf(TOKENIZER.masks(vocab + 3).forbidden_SV)
    assert forbidden_SV[:, vocab:].all()
    assert not forbidden_SV[0, 0]
    assert forbidden_SV[1:, 0].all()  # within a character, and where a story may not end yet
    assert np.array_equal(forbidden_SV[:STATES, 1:], forbidden_SV[STATES:, 1:])


def test_a_vocabulary_that_cannot_complete_a_character_never_begins_it() -> None:
    masks = TokenMasks.of([b"", b"a", b"\xc3", b"\xf0", b"\x85", "🦊".encode()], 6)
    assert np.isneginf(masks.forbidden_SV[0]).tolist() == [False, False, False, True, True, False]


def test_half_a_surrogate_in_a_prompt_is_no_character_that_has_begun() -> None:
    prompt = [TOKEN_OF[bytes([byte])] for byte in b"a\xed\xa0"]
    assert TOKENIZER.masks(TOKENIZER.vocab_size).state_of(prompt) == 0
    decoder = StreamDecoder(TOKENIZER, prompt)
    assert decoder.begun.startswith("a\N{REPLACEMENT CHARACTER}")
    assert decoder.push(TOKEN_OF[b"b"]) == "b"
