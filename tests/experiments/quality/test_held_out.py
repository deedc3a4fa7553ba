"""What is read to judge by, and how the nats of its tokens add up."""

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
from experiments.quality.held_out import HeldOut, figures_of, read_held_out, score
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
@given(
    st.lists(st.lists(st.integers(1, 8), max_size=9), min_size=1, max_size=7),
    st.integers(1, 5),
    st.integers(1, 40),
)
def test_nats_are_those_of_each_target_however_logits_are_batched_and_cut(
    bodies: list[list[int]], piece: int, budget: int
) -> None:
    """The scorer here gives logits that follow from the token alone, in pieces of any length."""
    table_VV = np.random.default_rng(0).normal(size=(9, 9)).astype(np.float32) * 3
    log_chances = table_VV - np.log(np.exp(table_VV.astype(np.float64)).sum(axis=1, keepdims=True))

    def scorer(stories: list[list[int]]) -> Iterator[tuple[int, Logits]]:
        longest = max(map(len, stories))
        fed = np.array([story + [0] * (longest - len(story)) for story in stories])
        for start in range(0, longest, piece):
            yield start, table_VV[fed[:, start : start + piece]]

    stories = HeldOut(
        tuple("x" * (1 + len(body)) for body in bodies), tuple([0, *body] for body in bodies), 0
    )
    heard: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH_TOKENS", budget)
        nats = score(scorer, stories, heard.append)
    assert sum(heard) == len(bodies)
    for body, got in zip(bodies, nats, strict=True):
        pairs = zip([0, *body], [*body, 0], strict=True)
        assert got == pytest.approx(
            [-log_chances[token, target] for token, target in pairs], rel=1e-5, abs=1e-6
        )


def test_figures_weigh_every_token_and_every_byte_alike() -> None:
    stories = HeldOut(("abcd", "ab"), ([0, 1, 2], [0, 1]), 0)
    figures = figures_of([np.array([1.0, 2.0, 3.0]), np.array([4.0, 0.0])], stories)
    assert figures.loss == 10 / 5
    assert figures.bits_per_byte == pytest.approx(10 / math.log(2) / 6)
    assert figures.story_bits == pytest.approx([6 / math.log(2) / 4, 4 / math.log(2) / 2])
    assert figures.story_nats.tolist() == [6.0, 4.0]
