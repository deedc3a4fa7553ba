"""Whether the arms got the readers they were promised: counts that fit, counts that do not, and many looks."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from experiments.ab.ratio import ALPHA, check_ratio, chi_square_tail

NINETY_TEN = {"champion": 0.9, "challenger": 0.1}


@given(value=st.floats(0, 400), degrees=st.integers(1, 12))
def test_the_tail_is_scipys(value: float, degrees: int) -> None:
    expected = scipy.stats.chi2.sf(value, degrees)
    assert chi_square_tail(value, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_counts_as_promised_pass_and_agree_with_scipy() -> None:
    found = check_ratio([(NINETY_TEN, {"champion": 905, "challenger": 95})])
    test = scipy.stats.chisquare([905, 95], [900, 100])
    assert [found.chi_square, found.p] == pytest.approx([test.statistic, test.pvalue])
    assert not found.mismatch
    assert found.expected == {"champion": pytest.approx(900), "challenger": pytest.approx(100)}


def test_counts_that_were_not_promised_are_accused() -> None:
    found = check_ratio([(NINETY_TEN, {"champion": 850, "challenger": 150})])
    assert found.p < 1e-6
    assert found.mismatch


def test_a_changed_split_is_held_to_each_of_its_promises() -> None:
    even = {"champion": 0.5, "challenger": 0.5}
    rounds = [
        (NINETY_TEN, {"champion": 902, "challenger": 98}),
        (even, {"champion": 510, "challenger": 490}),
    ]
    found = check_ratio(rounds)
    assert (found.degrees, found.mismatch) == (2, False)
    assert found.found == {"champion": 1412, "challenger": 588}
    together = {"champion": 1412, "challenger": 588}
    assert check_ratio([(NINETY_TEN, together)]).mismatch, "under one promise alone they would be wrong"


def test_an_arm_without_a_share_can_have_no_reader() -> None:
    found = check_ratio([({"a": 1.0, "b": 0.0}, {"a": 50, "b": 1})])
    assert found.mismatch
    assert found.p == 0


@pytest.mark.parametrize("counts", [{}, {"champion": 0}, {"challenger": 2}])
def test_few_visitors_accuse_nobody(counts: dict[str, int]) -> None:
    assert not check_ratio([(NINETY_TEN, counts)]).mismatch


def test_looking_after_every_visitor_accuses_no_more_often_than_promised() -> None:
    dice = np.random.default_rng(3)
    accused = 0
    for _ in range(200):
        arms = dice.random(300) < 0.1
        challengers = np.cumsum(arms)
        looks = range(1, 301, 2)
        accused += any(
            check_ratio(
                [
                    (
                        NINETY_TEN,
                        {"champion": n - int(challengers[n - 1]), "challenger": int(challengers[n - 1])},
                    )
                ]
            ).mismatch
            for n in looks
        )
    assert accused <= 8  # 2 are expected at ALPHA; 9 or more come in 0.02 % of all cases
    assert ALPHA == 0.01
