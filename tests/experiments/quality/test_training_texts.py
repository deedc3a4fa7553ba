"""Training stories come out the same from files, folders and shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.quality.training_texts import TrainingTexts
from model.errors import DataError
from training.data.corpus import load_own_stories
from training.data.prepare import PrepareOptions, prepare


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
