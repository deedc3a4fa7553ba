"""Which tokens keep a story valid UTF-8: tables over the states of an incomplete character.

A byte-level token may hold a part of a character, so a model can begin a character and go on with something else. The
tables forbid that while sampling. The states are those of a decoder of UTF-8 as RFC 3629 (section 4) defines it: 0
between two characters, and one for each set of bytes that may come next within one.

Shapes: S states, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from model.architecture.folder import END_ID
from model.architecture.names import WordTable

REJECT = 255
_ONE, _TWO, _THREE = 1, 2, 3  # so many continuation bytes are to come
_RULES: tuple[tuple[tuple[int, int, int], ...], ...] = (
    # Between characters: (first byte, last byte, next state).
    (
        *((0x00, 0x7F, 0), (0xC2, 0xDF, _ONE), (0xE0, 0xE0, 4), (0xE1, 0xEC, _TWO), (0xED, 0xED, 5)),
        *((0xEE, 0xEF, _TWO), (0xF0, 0xF0, 6), (0xF1, 0xF3, _THREE), (0xF4, 0xF4, 7)),
    ),
    ((0x80, 0xBF, 0),),
    ((0x80, 0xBF, _ONE),),
    ((0x80, 0xBF, _TWO),),
    ((0xA0, 0xBF, _ONE),),  # after E0: no overlong form
    ((0x80, 0x9F, _ONE),),  # after ED: no surrogate
    ((0x90, 0xBF, _TWO),),  # after F0: no overlong form
    ((0x80, 0x8F, _TWO),),  # after F4: nothing above U+10FFFF
)
STATES = len(_RULES)


def _byte_table() -> list[bytes]:
    """For each state, the next one for each byte, or `REJECT`."""
    table = []
    for rules in _RULES:
        row = bytearray([REJECT] * 256)
        for first, last, state in rules:
            row[first : last + 1] = bytes([state] * (last + 1 - first))
        table.append(bytes(row))
    return table


_NEXT = _byte_table()


def state_after(data: bytes, state: int = 0) -> int:
    """The state after `data`, or `REJECT` where it is not valid from `state` on."""
    for byte in data:
        state = _NEXT[state][byte]
        if state == REJECT:
            break
    return state


def open_state(data: bytes) -> int:
    """The state that any bytes end in: what is invalid before their end counts as replaced."""
    states = (state_after(data[start:]) for start in (-3, -2, -1))  # a character has four bytes at most
    return next((state for state in states if state != REJECT), 0)


class TokenMasks(NamedTuple):
    """The tokens that may follow in each state."""

    forbidden_SV: npt.NDArray[np.float32]
    """Added to logits: 0 for tokens that may come, else -inf. (2S, V): from S on, also without the end of story."""
    following: tuple[bytes, ...]
    """For each state, the state after each token; itself for one that cannot come."""
    token_bytes: Sequence[bytes]
    words: WordTable

    @classmethod
    def of(cls, token_bytes: Sequence[bytes], vocab_size: int) -> Self:
        """The tables for a vocabulary. Ids from `len(token_bytes)` up to `vocab_size` are never sampled."""
        following = np.full((STATES, vocab_size), REJECT, np.uint8)
        for token, data in enumerate(token_bytes):
            for state in range(STATES):
                following[state, token] = state_after(data, state)
        following[1:, END_ID] = REJECT  # no story ends within a character
        while True:  # a state that no token leads out of must not be entered
            dead = [state for state in range(STATES) if (following[state] == REJECT).all()]
            entering = np.isin(following, dead)
            if not entering.any():
                break
            following[entering] = REJECT
        allowed = following != REJECT
        forbidden = np.where(np.concatenate([allowed, allowed]), np.float32(0), np.float32(-np.inf))
        forbidden[STATES:, END_ID] = -np.inf
        stays = np.where(allowed, following, np.arange(STATES, dtype=np.uint8)[:, None])
        return cls(forbidden, tuple(row.tobytes() for row in stays), token_bytes, WordTable(token_bytes, vocab_size))

    @classmethod
    def none(cls, vocab_size: int) -> Self:
        """Tables that forbid nothing but, where asked for, the end of story: for logits without a tokenizer."""
        return cls.of([b""] * vocab_size, vocab_size)

    def state_of(self, tokens: Sequence[int]) -> int:
        """The state that a story of these tokens ends in."""
        return open_state(b"".join([self.token_bytes[token] for token in tokens[-8:]]))
