"""Id 0 ends a story, every text comes back, and the same corpus gives the same pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from model.architecture.folder import END_ID
from model.errors import DataError
from training.data.corpus import load_own_stories
from training.data.shards import END_OF_STORY, load_tokenizer, train_tokenizer

TEXTS = [story.text for story in load_own_stories("train")]
TOKENIZER = train_tokenizer(TEXTS, 600)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back_from_its_tokens(text: str) -> None:
    if END_OF_STORY not in text:
        ids = TOKENIZER.encode(text, add_special_tokens=False).ids
        assert TOKENIZER.decode(ids) == text
        assert END_ID not in ids


def test_the_first_id_ends_a_story_and_the_size_is_the_one_asked_for() -> None:
    assert TOKENIZER.token_to_id(END_OF_STORY) == END_ID == 0
    assert TOKENIZER.get_vocab_size() == 600


def test_training_again_gives_the_same_pieces_however_the_stories_arrive() -> None:
    again = train_tokenizer(iter(TEXTS), 600)
    assert again.to_str() == TOKENIZER.to_str()


def test_common_words_become_one_piece_and_text_gets_shorter() -> None:
    assert len(TOKENIZER.encode(" the").ids) == 1
    text = "".join(TEXTS)
    assert len(TOKENIZER.encode(text).ids) < 0.6 * len(text.encode())


def test_pieces_join_only_inside_a_word() -> None:
    tokens = [TOKENIZER.id_to_token(i) or "" for i in range(1, 600)]
    assert all(tokens)
    assert not [token for token in tokens if "Ġ" in token.lstrip("Ġ")]


def test_a_saved_tokenizer_loads_and_encodes_the_same(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(path))
    assert load_tokenizer(path).encode(TEXTS[0]).ids == TOKENIZER.encode(TEXTS[0]).ids


def test_loading_undoes_padding_and_truncation(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    cut = Tokenizer.from_str(TOKENIZER.to_str())
    cut.enable_truncation(5)
    cut.enable_padding(length=5)
    cut.save(str(path))
    assert load_tokenizer(path).encode(TEXTS[0]).ids == TOKENIZER.encode(TEXTS[0]).ids


def test_a_tokenizer_that_is_missing_or_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot be read: No such file"):
        load_tokenizer(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"version": "1.0"')
    with pytest.raises(DataError, match=r"broken\.json: is not a tokenizer\.json"):
        load_tokenizer(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"broken\.json: is not a tokenizer\.json"):
        load_tokenizer(broken)


def test_a_tokenizer_with_another_first_piece_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    Tokenizer(models.WordLevel({"a": 0, END_OF_STORY: 1}, unk_token="a")).save(str(path))
    with pytest.raises(DataError, match="must have the id 0, but it has the id 1"):
        load_tokenizer(path)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    with pytest.raises(DataError, match="must have the id 0, but it is missing"):
        load_tokenizer(path)


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    words = Tokenizer(models.WordLevel({END_OF_STORY: 0, "once": 1}, unk_token="once"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(path))
    with pytest.raises(DataError, match="does not give every text back"):
        load_tokenizer(path)
