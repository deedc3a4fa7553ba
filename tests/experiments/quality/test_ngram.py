"""The floor's probabilities, against dictionaries filled by the definition, one n-gram after another."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.quality.ngram import NgramTable

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
def test_nats_are_those_of_the_definition(
    stories: list[list[int]], judged: list[list[int]], order: int
) -> None:
    got = NgramTable.count(stories, VOCAB, order).nats(judged)
    slow = ByDictionary(stories, order)
    for story, nats in zip(judged, got, strict=True):
        marked = ["begin", *story[1:], 0]
        expected = [
            -log(slow.chance(story[i] if i < len(story) else 0, marked[:i])) for i in range(1, len(marked))
        ]
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
    def story(dice: np.random.Generator) -> list[int]:
        body = dice.integers(1, 12, 2).tolist()
        for _ in range(30):  # each token follows from the two before it, and from neither alone
            body.append(1 + (body[-1] + 5 * body[-2]) % 11)
        return [0, *body]

    dice = np.random.default_rng(0)
    seen, unseen = [story(dice) for _ in range(300)], [story(dice) for _ in range(20)]
    bigrams, trigrams = (
        np.concatenate(NgramTable.count(seen, 12, order).nats(unseen)).mean() for order in (2, 3)
    )
    assert bigrams > 2
    assert trigrams < 0.8


def test_no_story_and_no_context_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one story"):
        NgramTable.count([], VOCAB)
    with pytest.raises(ValueError, match="order must be at least 2, got 1"):
        NgramTable.count([[0, 1]], VOCAB, order=1)
