"""Text to tokens and back, to the byte, whole or as it streams.

A byte-level token may hold half a character, so a stream cannot decode its tokens one by one. Every token is known here
as exact bytes, and a `StreamDecoder` releases a character once its last byte has come. Whole and streamed decoding are
the same function of the same bytes, and so give the same text.

A model can begin a character and go on with something else. `TokenMasks` forbid that while sampling: tables over the
states of a decoder of UTF-8 as RFC 3629 (section 4) defines it, 0 between two characters, and one for each set of bytes
that may come next within one.

Shapes: S states, V vocabulary.
"""

import codecs
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer

from model.architecture.folder import END_ID
from model.architecture.names import WordTable
from model.errors import ModelError

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


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """The visible letter that stands for each byte in a byte-level vocabulary (Radford et al. 2019, section 2.2).

    Printable bytes of Latin-1 stand for themselves; the others, in order, take the letters from U+0100 on.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class StoryTokenizer:
    """A byte-level BPE vocabulary whose token 0 is the end of a story.

    `encode` strips nothing: the model goes on after a prompt's last character. A prompt that ends in a space ends in a
    lone space token; since most tokens begin with their space ("␣fox"), a story usually reads better from a prompt that
    ends at a word. Text that looks like a special token ("<|endoftext|>") is read as the letters it consists of.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap a trained tokenizer. Raises `ModelError` if it is no byte-level vocabulary with an end at 0."""
        # The setting below belongs to the object: a copy keeps the caller's own as it was.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        added: dict[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        if END_ID not in added or not added[END_ID].special:
            raise ModelError(f"tokenizer: token {END_ID} must be the special end-of-story token, and is not")
        letters = _byte_of_letter()
        tokens: list[bytes] = []
        for token in range(self._tokenizer.get_vocab_size(with_added_tokens=True)):
            name = self._tokenizer.id_to_token(token)
            if name is None:
                raise ModelError(f"tokenizer: ids must run from 0 without a gap, and {token} is missing")
            if token in added:
                tokens.append(b"" if added[token].special else name.encode())
                continue
            try:
                tokens.append(bytes(letters[letter] for letter in name))
            except KeyError:
                raise ModelError(f"tokenizer: token {token} ({name!r}) is not made of byte letters") from None
        self._bytes = tokens
        self._texts: list[str | None] = [_whole_characters(data) for data in tokens]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read `tokenizer.json`, or the one in the folder `path`. Raises `ModelError` that names the file."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"{file}: there is no tokenizer here; a model folder must hold tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare `Exception` for everything
            raise ModelError(f"{file}: not a readable tokenizer ({error})") from None
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, the end of story included."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without the leading end-of-story token."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: special tokens have none, and bytes that form no character become U+FFFD."""
        return b"".join([self._bytes[token] for token in ids]).decode("utf-8", "replace")

    def masks(self, vocab_size: int) -> TokenMasks:
        """Which tokens keep a story valid UTF-8, for logits over `vocab_size` tokens. Takes 15 ms for 4,096."""
        return TokenMasks.of(self._bytes, vocab_size)

    def token_bytes(self, token: int) -> bytes:
        """Exactly the bytes that `token` adds to a story; empty for the end of story."""
        return self._bytes[token]

    def token_text(self, token: int) -> str | None:
        """The text of `token` where its bytes are whole characters, else None."""
        return self._texts[token]


def _whole_characters(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


class StreamDecoder:
    """Text out of tokens as they come, never half a character.

    `begun` and what `push` gives, joined, equal `StoryTokenizer.decode` of the same tokens, without the half of a
    character that may stand at its end.
    """

    def __init__(self, tokenizer: StoryTokenizer, before: Sequence[int] = ()) -> None:
        """Begin after the tokens `before`, whose last character may be completed by those that follow."""
        self._bytes = tokenizer._bytes
        self._texts = tokenizer._texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.begun = self._decoder.decode(b"".join([self._bytes[token] for token in before]))
        """The text of `before`, without half a character at its end."""
        unread = self._decoder.getstate()[0]
        self._open = bool(unread)  # a character has begun
        if unread and not open_state(unread):  # ED A0: Python waits for a surrogate, which no text may hold
            self.begun += self._decoder.decode(b"", final=True)
            self._open = False

    def push(self, token: int) -> str:
        """The characters that are complete now that `token` has come; often none or several."""
        if not self._open:
            # Nine in ten tokens are whole characters: their text was made once, and is looked up in 50 ns.
            text = self._texts[token]
            if text is not None:
                return text
        text = self._decoder.decode(self._bytes[token])
        self._open = bool(self._decoder.getstate()[0])
        return text
