"""Headers of training stories: each tells what its story has, to the token, and is read but never learned."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.architecture.folder import PRETRAINED
from model.architecture.tokenizer import StoryTokenizer
from model.wishes import Wishes, ending_of
from tests.training.data.test_rename import RENAMER, STORIES
from training.data.corpus import load_own_stories
from training.data.prepare import PrepareOptions, prepare
from training.data.shards import TokenShard
from training.data.wishes import WishSampler

SAMPLER = WishSampler(RENAMER.lower + Counter(["bear", "ball"]), 60, seed=3)


@given(STORIES, st.text("0123456789abcdef", min_size=1, max_size=12), st.integers(0, 5), st.booleans())
def test_a_story_meets_what_its_header_tells(text: str, story: str, copy: int, sad: bool) -> None:
    sad = sad and ending_of(text) == "sad"
    names = RENAMER.names_in(text)
    wishes = SAMPLER.draw(text, names, story=story, copy=copy, sad=sad)
    assert all(wishes.met(text).values())
    assert wishes == SAMPLER.draw(text, names, story=story, copy=copy, sad=sad)
    assert not sad or wishes.ending == "sad"


def test_about_half_of_the_stories_have_a_header_and_each_wish_is_common() -> None:
    texts = [story.text for story in load_own_stories("train")]
    drawn = [
        SAMPLER.draw(text, RENAMER.names_in(text), story=str(number), copy=copy)
        for number, text in enumerate(texts)
        for copy in range(2000 // len(texts) + 1)
    ]
    some = [wishes for wishes in drawn if wishes != Wishes()]
    assert 0.4 < len(some) / len(drawn) < 0.55  # a few draw no wish
    for name in ("length", "dialogue"):
        assert sum(getattr(wishes, name) is not None for wishes in some) > 0.3 * len(some)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards with headers, and the same without."""
    folder = tmp_path_factory.mktemp("shards")
    source = folder / "stories.jsonl"
    source.write_text("".join(json.dumps({"text": story.text}) + "\n" for story in load_own_stories("train")))
    tokenizer = PRETRAINED / "tokenizer.json"
    for name in ("plain", "wishes"):
        wishes = name == "wishes"
        prepare(
            PrepareOptions(
                sources=(source,), out=folder / name, tokenizer=tokenizer, rename=1, val_fraction=0.1, wishes=wishes
            )
        )
    return folder / "plain", folder / "wishes"


def test_headers_stand_before_the_stories_as_no_targets(made: tuple[Path, Path]) -> None:
    plain, wishes = (TokenShard(folder, "train") for folder in made)
    tokenizer = StoryTokenizer.load(made[1])
    before = {tokenizer.decode(plain.story(index)[1:].tolist()) for index in range(len(plain))}
    headers = 0
    for index in range(len(wishes)):
        tokens = wishes.story(index)[1:].tolist()
        text = tokenizer.decode(tokens)
        start = int(wishes.starts[index]) + 1
        masked = [place - start for place in wishes.masked.tolist() if start <= place < start + len(tokens)]
        if text.startswith("\x02"):
            headers += 1
            header, _, text = text.partition("\x03")
            length = len(tokenizer.encode(header + "\x03"))
            assert masked[:length] == list(range(length))
            known = [word.strip() for word in header.partition("words: ")[2].partition(";")[0].split(",")]
            hidden = tokenizer.decode([tokens[place] for place in masked[length:]])
            assert not any(word and word in hidden.split() for word in known)
        assert text in before or ending_of(text) == "sad"
    assert 0.3 < headers / len(wishes) < 0.7
    assert np.array_equal(TokenShard(made[0], "val").tokens, TokenShard(made[1], "val").tokens)
