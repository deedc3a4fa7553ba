"""The device's sampler, on the CPU, against `SamplingRows`: given the same logits, the same choices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model.runtimes.sampling
from model.generation import SamplingParams
from model.runtimes.protocol import Sampler
from model.runtimes.sampling import SamplingRows, start_of
from model.runtimes.torch.graphs import Eager
from model.runtimes.torch.sampling import DeviceLogits, DeviceSampler, uniform
from tests.model.runtimes.test_sampling import SETTINGS, VOCAB, naive, some_logits
from tests.model.tape import Tapes

CPU = torch.device("cpu")


def device_rows(capacity: int, vocab: int) -> DeviceSampler:
    return DeviceSampler(capacity, vocab, CPU, Eager())


def on_device(logits_BV: np.ndarray) -> DeviceLogits:
    return DeviceLogits(torch.from_numpy(logits_BV.copy()))


def draws(sampler: DeviceSampler, logits_BV: np.ndarray, position_B: np.ndarray) -> list[int]:
    chosen_B, usable_B = sampler.sample(on_device(logits_BV), position_B)
    assert usable_B.all()
    return [int(token) for token in chosen_B]


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**40)), min_size=1, max_size=30))
def test_random_numbers_are_those_of_the_host_to_the_last_bit(places: list[tuple[int, int]]) -> None:
    start_B = np.array([start_of(seed) for seed, _ in places], dtype=np.uint64)
    position_B = np.array([position for _, position in places])
    ours = uniform(torch.from_numpy(start_B.view(np.int64)), torch.from_numpy(position_B))
    assert np.array_equal(ours.numpy(), model.runtimes.sampling.uniform(start_B, position_B))


@settings(max_examples=100)
@given(VOCAB, st.lists(SETTINGS, min_size=1, max_size=5), st.integers(0, 2**32))
def test_every_row_is_what_a_naive_sampler_draws(
    vocab: int, several: list[SamplingParams], noise: int
) -> None:
    rng = np.random.default_rng(noise)
    rows = device_rows(len(several), vocab)
    seen = [set(rng.integers(0, vocab, 5).tolist()) for _ in several]
    for row, sampling in enumerate(several):
        rows.set(row, sampling, seen[row])
    logits_BV = np.stack([some_logits(rng, vocab) for _ in several])
    position_B = rng.integers(0, 10_000, len(several))
    chosen = draws(rows, logits_BV, position_B)
    for row, sampling in enumerate(several):
        assert chosen[row] in naive(logits_BV[row].copy(), sampling, seen[row], int(position_B[row]))


def test_of_many_draws_nearly_all_are_those_of_the_host_and_all_greedy_ones() -> None:
    """9,600 draws under settings of every kind; the few that may differ lie at a border of two tokens."""
    rng = np.random.default_rng(0)
    differ = drawn = 0
    for vocab in (97, 600, 4096):
        for _ in range(20):
            host, device = SamplingRows(16, vocab), device_rows(16, vocab)
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
            rows: tuple[Sampler, Sampler] = (host, device)
            for row, sampling in enumerate(several):
                for sampler in rows:
                    sampler.set(row, sampling, range(row))
            for _ in range(10):
                logits_BV = np.stack([some_logits(rng, vocab) for _ in several])
                position_B = rng.integers(0, 10_000, 16)
                expected = host.sample(logits_BV.copy(), position_B)[0].tolist()
                ours = draws(device, logits_BV, position_B)
                for row, sampling in enumerate(several):
                    drawn += 1
                    differ += ours[row] != expected[row]
                    assert sampling.temperature or ours[row] == expected[row]
                    for sampler in rows:
                        sampler.note(row, expected[row])
    assert drawn == 9_600
    assert differ <= drawn / 1000


@settings(max_examples=40)
@given(VOCAB, st.lists(SETTINGS, min_size=2, max_size=9), st.integers(0, 2**32))
def test_a_row_does_not_depend_on_the_others(vocab: int, several: list[SamplingParams], noise: int) -> None:
    rng = np.random.default_rng(noise)
    logits_BV = np.stack([some_logits(rng, vocab) for _ in several])
    position_B = rng.integers(0, 10_000, len(several))
    together, alone = device_rows(len(several) + 3, vocab), device_rows(1, vocab)
    for row, sampling in enumerate(several):
        together.set(row, sampling, range(min(vocab, 7)))
    chosen = draws(together, logits_BV, position_B)
    for row, sampling in enumerate(several):
        alone.set(0, sampling, range(min(vocab, 7)))
        assert draws(alone, logits_BV[row : row + 1], position_B[row : row + 1]) == [chosen[row]]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), SETTINGS, st.integers(0, 39)),
        st.tuples(st.just("leave"), st.integers(0, 5), st.none()),
        st.tuples(st.just("note"), st.integers(0, 5), st.integers(0, 39)),
        st.tuples(st.just("sample"), st.integers(0, 2**32), st.none()),
    ),
    min_size=4,
    max_size=40,
)


@settings(max_examples=30)
@given(ACTIONS)
def test_rows_that_join_leave_and_take_note_stay_those_of_the_host(
    actions: list[tuple[str, object, object]],
) -> None:
    """Replayed from a tape: nothing of what is set may be fixed while it is recorded."""
    host, taped = SamplingRows(6, 40), DeviceSampler(6, 40, CPU, Tapes())
    rows: tuple[Sampler, Sampler] = (host, taped)
    size = differ = drawn = 0
    for kind, value, extra in actions:
        if kind == "join" and size < 6:
            assert isinstance(value, SamplingParams)
            assert isinstance(extra, int)
            for sampler in rows:
                sampler.set(size, value, [extra, extra // 2])
            size += 1
        elif kind == "leave" and isinstance(value, int) and value < size:
            size -= 1
            for sampler in rows:
                sampler.move(size, value)
        elif kind == "note" and isinstance(value, int) and isinstance(extra, int) and value < size:
            for sampler in rows:
                sampler.note(value, extra)
        elif kind == "sample" and size:
            assert isinstance(value, int)
            rng = np.random.default_rng(value)
            logits_BV = np.stack([some_logits(rng, 40) for _ in range(size)])
            position_B = rng.integers(0, 1000, size)
            expected = host.sample(logits_BV.copy(), position_B)[0].tolist()
            ours = draws(taped, logits_BV, position_B)
            differ += sum(a != b for a, b in zip(ours, expected, strict=True))
            drawn += size
    assert differ <= (drawn > 0)  # one may lie at a border; a wrong setting shows in more than one draw


def test_penalties_remember_all_that_was_noted_and_forget_it_with_the_row() -> None:
    logits = np.array([[5.0, 4.0, 3.0, 2.0]], dtype=np.float32)
    rows = device_rows(3, 4)
    rows.set(0, SamplingParams(temperature=0, repetition_penalty=2), [0])
    position = np.array([0])
    assert draws(rows, logits, position) == [1]
    rows.note(0, 1)
    rows.note(0, 2)  # two between two draws
    assert draws(rows, logits, position) == [0]  # 2.5, 2, 1.5, 2
    rows.note(0, 3)
    rows.move(0, 2)
    rows.move(2, 0)
    logits[0, 3] = 2.6
    assert draws(rows, logits, position) == [0]  # 3 was noted before the moves
    rows.note(0, 0)
    rows.set(0, SamplingParams(temperature=0, repetition_penalty=2), [])
    assert draws(rows, np.array([[1.0, 1.5, 0.0, 0.0]], dtype=np.float32), position) == [1]


def test_a_row_that_is_not_finite_is_reported_and_touches_no_other() -> None:
    rng = np.random.default_rng(1)
    logits_BV = np.stack([some_logits(rng, 300) for _ in range(5)])
    rows = device_rows(5, 300)
    for row in range(5):
        rows.set(row, SamplingParams(seed=row, temperature=1.0 if row != 4 else 0.0))
    clean = draws(rows, logits_BV, np.arange(5))
    broken_BV = logits_BV.copy()
    broken_BV[1, 7] = np.nan
    broken_BV[2, 9] = np.inf
    broken_BV[3] = -np.inf
    chosen_B, usable_B = rows.sample(on_device(broken_BV), np.arange(5))
    assert usable_B.tolist() == [True, False, False, False, True]
    assert chosen_B[[0, 4]].tolist() == [clean[0], clean[4]]
    assert ((chosen_B >= 0) & (chosen_B < 300)).all()


def test_draws_follow_the_filtered_distribution() -> None:
    """Chi-squared over 6,400 draws of 64 rows, at its 99.99 % bound for 3 degrees of freedom."""
    probability = np.array([0.5, 0.25, 0.15, 0.06, 0.04])
    logits_BV = np.repeat(np.log(probability).astype(np.float32)[None], 64, axis=0)
    rows = device_rows(64, 5)
    for row in range(64):
        rows.set(row, SamplingParams(temperature=1, top_p=0.95, seed=row))
    drawn = [token for place in range(100) for token in draws(rows, logits_BV, np.full(64, place))]
    count = np.bincount(drawn, minlength=5)
    assert count[4] == 0  # 0.96 of the mass is there before it
    expected = probability[:4] / probability[:4].sum() * len(drawn)
    assert ((count[:4] - expected) ** 2 / expected).sum() < 21.1


def test_the_logits_are_left_as_they_were_and_a_row_of_them_can_be_read() -> None:
    logits_BV = np.stack([some_logits(np.random.default_rng(0), 300)] * 3)
    given_BV = on_device(logits_BV)
    rows = device_rows(3, 300)
    for row in range(3):
        rows.set(row, SamplingParams(repetition_penalty=1.5), range(20))
    rows.sample(given_BV, np.arange(3))
    assert len(given_BV) == 3
    assert all(np.array_equal(given_BV[row], logits_BV[row]) for row in range(3))


def test_too_large_a_batch_or_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 to 4096 rows of 2 to 2\^20 tokens, got 1 rows of 2097152"):
        device_rows(1, 1 << 21)
