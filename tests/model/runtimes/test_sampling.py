"""The vectorised sampler against a naive one that sorts everything, row by row, in Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generation import SamplingParams
from model.runtimes.sampling import SamplingRows, log_probabilities, start_of, uniform

SETTINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.001, 0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 50, 200, 100_000]),
    top_p=st.sampled_from([1.0, 0.95, 0.999, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 2.0]),
    seed=st.integers(0, 2**63 - 1),
)
VOCAB = st.sampled_from([2, 97, 600, 4096])


def some_logits(rng: np.random.Generator, vocab: int) -> np.ndarray:
    """Rows of every kind: flat, peaked, with ties, with forbidden tokens."""
    logits: np.ndarray = rng.standard_normal(vocab) * rng.choice([0.1, 1, 3, 8])
    if rng.random() < 0.3:
        logits = np.round(logits)
    if rng.random() < 0.2:
        logits[rng.random(vocab) < 0.5] = -np.inf
        logits[rng.integers(vocab)] = 1.0
    return logits.astype(np.float32)


def splitmix(seed: int, position: int) -> float:
    """The random number of a token, in whole numbers of Python."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    return (mix((mix((seed + golden) % 2**64) + position * golden) % 2**64) >> 11) / 2**53


def naive(logits: np.ndarray, sampling: SamplingParams, seen: set[int], position: int) -> set[int]:
    """The token that must come, or the two between which rounding decides.

    Sorts the whole vocabulary and adds in Python's exact `fsum`. Where float32 rounding may move a border,
    both neighbours are allowed.
    """
    scale = np.float32(1 / max(sampling.temperature, 1e-5) if sampling.temperature else 1)
    scaled = logits * scale
    for token in seen:
        penalty = np.float32(sampling.repetition_penalty)
        scaled[token] = scaled[token] / penalty if scaled[token] > 0 else scaled[token] * penalty
    if sampling.temperature == 0:
        return {int(np.argmax(scaled))}
    below = (scaled - scaled.max()).astype(np.float64)
    order = sorted(range(len(below)), key=lambda token: (-below[token], token))
    weight = {token: math.exp(below[token]) for token in order}
    point = splitmix(sampling.seed, position)
    allowed: set[int] = set()
    for slip in (-1e-5, 0.0, 1e-5):  # how far rounding may move each of the borders
        kept = [token for token in order if weight[token] >= sampling.min_p * (1 + slip)] or order[:1]
        if sampling.top_k:
            kept = kept[: sampling.top_k]
        total = math.fsum(weight[token] for token in kept)
        nucleus, mass = [], 0.0
        for token in kept:
            nucleus.append(token)
            mass += weight[token]
            if mass >= sampling.top_p * total * (1 + slip) and sampling.top_p < 1:
                break
        if sampling.top_p == 1 and sampling.min_p == 0 and not 0 < sampling.top_k < len(order):
            nucleus.sort()  # no filter: tokens stay in the order of their ids
        for nudge in (-1e-5, 0.0, 1e-5):
            aim, mass = (point + nudge) * math.fsum(weight[token] for token in nucleus), 0.0
            for token in nucleus:
                mass += weight[token]
                if mass > aim:
                    break
            allowed.add(token)
    return allowed


@settings(max_examples=150)
@given(VOCAB, st.lists(SETTINGS, min_size=1, max_size=5), st.integers(0, 2**32))
def test_every_row_is_what_a_naive_sampler_draws(
    vocab: int, several: list[SamplingParams], noise: int
) -> None:
    rng = np.random.default_rng(noise)
    rows = SamplingRows(len(several), vocab)
    seen = [set(rng.integers(0, vocab, 5).tolist()) for _ in several]
    for row, sampling in enumerate(several):
        rows.set(row, sampling, seen[row])
    logits_BV = np.stack([some_logits(rng, vocab) for _ in several])
    position_B = rng.integers(0, 10_000, len(several))
    chosen_B, usable_B = rows.sample(logits_BV.copy(), position_B)
    assert usable_B.all()
    for row, sampling in enumerate(several):
        allowed = naive(logits_BV[row].copy(), sampling, seen[row], int(position_B[row]))
        assert int(chosen_B[row]) in allowed


@given(VOCAB, st.lists(SETTINGS, min_size=2, max_size=9), st.integers(0, 2**32))
def test_a_row_does_not_depend_on_the_others(vocab: int, several: list[SamplingParams], noise: int) -> None:
    rng = np.random.default_rng(noise)
    logits_BV = np.stack([some_logits(rng, vocab) for _ in several])
    position_B = rng.integers(0, 10_000, len(several))
    together = SamplingRows(len(several) + 3, vocab)
    alone = SamplingRows(1, vocab)
    for row, sampling in enumerate(several):
        together.set(row, sampling, range(min(vocab, 7)))
    chosen_B, _ = together.sample(logits_BV, position_B)
    for row, sampling in enumerate(several):
        alone.set(0, sampling, range(min(vocab, 7)))
        assert alone.sample(logits_BV[row : row + 1], position_B[row : row + 1])[0][0] == chosen_B[row]


