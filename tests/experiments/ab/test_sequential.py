"""The anytime-valid tests: their guarantee, exactly and by simulation, and what they find."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.ab.sequential import PRIOR, Blocks, block_sizes, check_sample_ratio, compare, log_factors, make_blocks

ALPHA = 0.05


def one_block(sizes: tuple[int, int], estimate: tuple[float, float], hits: tuple[int, int]) -> Blocks:
    rows = [np.array([pair], np.float64) for pair in (sizes, hits, estimate)]
    return Blocks(rows[0], rows[1], rows[2], (0, 0))


shares = st.floats(0.001, 0.999)


@settings(max_examples=50)
@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    estimate=st.tuples(shares, shares),
    true_a=st.floats(0, 1),
    place=st.floats(0, 1),
    difference=st.floats(-0.95, 0.95),
)
def test_a_factors_expectation_is_at_most_one_under_every_truth_with_that_difference(
    sizes: tuple[int, int], estimate: tuple[float, float], true_a: float, place: float, difference: float
) -> None:
    low, high = max(0.0, -difference), min(1.0, 1.0 - difference)
    true_a = low + place * (high - low)
    true_b = min(1.0, max(0.0, true_a + difference))
    expected, against = 0.0, np.array([difference])
    for hits in itertools.product(range(sizes[0] + 1), range(sizes[1] + 1)):
        chance = math.prod(
            math.comb(n, k) * t**k * (1 - t) ** (n - k) for n, k, t in zip(sizes, hits, (true_a, true_b), strict=True)
        )
        expected += chance * math.exp(log_factors(one_block(sizes, estimate, hits), against)[0, 0])
    assert expected <= 1 + 1e-7


def paths(true: tuple[float, float], sizes: tuple[int, int], blocks: int, repeats: int, seed: int) -> np.ndarray:
    """Each repeat's e-process against "no difference", as logarithms, (repeats, blocks): one look after each block."""
    rng = np.random.default_rng(seed)
    found = np.empty((repeats, blocks))
    for number in range(repeats):
        a = rng.random(blocks * sizes[0]) < true[0]
        b = rng.random(blocks * sizes[1]) < true[1]
        found[number] = np.cumsum(log_factors(make_blocks(a.tolist(), b.tolist(), [sizes]), np.zeros(1))[0])
    return found


@pytest.mark.parametrize(
    ("share", "sizes", "seed"), [(0.5, (1, 1), 1), (0.08, (1, 1), 2), (0.7, (9, 1), 3), (0.95, (1, 4), 4)]
)
def test_without_a_difference_looking_after_every_block_is_wrong_no_more_often_than_promised(
    share: float, sizes: tuple[int, int], seed: int
) -> None:
    ever = (paths((share, share), sizes, 300, 250, seed) >= math.log(1 / ALPHA)).any(axis=1).mean()
    # 250 repeats of a chance of 5 % give at most 22 in 99.6 % of all cases.
    assert ever <= 22 / 250


def test_an_ordinary_test_looked_at_so_often_is_wrong_far_more_often() -> None:
    """The reason for all this, and the proof that the simulation above could fail."""
    rng = np.random.default_rng(5)
    a, b = rng.random((2, 400, 400)) < 0.5
    n = np.arange(1, 401)
    mean_a, mean_b = np.cumsum(a, axis=1) / n, np.cumsum(b, axis=1) / n
    spread = np.sqrt(np.maximum(mean_a * (1 - mean_a) + mean_b * (1 - mean_b), 1e-9) / n)
    wrong = (np.abs(mean_a - mean_b)[:, 20:] > 1.96 * spread[:, 20:]).any(axis=1).mean()
    assert wrong > 0.25


def test_a_real_difference_is_found_and_in_not_much_more_time_than_a_fixed_test_needs() -> None:
    found = paths((0.6, 0.7), (1, 1), 1500, 60, 6) >= math.log(1 / ALPHA)
    assert found.any(axis=1).mean() > 0.95
    # A test with one look at the end takes 357 users a variant to find it in 80 % of all cases.
    assert np.median(found.argmax(axis=1)) < 750


def test_the_interval_holds_the_truth_at_all_looks_together() -> None:
    rng = np.random.default_rng(7)
    missed = 0
    for _ in range(24):
        a, b = (rng.random(240) < 0.5).tolist(), (rng.random(240) < 0.65).tolist()
        looks = [compare(a[:n], b[:n]) for n in (10, 60, 240)]
        missed += any(not look.difference_low <= 0.15 <= look.difference_high for look in looks)
    assert missed <= 4  # 1.2 are expected at most; 5 or more come in 1 % of all cases


