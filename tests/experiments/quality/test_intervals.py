"""Intervals: they hold the truth as often as they say, and are repeatable."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.quality.intervals import mean_over_prompts, ratio_of_sums


def test_the_interval_of_a_mean_is_nearly_the_normal_one() -> None:
    values = np.random.default_rng(1).exponential(size=400)
    got = ratio_of_sums(values, np.ones(400))
    error = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert got.mean == pytest.approx(values.mean())
    assert (got.mean - got.low, got.high - got.mean) == pytest.approx((error, error), rel=0.15)
    assert got.n == 400


def test_a_ratio_weighs_long_stories_more() -> None:
    assert ratio_of_sums([10.0, 1.0], [10.0, 2.0]).mean == pytest.approx(11 / 12)


def test_the_same_dice_give_the_same_interval() -> None:
    values = np.random.default_rng(2).normal(size=50)
    assert ratio_of_sums(values, np.ones(50)) == ratio_of_sums(values, np.ones(50))
    assert ratio_of_sums(values, np.ones(50)) != ratio_of_sums(values, np.ones(50), seed=1)
    assert mean_over_prompts(values[:, None]) == mean_over_prompts(values[:, None])


def test_stories_of_one_prompt_that_are_all_alike_are_no_further_evidence() -> None:
    one = np.random.default_rng(3).normal(size=(60, 1))
    alone, tenfold = mean_over_prompts(one), mean_over_prompts(np.repeat(one, 10, axis=1))
    assert alone is not None
    assert tenfold is not None
    assert tenfold.high - tenfold.low == pytest.approx(alone.high - alone.low, rel=0.15)
    singly = ratio_of_sums(np.repeat(one, 10), np.ones(600))
    assert singly.high - singly.low < 0.5 * (alone.high - alone.low)


def test_nineteen_of_twenty_intervals_hold_the_true_mean() -> None:
    dice = np.random.default_rng(4)
    held = 0
    for _ in range(120):
        prompts = dice.normal(size=(40, 1))
        got = mean_over_prompts(prompts + 0.5 * dice.normal(size=(40, 2)))
        assert got is not None
        held += got.low <= 0 <= got.high
    assert 0.87 <= held / 120 <= 0.99


@given(
    st.lists(
        st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), min_size=2, max_size=2),
        min_size=1,
        max_size=9,
    )
)
def test_what_is_not_defined_counts_nowhere(values: list[list[float]]) -> None:
    defined = [value for row in values for value in row if not math.isnan(value)]
    got = mean_over_prompts(values)
    if not defined:
        assert got is None
        return
    assert got is not None
    assert got.n == len(defined)
    assert got.mean == pytest.approx(sum(defined) / len(defined))
    assert min(defined) - 1e-9 <= got.low <= got.high <= max(defined) + 1e-9


@pytest.mark.parametrize("answer", [0, 1])
def test_an_answer_that_all_gave_is_not_certain(answer: int) -> None:
    got = mean_over_prompts(np.full((64, 3), float(answer)), yes_or_no=True)
    assert got is not None
    assert (got.mean, got.n) == (answer, 192)
    assert answer in (got.low, got.high)
    # Wilson's bound: the share from which the answers seen are just 1.96 standard deviations away.
    bound = got.high if answer == 0 else got.low
    assert abs(answer - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 64))
