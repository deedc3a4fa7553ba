"""The table behind the engine: it says what it scores with, and a story depends on its seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.quality.generated import Prompt, write_stories
from experiments.quality.ngram import NgramTable
from experiments.quality.ngram_runtime import NgramRuntime
from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from tests.model.small_model import small_tokenizer, story_tokens
from training.data.corpus import load_own_stories


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    return StoryTokenizer.load(small_tokenizer())


@pytest.fixture(scope="module")
def table(tokenizer: StoryTokenizer) -> NgramTable:
    stories = [[0, *tokenizer.encode(story.text)] for story in load_own_stories("train")]
    return NgramTable.count(stories, tokenizer.vocab_size)


def test_prefill_and_steps_give_the_chances_that_score_a_story(
    table: NgramTable, tokenizer: StoryTokenizer
) -> None:
    runtime = NgramRuntime(table)
    (story,) = story_tokens(tokenizer, 1)
    (expected,) = table.nats([story])
    logits, state = runtime.prefill(story[:5])
    assert -logits[story[5]] == pytest.approx(expected[4], rel=1e-5)
    batch = runtime.new_batch()
    batch.append(state)
    for place in range(5, len(story)):
        logits_BV = runtime.step(np.array([story[place]]), batch)
        target = [*story, 0][place + 1]
        assert -logits_BV[0, target] == pytest.approx(expected[place], rel=1e-5)
    assert batch.read(0).position == len(story)
    assert runtime.prefill(story[5:], state)[1] == batch.read(0)


def test_the_engine_writes_with_it_and_neighbours_change_nothing(
    table: NgramTable, tokenizer: StoryTokenizer
) -> None:
    prompts = [Prompt(text, ()) for text in ("The dog", "Once", "Ben and the")]
    with Engine(NgramRuntime(table, max_batch=2), tokenizer) as engine:
        together = write_stories(engine, prompts, [0])
    for number, prompt in enumerate(prompts):
        # Alone, the same dice are those of another seed: seed `number` of a single prompt.
        with Engine(NgramRuntime(table), tokenizer) as engine:
            (alone,) = write_stories(engine, [prompt], [number])
        assert (alone.text, alone.tokens) == (together[number].text, together[number].tokens)
    assert len({story.text for story in together}) == 3