@settings(max_examples=40)
@given(
    a=st.lists(st.booleans(), max_size=60),
    b=st.lists(st.booleans(), max_size=60),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_the_interval_leaves_zero_out_just_where_the_test_decides(
    a: list[bool], b: list[bool], sizes: tuple[int, int]
) -> None:
    found = compare(a, b, [sizes], alpha=ALPHA)
    assert -1 <= found.difference_low <= found.difference_high <= 1
    assert found.p == pytest.approx(1 / found.e)
    assert (found.e >= 1 / ALPHA * (1 - 1e-9)) == (found.decided_at_block is not None)
    if found.decided_at_block is not None:
        assert found.difference_low >= 0 or found.difference_high <= 0
    else:
        assert found.difference_low < 0 < found.difference_high
    blocks = min(len(a) // sizes[0], len(b) // sizes[1])
    assert (found.blocks, found.used) == (blocks, (blocks * sizes[0], blocks * sizes[1]))


def test_five_against_five_is_enough_where_everything_differs() -> None:
    found = compare([True] * 5, [False] * 5)
    assert found.decided_at_block == 4
    assert found.difference_high < 0


def test_nothing_is_known_of_nothing() -> None:
    found = compare([], [True])
    assert (found.e, found.p, found.difference_low, found.difference_high, found.decided_at_block) == (
        1.0,
        1.0,
        -1.0,
        1.0,
        None,
    )


def test_an_estimate_knows_the_blocks_before_it_and_no_other() -> None:
    blocks = make_blocks([True, False, True, True], [False, True], [(2, 1)])
    assert blocks.hits_J2.tolist() == [[1, 0], [2, 1]]
    assert blocks.estimate_J2[0].tolist() == [0.5, 0.5]
    assert blocks.estimate_J2[1] == pytest.approx([(1 + PRIOR) / (2 + 2 * PRIOR), PRIOR / (1 + 2 * PRIOR)])


def test_a_block_takes_the_sizes_of_the_split_under_which_it_begins() -> None:
    sizes = [(2, 1)] * 4 + [(1, 1)] * 3
    blocks = make_blocks([True] * 7, [True] * 9, sizes)
    assert blocks.sizes_J2.tolist() == [[2, 1], [2, 1], [1, 1], [1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("parts", "sizes"), [((90, 10), (9, 1)), ((10, 90), (1, 9)), ((1, 1), (1, 1)), ((67, 33), (2, 1)), ((5, 0), (1, 1))]
)
def test_blocks_are_small_and_near_the_split(parts: tuple[int, int], sizes: tuple[int, int]) -> None:
    assert block_sizes(*parts) == sizes


@pytest.mark.slow
def test_a_million_users_are_computed_in_seconds() -> None:
    rng = np.random.default_rng(8)
    found = compare((rng.random(1_000_000) < 0.6).tolist(), (rng.random(1_000_000) < 0.61).tolist())
    assert found.decided_at_block is not None
    assert 0 < found.difference_low < 0.01 < found.difference_high < 0.02
    assert found.blocks < 20_000


NINETY_TEN = {"champion": 0.9, "challenger": 0.1}


@pytest.mark.parametrize(
    ("counts", "mismatch"), [({"champion": 905, "challenger": 95}, False), ({"champion": 850, "challenger": 150}, True)]
)
def test_counts_are_tested_against_the_promised_shares(counts: dict[str, int], mismatch: bool) -> None:
    found = check_sample_ratio([(NINETY_TEN, counts)])
    assert found.mismatch == mismatch
    assert found.expected == {"champion": pytest.approx(900), "challenger": pytest.approx(100)}
    assert found.found == counts


def test_a_changed_split_is_tested_against_each_of_its_promises() -> None:
    even = {"champion": 0.5, "challenger": 0.5}
    rounds = [(NINETY_TEN, {"champion": 902, "challenger": 98}), (even, {"champion": 510, "challenger": 490})]
    found = check_sample_ratio(rounds)
    assert not found.mismatch
    assert found.found == {"champion": 1412, "challenger": 588}
    assert check_sample_ratio([(NINETY_TEN, found.found)]).mismatch, "under one promise they would be wrong"


def test_users_of_a_variant_of_weight_zero_are_a_mismatch() -> None:
    assert check_sample_ratio([({"a": 1.0, "b": 0.0}, {"a": 50, "b": 1})]).mismatch


@pytest.mark.parametrize("counts", [{}, {"champion": 0}, {"challenger": 2}])
def test_few_users_are_no_mismatch(counts: dict[str, int]) -> None:
    assert not check_sample_ratio([(NINETY_TEN, counts)]).mismatch


def test_looking_after_every_user_finds_a_mismatch_no_more_often_than_promised() -> None:
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(200):
        challengers = np.cumsum(rng.random(300) < 0.1)
        looks = ({"champion": n - int(k), "challenger": int(k)} for n, k in enumerate(challengers, 1))
        wrong += any(check_sample_ratio([(NINETY_TEN, counts)]).mismatch for counts in looks)
    assert wrong <= 8  # 2 are expected at 1 %; 9 or more come in 0.02 % of all cases
