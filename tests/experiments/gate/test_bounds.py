"""One-sided bounds: against known values, against brute force, and for what they must never do."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.gate.bounds import Z, paired_difference, ratio_of_sums, resampled_figures, share


@pytest.mark.parametrize(
    ("successes", "n", "enough"),
    [(10, 10, False), (11, 11, True), (18, 20, False), (19, 20, True), (27, 30, False), (28, 30, True)],
)
def test_what_it_takes_to_claim_four_in_five(successes: int, n: int, enough: bool) -> None:
    assert (share(successes, n).low >= 0.8) is enough


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_bound_of_a_share_is_where_the_score_test_just_rejects(case: tuple[int, int]) -> None:
    successes, n = case
    found = share(successes, n)
    assert 0 <= found.low <= found.value <= found.high <= 1
    for bound in (found.low, found.high):
        if 0 < bound < 1:  # the score statistic of that share is Z there: the definition, not the formula
            spread = math.sqrt(bound * (1 - bound) / n)
            assert abs(found.value - bound) / spread == pytest.approx(Z, rel=1e-6)
    assert NormalDist().cdf(Z) == pytest.approx(0.95)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="n at least 1"):
        share(0, 0)


def test_a_paired_difference_sees_what_unpaired_noise_would_hide() -> None:
    dice = np.random.default_rng(1)
    hard = dice.normal(100, 30, 300)  # how hard a story is: the same for both
    ours, theirs, sizes = hard + 0.5 + dice.normal(0, 0.2, 300), hard, np.full(300, 100.0)
    paired = paired_difference(ours, theirs, sizes)
    assert paired.value == pytest.approx(0.005, abs=0.0005)
    assert 0.004 < paired.low < paired.value < paired.high < 0.006
    alone = ratio_of_sums(ours, sizes)
    assert alone.high - alone.low > 20 * (paired.high - paired.low)


def test_bounds_hold_the_truth_about_as_often_as_they_say() -> None:
    dice = np.random.default_rng(2)
    inside = 0
    for number in range(60):
        rows = dice.exponential(1.0, 60)
        inside += ratio_of_sums(rows, np.ones(60), seed=number).low <= 1.0
    assert inside / 60 == pytest.approx(0.95, abs=0.08)


def test_the_same_seed_gives_the_same_bounds() -> None:
    rows = [float(value) for value in range(1, 40)]
    assert ratio_of_sums(rows, rows[::-1], seed=3) == ratio_of_sums(rows, rows[::-1], seed=3)


def test_resampled_figures_draw_within_each_group() -> None:
    groups = {"slow": [10.0, 12.0, 11.0, 13.0], "fast": [1.0] * 20}

    def figures(rows: list[float]) -> dict[str, float]:
        assert sum(row == 1.0 for row in rows) == 20, "a group keeps its size"
        return {"slow_mean": sum(row for row in rows if row > 1) / 4}

    low, high = resampled_figures(groups, figures)["slow_mean"]
    assert 10.0 <= low < 11.5 < high <= 13.0
