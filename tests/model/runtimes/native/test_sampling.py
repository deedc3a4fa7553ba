"""The sampler in C against the one in numpy and a naive one: given the same logits, the same choices, on every path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generation import SamplingParams
from model.runtimes.native.library import paths
from model.runtimes.native.sampling import NativeSampler
from model.runtimes.sampling import SamplingRows
from tests.model.all_runtimes import needs_native
from tests.model.runtimes.test_sampling import SETTINGS, VOCAB, naive, some_logits

pytestmark = needs_native


def every_path(capacity: int, vocab: int) -> list[NativeSampler]:
    return [NativeSampler(capacity, vocab, number) for number in paths().values()]


def one(capacity: int, vocab: int) -> NativeSampler:
    return every_path(capacity, vocab)[0]


@settings(max_examples=150)
@given(VOCAB, st.lists(SETTINGS, min_size=1, max_size=5), st.integers(0, 2**32))
def test_every_row_is_what_a_naive_sampler_draws(
    vocab: int, several: list[SamplingParams], noise: int
) -> None:
    rng = np.random.default_rng(noise)
    rows = one(len(several), vocab)
    seen = [set(rng.integers(0, vocab, 5).tolist()) for _ in several]
    for row, sampling in enumerate(several):
        rows.set(row, sampling, seen[row])
    logits_BV = np.stack([some_logits(rng, vocab) for _ in several])
    before = logits_BV.copy()
    position_B = rng.integers(0, 10_000, len(several))
    chosen_B, usable_B = rows.sample(logits_BV, position_B)
    assert usable_B.all()
    assert np.array_equal(logits_BV, before)
    for row, sampling in enumerate(several):
        allowed = naive(logits_BV[row].copy(), sampling, seen[row], int(position_B[row]))
        assert int(chosen_B[row]) in allowed


def test_of_many_draws_nearly_all_are_those_of_numpy_all_greedy_ones_and_all_paths_agree() -> None:
    """9,600 draws under settings of every kind, with stories that take note as they grow."""
    rng = np.random.default_rng(0)
    differ = drawn = 0
    for vocab in (97, 600, 4096):
        for _ in range(20):
            numpy, native = SamplingRows(16, vocab), every_path(16, vocab)
            several = [
                SamplingParams(
                    temperature=float(rng.choice([0, 0.3, 0.7, 1, 2])),
                    top_k=int(rng.choice([0, 0, 1, 3, 50, 200])),
                    top_p=float(rng.choice([1, 0.95, 0.999, 0.5, 0.01])),
                    min_p=float(rng.choice([0, 0, 0.02, 0.3, 1])),
                    repetition_penalty=float(rng.choice([1, 1, 1.3])),
                    seed=int(rng.integers(2**63 - 1)),
                )
                for _ in range(16)
            ]
            samplers: list[Any] = [numpy, *native]
            for row, sampling in enumerate(several):
                for each in samplers:
                    each.set(row, sampling, range(row))
            greedy_B = np.array([sampling.temperature == 0 for sampling in several])
            for _ in range(10):
                logits_BV = np.stack([some_logits(rng, vocab) for _ in several])
                position_B = rng.integers(0, 10_000, 16)
                expected_B = numpy.sample(logits_BV.copy(), position_B)[0]
                ours = [each.sample(logits_BV, position_B)[0] for each in native]
                assert all(np.array_equal(each, ours[0]) for each in ours)
                unequal_B = ours[0] != expected_B
                assert not (unequal_B & greedy_B).any()
                differ, drawn = differ + int(unequal_B.sum()), drawn + 16
                for row, token in enumerate(expected_B.tolist()):
                    for each in samplers:
                        each.note(row, token)
    assert drawn == 9_600
    assert differ <= drawn / 1000


@settings(max_examples=60)
@given(VOCAB, st.lists(SETTINGS, min_size=2, max_size=9), st.integers(0, 2**32), st.data())
def test_a_row_does_not_depend_on_the_others_nor_on_its_place(
    vocab: int, several: list[SamplingParams], noise: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(noise)
    logits_BV = np.stack([some_logits(rng, vocab) for _ in several])
    position_B = rng.integers(0, 10_000, len(several))
    together, alone = one(len(several) + 3, vocab), one(1, vocab)
    for row, sampling in enumerate(several):
        together.set(row, sampling, range(min(vocab, 7)))
    chosen = together.sample(logits_BV, position_B)[0].tolist()
    for row, sampling in enumerate(several):
        alone.set(0, sampling, range(min(vocab, 7)))
        assert alone.sample(logits_BV[row : row + 1], position_B[row : row + 1])[0][0] == chosen[row]
    gone = data.draw(st.integers(0, len(several) - 1), label="the row that leaves")
    last = len(several) - 1
    together.move(last, gone)
    order = [row for row in range(last) if row != gone]
    if gone != last:
        order.insert(gone, last)
    left = together.sample(logits_BV[order], position_B[order])[0].tolist()
    assert left == [chosen[row] for row in order]


def test_a_penalty_knows_what_was_noted_and_forgets_it_with_the_row() -> None:
    logits = np.array([[5.0, 4.0, 3.0, 2.0]], dtype=np.float32)
    rows = one(3, 4)
    position_B = np.array([0])

    def drawn() -> int:
        return int(rows.sample(logits, position_B)[0][0])

    rows.set(0, SamplingParams(temperature=0, repetition_penalty=2), [0])
    assert drawn() == 1
    rows.note(0, 1)
    assert drawn() == 2  # 2.5, 2, 3, 2
    rows.move(0, 2)
    rows.move(2, 0)
    assert drawn() == 2
    rows.set(0, SamplingParams(temperature=0, repetition_penalty=2), [])
    assert drawn() == 0


@pytest.mark.parametrize("greedy", [True, False])
def test_a_row_that_is_not_finite_is_reported_and_touches_no_other(greedy: bool) -> None:
    rng = np.random.default_rng(1)
    logits_BV = np.stack([some_logits(rng, 300) for _ in range(5)])
    rows = one(5, 300)
    for row in range(5):
        rows.set(row, SamplingParams(seed=row, temperature=0.0 if greedy else 1.0))
    clean = rows.sample(logits_BV, np.arange(5))[0].tolist()
    broken_BV = logits_BV.copy()
    broken_BV[1, 7] = np.nan
    broken_BV[2, 9] = np.inf
    broken_BV[3] = -np.inf
    chosen_B, usable_B = rows.sample(broken_BV, np.arange(5))
    assert usable_B.tolist() == [True, False, False, False, True]
    assert chosen_B[[0, 4]].tolist() == [clean[0], clean[4]]
    assert ((chosen_B >= 0) & (chosen_B < 300)).all()


def test_a_token_without_mass_never_comes() -> None:
    """Neither before all others, nor between them, nor behind; 1,000 draws without a filter."""
    logits = np.full((1, 600), -np.inf, np.float32)
    logits[0, [3, 300, 590]] = 0.0
    rows = one(1, 600)
    rows.set(0, SamplingParams(temperature=2, top_p=1, seed=4))
    drawn = [int(rows.sample(logits, np.array([place]))[0][0]) for place in range(1000)]
    count = np.bincount(drawn, minlength=600)
    assert count.sum() == count[[3, 300, 590]].sum()
    assert (np.abs(count[[3, 300, 590]] - 1000 / 3) < 70).all()  # 4.7 standard deviations


def test_arrays_of_another_shape_are_refused_before_c_reads_them() -> None:
    rows = one(2, 40)
    for shape, positions in (((1, 39), 1), ((3, 40), 3), ((2, 40), 1)):
        with pytest.raises(ValueError, match="got logits of"):
            rows.sample(np.zeros(shape, np.float32), np.zeros(positions, np.int64))
    with pytest.raises(ValueError, match="sampling takes"):
        NativeSampler(0, 40, 0)
