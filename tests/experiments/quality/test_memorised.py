"""Copied runs against a search of every run, and training stories out of files, folders and shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.quality.memorised import ANCHOR, TrainingTexts, longest_copies, words
from model.errors import DataError
from training.data.corpus import load_own_stories, story_id
from training.data.prepare import PrepareOptions, prepare

TEXT = st.lists(st.sampled_from(["a", "b", "Cat"]), max_size=25).map(" ".join)


def by_search(text: str, training: list[str]) -> int:
    """Length of the longest common run of words, by trying all."""
    sequence, best = words(text), 0
    for other in map(words, training):
        for i in range(len(sequence)):
            for j in range(len(other)):
                length = 0
                while (
                    i + length < len(sequence) and j + length < len(other) and sequence[i + length] == other[j + length]
                ):
                    length += 1
                best = max(best, length)
    return best if best >= ANCHOR else 0


@given(st.lists(TEXT, min_size=1, max_size=3), st.lists(TEXT, max_size=4))
def test_the_longest_run_is_the_one_a_search_of_all_runs_finds(written: list[str], training: list[str]) -> None:
    copies = longest_copies(written, training)
    for text, copy in zip(written, copies, strict=True):
        assert copy.words == by_search(text, training)
        if copy.words:
            (source,) = {other for other in training if story_id(other) == copy.story}
            assert f" {copy.text} " in f" {' '.join(words(text))} "
            assert f" {copy.text} " in f" {' '.join(words(source))} "
            assert copy.share == copy.words / len(words(text))


def test_case_and_punctuation_hide_no_copy() -> None:
    training = ["Once there was a fox.", "He saw the big, red barn; and slept!"]
    (copy,) = longest_copies(["Then he saw the big red barn. And slept well."], training)
    assert copy.text == "he saw the big red barn and slept"
    assert (copy.words, copy.story) == (8, story_id(training[1]))


def test_no_run_reaches_from_one_story_into_the_next() -> None:
    training = ["one two three four", "five six seven eight"]
    written = ["one two three four five six seven eight"]
    assert longest_copies(written, training)[0].words == 0
    assert longest_copies(["a b c d", "e f g h"], ["a b c d e f g h"])[0].words == 0


def test_without_sources_it_is_the_training_part_of_our_own_corpus() -> None:
    training = TrainingTexts.of([])
    assert list(training) == [story.text for story in load_own_stories("train")]
    assert training.name == "our own corpus"


def test_files_and_folders_are_read_again_and_again(tmp_path: Path) -> None:
    folder = tmp_path / "tales"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"A story of {name}."}) + "\n")
    training = TrainingTexts.of([folder, folder / "b.jsonl"])
    expected = ["A story of a.", "A story of b.", "A story of b."]
    assert list(training) == list(training) == expected
    assert training.name == "tales, b.jsonl"


def test_shards_give_back_the_texts_they_were_made_of(tmp_path: Path) -> None:
    texts = [story.text for story in load_own_stories("train")]
    source = tmp_path / "own.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    prepare(PrepareOptions(sources=(source,), out=tmp_path / "shards", vocab_size=512, val_fraction=0.02))
    read = list(TrainingTexts.of([tmp_path / "shards"]))
    assert len(texts) * 0.9 < len(read) < len(texts)
    assert set(read) <= set(texts)


def test_a_source_that_is_not_there_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl"):
        TrainingTexts.of([tmp_path / "none.jsonl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no story files"):
        TrainingTexts.of([tmp_path / "empty"])
