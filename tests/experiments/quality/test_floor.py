"""The floor is counted on what it says it is, and only so far."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.quality.floor import Floor
from experiments.quality.held_out import HeldOut
from experiments.quality.ngram import NgramTable
from experiments.quality.training_texts import TrainingTexts
from model.architecture.tokenizer import StoryTokenizer
from tests.model.small_model import small_tokenizer
from training.data.corpus import load_own_stories


@pytest.fixture
def held_out() -> HeldOut:
    tokenizer = StoryTokenizer.load(small_tokenizer())
    texts = tuple(story.text for story in load_own_stories("heldout")[:8])
    return HeldOut(texts, tuple([0, *tokenizer.encode(text)] for text in texts), 0)


def test_its_figures_are_those_of_its_table(held_out: HeldOut) -> None:
    tokenizer = StoryTokenizer.load(small_tokenizer())
    floor = Floor.measure(held_out, TrainingTexts.of([]), tokenizer)
    own = [[0, *tokenizer.encode(story.text)] for story in load_own_stories("train")]
    table = NgramTable.count(own, tokenizer.vocab_size)
    assert (floor.stories, floor.tokens) == (len(own), sum(map(len, own)))
    nats = table.nats(held_out.tokens)
    assert floor.figures.loss == pytest.approx(sum(story.sum() for story in nats) / sum(map(len, nats)))
    assert floor.source == "our own corpus"


def test_counting_stops_at_the_limit_and_reads_no_further(held_out: HeldOut, tmp_path: Path) -> None:
    tokenizer = StoryTokenizer.load(small_tokenizer())
    text = "One day a dog ran."
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text((json.dumps({"text": text}) + "\n") * 3)
    bad.write_text("not json")
    length = 1 + len(tokenizer.encode(text))
    floor = Floor.measure(held_out, TrainingTexts.of([good, bad]), tokenizer, max_tokens=2 * length)
    assert (floor.stories, floor.tokens) == (2, 2 * length)
