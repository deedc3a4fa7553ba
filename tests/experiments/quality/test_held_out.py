"""What a model is evaluated on, how the nats of its tokens add up, and loss by place against a plain loop."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.quality import held_out as module
from experiments.quality.held_out import HeldOut, figures_of, loss_by_place, read_held_out, score, target_bytes
from model.architecture.tokenizer import StoryTokenizer
from model.errors import DataError
from model.runtimes.protocol import Logits
from tests.model.small_model import small_tokenizer

TEXTS = ["A cat sat.", "Zoë said: “No!”", "A cat sat down."]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def test_a_story_is_named_by_the_hash_of_its_text(tmp_path: Path) -> None:
    read = read_held_out([write_jsonl(tmp_path / "a.jsonl", TEXTS)], StoryTokenizer.load(small_tokenizer()))
    assert read.ids == [hashlib.sha1(text.encode()).hexdigest()[:12] for text in TEXTS]
    assert read.bytes.tolist() == [len(text.encode()) for text in TEXTS]


def test_the_digest_is_of_the_stories_and_not_of_their_files(tmp_path: Path) -> None:
    tokenizer = StoryTokenizer.load(small_tokenizer())
    whole = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(whole.read_bytes()))
    parts = [write_jsonl(tmp_path / "c.jsonl", TEXTS[:1]), write_jsonl(tmp_path / "d.jsonl", TEXTS[1:])]
    digests = [read_held_out(data, tokenizer).digest for data in ([whole], [packed], parts)]
    assert len(set(digests)) == 1
    assert read_held_out([whole], tokenizer, limit=2).digest != digests[0]
    assert read_held_out(parts[::-1], tokenizer).digest != digests[0]


def test_an_empty_story_is_refused(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", ["A story.", ""])
    with pytest.raises(DataError, match="line 2: the story is empty"):
        read_held_out([data], StoryTokenizer.load(small_tokenizer()))


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(1, 8), max_size=9), min_size=1, max_size=7), st.integers(1, 5), st.integers(1, 40))
def test_nats_are_those_of_each_target_however_logits_are_batched_and_cut(
    bodies: list[list[int]], chunk: int, budget: int
) -> None:
    """The scorer here gives logits that follow from the token alone, in chunks of any length."""
    table_VV = np.random.default_rng(0).normal(size=(9, 9)).astype(np.float32) * 3
    log_chances = table_VV - np.log(np.exp(table_VV.astype(np.float64)).sum(axis=1, keepdims=True))

    def scorer(stories: list[list[int]]) -> Iterator[tuple[int, Logits]]:
        longest = max(map(len, stories))
        fed = np.array([story + [0] * (longest - len(story)) for story in stories])
        for start in range(0, longest, chunk):
            yield start, table_VV[fed[:, start : start + chunk]]

    stories = HeldOut(tuple("x" * (1 + len(body)) for body in bodies), tuple([0, *body] for body in bodies))
    heard: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH_TOKENS", budget)
        nats = score(scorer, stories, heard.append)
    assert sum(heard) == len(bodies)
    for body, got in zip(bodies, nats, strict=True):
        pairs = zip([0, *body], [*body, 0], strict=True)
        assert got == pytest.approx([-log_chances[token, target] for token, target in pairs], rel=1e-5, abs=1e-6)


def test_figures_weigh_every_token_and_every_byte_alike() -> None:
    stories = HeldOut(("abcd", "ab"), ([0, 1, 2], [0, 1]))
    figures = figures_of([np.array([1.0, 2.0, 3.0]), np.array([4.0, 0.0])], stories)
    assert figures.loss == 10 / 5
    assert figures.bits_per_byte == pytest.approx(10 / math.log(2) / 6)
    assert figures.story_nats.tolist() == [6, 4]
    assert figures.story_nats.tolist() == [6.0, 4.0]


TARGET = st.tuples(st.floats(0, 9), st.integers(0, 12), st.floats(0, 9))


@given(st.lists(st.lists(TARGET, min_size=1, max_size=20), min_size=1, max_size=5))
def test_buckets_hold_the_means_of_their_targets(stories: list[list[tuple[float, int, float]]]) -> None:
    starts = (0, 1, 4, 16)
    nats, sizes, baseline = (
        [np.array([target[column] for target in story]) for story in stories] for column in range(3)
    )
    got = {place.first: place for place in loss_by_place(nats, sizes, baseline, starts)}
    for first, end in zip(starts, [*starts[1:], math.inf], strict=True):
        here = [target for story in stories for place, target in enumerate(story) if first <= place < end]
        if not here:
            assert first not in got
            continue
        place = got[first]
        assert place.tokens == len(here)
        assert place.last == (None if end == math.inf else end - 1)
        assert place.loss == pytest.approx(sum(target[0] for target in here) / len(here))
        assert place.baseline_loss == pytest.approx(sum(target[2] for target in here) / len(here))
        size = sum(target[1] for target in here)
        bits = sum(target[0] for target in here) / math.log(2) / size if size else None
        assert place.bits_per_byte == (None if bits is None else pytest.approx(bits))


def test_without_a_baseline_there_is_none() -> None:
    (place,) = loss_by_place([np.array([1.0, 3.0])], [np.array([2, 0])], starts=(0,))
    assert (place.loss, place.baseline_loss, place.tokens) == (2.0, None, 2)


def test_the_bytes_of_the_targets_are_those_of_the_text() -> None:
    tokenizer = StoryTokenizer.load(small_tokenizer())
    texts = ("A cat sat.", "Zoë said: “No!” 🐉")
    stories = HeldOut(texts, tuple([0, *tokenizer.encode(text)] for text in texts))
    sizes = target_bytes(stories, tokenizer)
    assert [int(story.sum()) for story in sizes] == stories.bytes.tolist()
    assert [story[-1] for story in sizes] == [0, 0]
    assert [len(story) for story in sizes] == [len(tokens) for tokens in stories.tokens]
