"""The tokenizer gives every text back; stories of tokens are read back the same; what does not fit is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from model.architecture.folder import END_ID
from model.errors import DataError
from training.data.corpus import load_own_stories
from training.data.shards import (
    END_OF_STORY,
    ShardWriter,
    TokenShard,
    load_tokenizer,
    read_meta,
    shards_digest,
    train_tokenizer,
)

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


STORIES = st.lists(st.lists(st.integers(1, 65_535), max_size=20), max_size=10)


def write(folder: Path, stories: list[list[int]], split: str = "train") -> None:
    with ShardWriter(folder, split) as writer:
        for story in stories:
            writer.add(story)


@given(stories=STORIES)
def test_stories_come_back_and_the_file_is_their_plain_sequence(
    tmp_path_factory: pytest.TempPathFactory, stories: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    write(folder, stories)
    shard = TokenShard(folder, "train")
    assert len(shard) == len(stories)
    assert [shard.story(i).tolist() for i in range(len(shard))] == [[0, *story] for story in stories]
    flat = [token for story in stories for token in [0, *story]] + [0]
    assert shard.tokens.tolist() == flat
    # The same file by hand: two bytes a token, the lower one first.
    assert (folder / "train.bin").read_bytes() == b"".join(token.to_bytes(2, "little") for token in flat)
    assert [i for i, token in enumerate(flat) if token == 0] == shard.starts.tolist()


def test_neighbouring_starts_give_a_story_with_both_marks(tmp_path: Path) -> None:
    write(tmp_path, [[5, 6], [7]])
    shard = TokenShard(tmp_path, "train")
    a, b = shard.starts[1], shard.starts[2]
    assert shard.tokens[a : b + 1].tolist() == [0, 7, 0]


def test_the_writer_counts_targets_and_stories(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "val") as writer:
        writer.add([5, 6])
        writer.add([])
    assert (writer.stories, writer.tokens) == (2, 4)
    assert writer.tokens == len(TokenShard(tmp_path, "val").tokens) - 1


def test_tokens_are_mapped_and_cannot_be_changed(tmp_path: Path) -> None:
    write(tmp_path, [[5, 6]])
    shard = TokenShard(tmp_path, "train")
    assert isinstance(shard.tokens, np.memmap)
    assert shard.story(0).base is not None
    with pytest.raises(ValueError, match="read-only"):
        shard.story(0)[0] = 1


@pytest.mark.parametrize("token", [0, -1, 65_536])
def test_a_token_that_would_end_the_story_or_not_fit_is_refused(tmp_path: Path, token: int) -> None:
    with pytest.raises(DataError, match="train story 1: token ids must be between 1 and 65535"):
        write(tmp_path, [[1], [5, token]])
    assert not (tmp_path / "train.idx.npy").exists()


@pytest.mark.parametrize("i", [-1, 2])
def test_a_story_beyond_the_ends_is_an_error(tmp_path: Path, i: int) -> None:
    write(tmp_path, [[5], [6]])
    with pytest.raises(IndexError, match="story must be between 0 and 1"):
        TokenShard(tmp_path, "train").story(i)


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.bin: no such file; `story data` makes it"):
        TokenShard(tmp_path, "train")


def test_files_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [[5, 6], [7]])
    tokens, index = tmp_path / "train.bin", tmp_path / "train.idx.npy"
    good_tokens, good_index = tokens.read_bytes(), index.read_bytes()
    for damaged in (good_tokens[:-2], good_tokens[:-1], good_tokens + b"\0\0"):
        tokens.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train\.bin: holds .* tokens where its index speaks of 6"):
            TokenShard(tmp_path, "train")
    tokens.write_bytes(good_tokens[2:] + b"\0\0")
    with pytest.raises(DataError, match="does not begin with token 0"):
        TokenShard(tmp_path, "train")
    tokens.write_bytes(good_tokens)
    index.write_bytes(good_index[:-3])
    with pytest.raises(DataError, match="damaged index"):
        TokenShard(tmp_path, "train")
    for wrong in (np.array([0, 3, 5], np.int32), np.array([1, 5]), np.array([[0, 5]]), np.array([], np.int64)):
        np.save(index, wrong)
        with pytest.raises(DataError, match="must be a row of int64 that begins with 0"):
            TokenShard(tmp_path, "train")
    np.save(index, np.array([0, 3, 3, 5]))
    with pytest.raises(DataError, match="where its index speaks of 6"):
        TokenShard(tmp_path, "train")


def test_the_digest_follows_tokenizer_and_tokens(tmp_path: Path) -> None:
    write(tmp_path, [[5]])
    write(tmp_path, [[6]], "val")
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        shards_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    before = shards_digest(tmp_path)
    assert before == hashlib.sha256(b"{}" + b"\0\0\5\0\0\0" + b"\0\0\6\0\0\0").hexdigest()
    (tmp_path / "meta.json").write_text("{}")
    assert shards_digest(tmp_path) == before
    write(tmp_path, [[7]], "val")
    assert shards_digest(tmp_path) != before


def test_the_digest_follows_the_places_that_are_no_targets(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    digests = []
    for train, val in (((), ()), ((0,), ()), ((1,), ()), ((), (0,))):
        for split, masked in (("train", train), ("val", val)):
            (tmp_path / f"{split}.masked.npy").unlink(missing_ok=True)
            with ShardWriter(tmp_path, split) as shard:
                shard.add([5, 6], masked)
        digests.append(shards_digest(tmp_path))
    assert len(set(digests)) == 4, "the same tokens, masked in four ways"


def test_a_broken_meta_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"meta\.json: cannot be read"):
        read_meta(tmp_path)
    path = tmp_path / "meta.json"
    path.write_text('{"digest": "x"}')
    assert read_meta(tmp_path) == {"digest": "x"}
    path.write_text("{")
    with pytest.raises(DataError, match=r"meta\.json: is not valid JSON"):
        read_meta(tmp_path)
    path.write_text("[]")
    with pytest.raises(DataError, match="must hold a JSON object"):
        read_meta(tmp_path)
