"""Intervals: equal to known values and to brute force, they hold the truth as often as they say, and repeat."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.common.statistics import ONE_SIDED, mean_over_prompts, ratio_of_sums, stratified_bootstrap, wilson


@pytest.mark.parametrize(
    ("successes", "n", "enough"),
    [(10, 10, False), (11, 11, True), (18, 20, False), (19, 20, True), (27, 30, False), (28, 30, True)],
)
def test_what_it_takes_to_claim_four_in_five(successes: int, n: int, enough: bool) -> None:
    assert (wilson(successes, n, level=ONE_SIDED).low >= 0.8) is enough


@given(
    st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.95, ONE_SIDED])
)
def test_the_interval_of_a_share_is_scipys(case: tuple[int, int], level: float) -> None:
    found = wilson(*case, level=level)
    expected = stats.binomtest(*case).proportion_ci(level, method="wilson")
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="n at least 1"):
        wilson(0, 0)


def test_the_interval_of_a_mean_is_nearly_the_normal_one() -> None:
    values = np.random.default_rng(1).exponential(size=400)
    got = ratio_of_sums(values, np.ones(400))
    error = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert got.value == pytest.approx(values.mean())
    assert (got.value - got.low, got.high - got.value) == pytest.approx((error, error), rel=0.15)
    assert got.n == 400


def test_a_ratio_weighs_long_stories_more() -> None:
    assert ratio_of_sums([10.0, 1.0], [10.0, 2.0]).value == pytest.approx(11 / 12)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.floats(0.1, 10), st.integers(0, 99))
def test_a_constant_ratio_has_an_interval_of_no_width(values: list[float], factor: float, seed: int) -> None:
    ratio = ratio_of_sums([factor * value for value in values], values, seed=seed, resamples=50)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((factor, factor, factor))
    assert ratio.n == len(values)


def test_the_batches_in_which_is_drawn_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).normal(size=50)
    whole = ratio_of_sums(values, np.ones(50))
    monkeypatch.setattr("experiments.common.statistics.BATCH", 150)
    assert ratio_of_sums(values, np.ones(50)) == whole


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(2).normal(size=50)
    assert ratio_of_sums(values, np.ones(50)) == ratio_of_sums(values, np.ones(50))
    assert ratio_of_sums(values, np.ones(50)) != ratio_of_sums(values, np.ones(50), seed=1)
    assert mean_over_prompts(values[:, None]) == mean_over_prompts(values[:, None])


def test_a_paired_difference_sees_what_unpaired_noise_would_hide() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(100, 30, 300)  # how hard a story is: the same for both
    ours, theirs, sizes = hard + 0.5 + rng.normal(0, 0.2, 300), hard, np.full(300, 100.0)
    paired = ratio_of_sums(np.subtract(ours, theirs), sizes)
    assert paired.value == pytest.approx(0.005, abs=0.0005)
    assert 0.004 < paired.low < paired.value < paired.high < 0.006
    alone = ratio_of_sums(ours, sizes)
    assert alone.high - alone.low > 20 * (paired.high - paired.low)


def test_one_sided_bounds_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    inside = 0
    for number in range(60):
        rows = rng.exponential(1.0, 60)
        inside += ratio_of_sums(rows, np.ones(60), level=ONE_SIDED, seed=number).low <= 1.0
    assert inside / 60 == pytest.approx(0.95, abs=0.08)


def test_stories_of_one_prompt_that_are_all_alike_are_no_further_evidence() -> None:
    one = np.random.default_rng(3).normal(size=(60, 1))
    alone, tenfold = mean_over_prompts(one), mean_over_prompts(np.repeat(one, 10, axis=1))
    assert alone is not None
    assert tenfold is not None
    assert tenfold.high - tenfold.low == pytest.approx(alone.high - alone.low, rel=0.15)
    singly = ratio_of_sums(np.repeat(one, 10), np.ones(600))
    assert singly.high - singly.low < 0.5 * (alone.high - alone.low)


def test_nineteen_of_twenty_intervals_over_prompts_hold_the_true_mean() -> None:
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(120):
        prompts = rng.normal(size=(40, 1))
        got = mean_over_prompts(prompts + 0.5 * rng.normal(size=(40, 2)))
        assert got is not None
        held += got.low <= 0 <= got.high
    assert 0.87 <= held / 120 <= 0.99


@given(
    st.lists(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), min_size=2, max_size=2), min_size=1, max_size=9)
)
def test_what_is_not_defined_counts_nowhere(values: list[list[float]]) -> None:
    defined = [value for row in values for value in row if not math.isnan(value)]
    got = mean_over_prompts(values)
    if not defined:
        assert got is None
        return
    assert got is not None
    assert got.n == len(defined)
    assert got.value == pytest.approx(sum(defined) / len(defined))
    assert min(defined) - 1e-9 <= got.low <= got.high <= max(defined) + 1e-9


@pytest.mark.parametrize("answer", [0, 1])
def test_an_answer_that_all_gave_is_as_uncertain_as_wilson_says_of_the_prompts(answer: int) -> None:
    got = mean_over_prompts(np.full((64, 3), float(answer)), binary=True)
    assert got is not None
    assert (got.value, got.n) == (answer, 192)
    expected = wilson(64 * answer, 64)
    assert (got.low, got.high) == (expected.low, expected.high)


def test_a_stratified_bootstrap_keeps_the_size_of_each_group() -> None:
    groups = {"slow": [10.0, 12.0, 11.0, 13.0], "fast": [1.0] * 20}

    def figures(rows: list[float]) -> dict[str, float]:
        assert sum(row == 1.0 for row in rows) == 20, "a group keeps its size"
        return {"slow_mean": sum(row for row in rows if row > 1) / 4}

    low, high = stratified_bootstrap(groups, figures, level=ONE_SIDED)["slow_mean"]
    assert 10.0 <= low < 11.5 < high <= 13.0
