"""Loss by place, against a walk over all targets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.quality.held_out import HeldOut
from experiments.quality.positions import loss_by_place, target_bytes
from model.architecture.tokenizer import StoryTokenizer
from tests.model.small_model import small_tokenizer

TARGET = st.tuples(st.floats(0, 9), st.integers(0, 12), st.floats(0, 9))


@given(st.lists(st.lists(TARGET, min_size=1, max_size=20), min_size=1, max_size=5))
def test_buckets_hold_the_means_of_their_targets(stories: list[list[tuple[float, int, float]]]) -> None:
    starts = (0, 1, 4, 16)
    nats, sizes, floor = ([np.array(column) for column in columns] for columns in zip(
        *(tuple(zip(*story, strict=True)) for story in stories), strict=True
    ))  # fmt: skip
    got = {place.first: place for place in loss_by_place(nats, sizes, floor, starts)}
    for first, end in zip(starts, [*starts[1:], math.inf], strict=True):
        here = [target for story in stories for place, target in enumerate(story) if first <= place < end]
        if not here:
            assert first not in got
            continue
        place = got[first]
        assert place.tokens == len(here)
        assert place.last == (None if end == math.inf else end - 1)
        assert place.loss == pytest.approx(sum(target[0] for target in here) / len(here))
        assert place.floor_loss == pytest.approx(sum(target[2] for target in here) / len(here))
        size = sum(target[1] for target in here)
        bits = sum(target[0] for target in here) / math.log(2) / size if size else None
        assert place.bits_per_byte == (None if bits is None else pytest.approx(bits))


def test_without_a_floor_there_is_none_beside() -> None:
    (place,) = loss_by_place([np.array([1.0, 3.0])], [np.array([2, 0])], starts=(0,))
    assert (place.loss, place.floor_loss, place.tokens) == (2.0, None, 2)


def test_the_bytes_of_the_targets_are_those_of_the_text() -> None:
    tokenizer = StoryTokenizer.load(small_tokenizer())
    texts = ("A cat sat.", "Zoë said: “No!” 🐉")
    stories = HeldOut(texts, tuple([0, *tokenizer.encode(text)] for text in texts), 0)
    sizes = target_bytes(stories, tokenizer)
    assert [int(story.sum()) for story in sizes] == stories.bytes.tolist()
    assert [story[-1] for story in sizes] == [0, 0]
    assert [len(story) for story in sizes] == [len(tokens) for tokens in stories.tokens]