def test_rows_that_move_keep_their_settings() -> None:
    rng = np.random.default_rng(3)
    logits_BV = np.repeat(some_logits(rng, 500)[None], 3, axis=0)
    position_B = np.array([9, 9, 9])
    rows = SamplingRows(3, 500)
    for row in range(3):
        rows.set(row, SamplingParams(seed=row, temperature=2.0, repetition_penalty=1.5), [row])
    rows.note(2, 77)
    before = rows.sample(logits_BV, position_B)[0].tolist()
    rows.move(2, 0)
    assert rows.sample(logits_BV[:2], position_B[:2])[0].tolist() == [before[2], before[1]]


def test_draws_follow_the_filtered_distribution() -> None:
    """Chi-squared over 20,000 draws of one row, at its 99.99 % bound for 3 degrees of freedom."""
    probability = np.array([0.5, 0.25, 0.15, 0.06, 0.04])
    logits = np.log(probability).astype(np.float32)[None]
    rows = SamplingRows(1, 5)
    rows.set(0, SamplingParams(temperature=1, top_p=0.95, seed=5))
    drawn = [int(rows.sample(logits, np.array([position]))[0][0]) for position in range(20_000)]
    count = np.bincount(drawn, minlength=5)
    assert count[4] == 0  # 0.96 of the mass is there before it
    expected = probability[:4] / probability[:4].sum() * len(drawn)
    assert ((count[:4] - expected) ** 2 / expected).sum() < 21.1


def test_top_p_counts_all_that_top_k_leaves_however_unlikely() -> None:
    """Of the weights 1, 0.25 and 48 times 0.0017, 79 % are more than 1: the second token is in the nucleus."""
    weights = np.array([1.0, 0.25, *[0.0017] * 48, *[0.0] * 50])
    with np.errstate(divide="ignore"):
        logits = np.log(weights).astype(np.float32)[None]
    rows = SamplingRows(1, 100)
    rows.set(0, SamplingParams(temperature=1, top_k=50, top_p=0.79))
    drawn = {int(rows.sample(logits, np.array([position]))[0][0]) for position in range(100)}
    assert drawn == {0, 1}


def test_random_numbers_are_those_of_splitmix_and_look_uniform() -> None:
    seeds = [0, 1, 2**63 - 1]
    numbers_B = uniform(np.array([start_of(seed) for seed in seeds]), np.array([12_345] * 3))
    assert numbers_B.tolist() == [splitmix(seed, 12_345) for seed in seeds]
    numbers = np.array([splitmix(seed, position) for seed in range(100) for position in range(50)])
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 250.0) ** 2 / 250).sum() < 50  # 99.99 % of 19 degrees of freedom
    assert len(set(numbers.tolist())) == len(numbers)


def test_a_row_that_is_not_finite_is_reported_and_touches_no_other() -> None:
    rng = np.random.default_rng(1)
    logits_BV = np.stack([some_logits(rng, 300) for _ in range(5)])
    rows = SamplingRows(5, 300)
    for row in range(5):
        rows.set(row, SamplingParams(seed=row, temperature=1.0 if row != 4 else 0.0))
    clean = rows.sample(logits_BV, np.arange(5))[0]
    broken_BV = logits_BV.copy()
    broken_BV[1, 7] = np.nan
    broken_BV[2, 9] = np.inf
    broken_BV[3] = -np.inf
    chosen, usable = rows.sample(broken_BV, np.arange(5))
    assert usable.tolist() == [True, False, False, False, True]
    assert chosen[[0, 4]].tolist() == clean[[0, 4]].tolist()


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = np.array([[1, 3, 3, 2], [3, 1, 2, 0]], dtype=np.float32)
    rows = SamplingRows(2, 4)
    rows.set(0, SamplingParams(temperature=0))
    rows.set(1, SamplingParams(temperature=0, repetition_penalty=2.0), [0])
    assert rows.sample(logits, np.array([0, 0]))[0].tolist() == [1, 2]


def test_the_logits_are_left_as_they_were() -> None:
    logits = some_logits(np.random.default_rng(0), 300)[None]
    before = logits.copy()
    rows = SamplingRows(1, 300)
    rows.set(0, SamplingParams(repetition_penalty=1.5), range(20))
    rows.sample(logits, np.array([0]))
    assert np.array_equal(logits, before)


@given(VOCAB, st.integers(0, 20), st.integers(0, 2**32))
def test_log_probabilities_are_those_of_the_softmax(vocab: int, best: int, noise: int) -> None:
    logits = some_logits(np.random.default_rng(noise), vocab)
    top = float(logits.max())
    total = math.log(math.fsum(math.exp(x - top) for x in logits.tolist())) + top
    order = sorted(range(vocab), key=lambda token: (-logits[token], token))[:best]
    own, alternatives = log_probabilities(logits, vocab - 1, best)
    assert own == pytest.approx(float(logits[vocab - 1]) - total, abs=1e-9)
    assert [token for token, _ in alternatives] == order
    assert [p for _, p in alternatives] == pytest.approx([float(logits[t]) - total for t in order], abs=1e-9)


def test_too_large_a_batch_or_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 to 4096 rows of 2 to 2\^20 tokens"):
        SamplingRows(1, 1 << 21)
