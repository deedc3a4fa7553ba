"""The n-gram baseline: probabilities against dictionaries filled by the definition, its stories, and what it counts."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.quality.generation import Prompt, TrainingTexts, generate_stories
from experiments.quality.held_out import HeldOut
from experiments.quality.ngram import NgramBaseline, NgramRuntime, NgramTable
from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from tests.model.small_model import small_tokenizer, story_tokens
from training.data.corpus import load_own_stories

VOCAB = 7
STORIES = st.lists(
    st.lists(st.integers(1, VOCAB - 1), max_size=12).map(lambda body: [0, *body]), min_size=1, max_size=8
)


class ByDictionary:
    """Interpolated Kneser-Ney as it is written down, with a string mark for the beginning of a story."""

    def __init__(self, stories: Sequence[Sequence[int]], order: int) -> None:
        self.counts: list[Counter[tuple[object, ...]]] = [Counter() for _ in range(order + 1)]
        marked = [["begin", *story[1:], 0] for story in stories]
        for story in marked:
            for length in range(1, order + 1):
                for start in range(len(story) - length + 1):
                    self.counts[length][tuple(story[start : start + length])] += 1
        del self.counts[1][("begin",)]
        before: dict[tuple[object, ...], set[object]] = defaultdict(set)
        for grams in self.counts[2:]:
            for gram in grams:
                before[gram[1:]].add(gram[0])
        for grams in self.counts[1:order]:
            for gram in grams:
                if gram[0] != "begin":
                    grams[gram] = len(before[gram])

    def chance(self, token: int, context: Sequence[object]) -> float:
        if len(context) >= len(self.counts) - 1:
            context = context[len(context) - len(self.counts) + 2 :]
        grams = self.counts[len(context) + 1]
        values = list(grams.values())
        once, twice = values.count(1), values.count(2)
        discount = once / (once + 2 * twice) if once else 0.5
        lower = self.chance(token, context[1:]) if context else 1 / VOCAB
        here = {gram[-1]: count for gram, count in grams.items() if gram[:-1] == tuple(context)}
        total = sum(here.values())
        if not total:
            return lower
        left = sum(min(count, discount) for count in here.values())
        return max(here.get(token, 0) - discount, 0) / total + left / total * lower


@given(STORIES, STORIES, st.integers(2, 5))
def test_nats_are_those_of_the_definition(stories: list[list[int]], judged: list[list[int]], order: int) -> None:
    got = NgramTable.count(stories, VOCAB, order).nats(judged)
    slow = ByDictionary(stories, order)
    for story, nats in zip(judged, got, strict=True):
        marked = ["begin", *story[1:], 0]
        expected = [-log(slow.chance(story[i] if i < len(story) else 0, marked[:i])) for i in range(1, len(marked))]
        assert nats == pytest.approx(expected)


@given(STORIES, st.lists(st.integers(1, VOCAB - 1), max_size=8), st.integers(2, 5))
def test_the_chances_of_the_next_token_sum_to_one_and_are_those_that_score(
    stories: list[list[int]], story: list[int], order: int
) -> None:
    table = NgramTable.count(stories, VOCAB, order)
    context: tuple[int, ...] = ()
    for place, token in enumerate([0, *story]):
        context = table.advance(context, token)
        chances_V = table.chances(context)
        assert chances_V.sum() == pytest.approx(1)
        assert chances_V.min() > 0
        wanted = [*story, 0][place]
        assert -np.log(chances_V[wanted]) == pytest.approx(table.nats([[0, *story]])[0][place])


def test_a_longer_memory_finds_what_a_shorter_one_cannot() -> None:
    def story(rng: np.random.Generator) -> list[int]:
        body = rng.integers(1, 12, 2).tolist()
        for _ in range(30):  # each token follows from the two before it, and from neither alone
            body.append(1 + (body[-1] + 5 * body[-2]) % 11)
        return [0, *body]

    rng = np.random.default_rng(0)
    seen, unseen = [story(rng) for _ in range(300)], [story(rng) for _ in range(20)]
    bigrams, trigrams = (np.concatenate(NgramTable.count(seen, 12, order).nats(unseen)).mean() for order in (2, 3))
    assert bigrams > 2
    assert trigrams < 0.8


def test_no_story_and_no_context_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one story"):
        NgramTable.count([], VOCAB)
    with pytest.raises(ValueError, match="order must be at least 2, got 1"):
        NgramTable.count([[0, 1]], VOCAB, order=1)


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    return StoryTokenizer.load(small_tokenizer())


@pytest.fixture(scope="module")
def table(tokenizer: StoryTokenizer) -> NgramTable:
    stories = [[0, *tokenizer.encode(story.text)] for story in load_own_stories("train")]
    return NgramTable.count(stories, tokenizer.vocab_size)


def test_prefill_and_steps_give_the_chances_that_score_a_story(table: NgramTable, tokenizer: StoryTokenizer) -> None:
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
    assert runtime.prefill(story[5:], state)[1] == batch.contexts[0]


def test_the_engine_generates_with_it_and_batch_mates_change_nothing(
    table: NgramTable, tokenizer: StoryTokenizer
) -> None:
    prompts = [Prompt(text, ()) for text in ("The dog", "Once", "Ben and the")]
    with Engine(NgramRuntime(table, max_batch=2), tokenizer) as engine:
        together = generate_stories(engine, prompts, [0])
    for number, prompt in enumerate(prompts):
        # Alone, the same sampling seed is that of another seed: seed `number` of a single prompt.
        with Engine(NgramRuntime(table), tokenizer) as engine:
            (alone,) = generate_stories(engine, [prompt], [number])
        assert (alone.text, alone.tokens) == (together[number].text, together[number].tokens)
    assert len({story.text for story in together}) == 3


@pytest.fixture
def held_out(tokenizer: StoryTokenizer) -> HeldOut:
    texts = tuple(story.text for story in load_own_stories("heldout")[:8])
    return HeldOut(texts, tuple([0, *tokenizer.encode(text)] for text in texts))


def test_its_figures_are_those_of_its_table(held_out: HeldOut, tokenizer: StoryTokenizer) -> None:
    baseline = NgramBaseline.measure(held_out, TrainingTexts.of([]), tokenizer)
    own = [[0, *tokenizer.encode(story.text)] for story in load_own_stories("train")]
    table = NgramTable.count(own, tokenizer.vocab_size)
    assert (baseline.stories, baseline.tokens) == (len(own), sum(map(len, own)))
    nats = table.nats(held_out.tokens)
    assert baseline.figures.loss == pytest.approx(sum(story.sum() for story in nats) / sum(map(len, nats)))
    assert baseline.source == "our own corpus"


def test_counting_stops_at_the_limit_and_reads_no_further(
    held_out: HeldOut, tokenizer: StoryTokenizer, tmp_path: Path
) -> None:
    text = "One day a dog ran."
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text((json.dumps({"text": text}) + "\n") * 3)
    bad.write_text("not json")
    length = 1 + len(tokenizer.encode(text))
    baseline = NgramBaseline.measure(held_out, TrainingTexts.of([good, bad]), tokenizer, max_tokens=2 * length)
    assert (baseline.stories, baseline.tokens) == (2, 2 * length)
