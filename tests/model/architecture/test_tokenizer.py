"""Text to tokens and back, whole and streamed, with a real tokenizer trained here on a few sentences."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.architecture.tokenizer import StoryTokenizer, StreamDecoder
from model.errors import ModelError
from training.data.shards import train_tokenizer

SENTENCES = [
    "Once upon a time there was a little fox who lived under the old oak tree.",
    "The fox found a red ball, and the ball was bigger than the fox!",
    "„Grüß dich“, sagte der Bär, „möchtest du süße Äpfel?“ - naïve Élan.",
    "🦊 and 🐻 shared 🍎🍎🍎 under the 🌳. 👩‍👩‍👧 came too, 日本 and Ελλάδα.",
]
TRAINED = train_tokenizer(SENTENCES * 20, vocab_size=400)
TOKENIZER = StoryTokenizer(TRAINED)
ANY_TOKENS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=60)


def streamed(tokens: list[int]) -> tuple[str, list[str]]:
    decoder = StreamDecoder(TOKENIZER)
    chunks = [decoder.push(token) for token in tokens]
    return "".join(chunks), chunks


@given(st.text(max_size=80))
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    assert b"".join(TOKENIZER.token_bytes(token) for token in tokens) == text.encode()


@given(st.text(alphabet="afäßñ日🦊👩‍👧\n ", max_size=40))
def test_streamed_text_equals_whole_text_and_no_character_is_split(text: str) -> None:
    whole, chunks = streamed(TOKENIZER.encode(text))
    assert whole == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(chunks)


@given(ANY_TOKENS)
def test_any_tokens_decode_alike_streamed_and_whole_and_by_the_library(tokens: list[int]) -> None:
    whole = b"".join(TOKENIZER.token_bytes(token) for token in tokens)
    assert streamed(tokens)[0] == codecs.getincrementaldecoder("utf-8")("replace").decode(whole)
    assert TOKENIZER.decode(tokens) == TRAINED.decode(tokens, skip_special_tokens=True)


def test_an_emoji_comes_with_its_last_byte_and_not_before() -> None:
    byte_tokens = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size)}
    decoder = StreamDecoder(TOKENIZER)
    given_out = [decoder.push(byte_tokens[bytes([byte])]) for byte in "🦊".encode()]
    assert given_out == ["", "", "", "🦊"]


@given(st.text(alphabet="aß日🦊", max_size=9), st.integers(0, 30))
def test_a_stream_that_begins_within_a_character_completes_it(text: str, cut: int) -> None:
    tokens = [
        next(i for i in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(i) == bytes([b])) for b in text.encode()
    ]
    decoder = StreamDecoder(TOKENIZER, tokens[:cut])
    after = "".join(decoder.push(token) for token in tokens[cut:])
    assert decoder.begun + after == text
    assert len(decoder.begun.encode()) <= cut


def test_the_end_of_story_has_no_text_and_cannot_be_typed() -> None:
    assert TOKENIZER.token_bytes(0) == b""
    typed = TOKENIZER.encode("a<|endoftext|>b")
    assert 0 not in typed
    assert TOKENIZER.decode([0, *typed, 0]) == "a<|endoftext|>b"


def test_trailing_spaces_of_a_prompt_are_kept() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("Once upon  ")) == "Once upon  "


def test_a_tokenizer_loads_from_its_file_and_from_its_folder(tmp_path: Path) -> None:
    TRAINED.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert StoryTokenizer.load(path).encode("the little fox") == TOKENIZER.encode("the little fox")


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: there is no tokenizer"):
        StoryTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a readable tokenizer"):
        StoryTokenizer.load(tmp_path)


def test_a_vocabulary_that_is_not_byte_level_is_refused() -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(ModelError, match="token 0 must be the special end-of-story token"):
        StoryTokenizer(Tokenizer(models.WordLevel({"fox": 0})))
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "日本": 1}, unk_token="日本"))
    words.add_special_tokens(["<|endoftext|>"])
    with pytest.raises(ModelError, match=r"token 1 .* is not made of byte letters"):
        StoryTokenizer(words)
