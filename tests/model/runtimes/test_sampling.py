"""Every sampler against a naive one that sorts everything, row by row, in Python; and against the one in numpy."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model.runtimes.torch.sampling
from model.architecture.tokenizer import TokenMasks
from model.generation import SamplingParams
from model.runtimes.native.library import paths
from model.runtimes.native.runtime import NativeSampler
from model.runtimes.protocol import Flags, Sampler, Tokens
from model.runtimes.sampling import SamplingRows, log_probabilities, start_of, uniform
from model.runtimes.torch.forward import Recorder, eager
from model.runtimes.torch.sampling import DeviceLogits, DeviceSampler
from tests.model.runtimes.shared import needs_native
from tests.model.runtimes.torch.tape import Tapes
from tests.model.spelling import misspelling

BIASES = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([-100.0, -2.5, 0.3, 4.0])), max_size=2, unique_by=lambda pair: pair[0]
)
SETTINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.001, 0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 50, 200, 100_000]),
    top_p=st.sampled_from([1.0, 0.95, 0.999, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 2.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3, 2.0]),
    logit_bias=st.just(()) | BIASES.map(tuple),
    ignore_eos=st.sampled_from([False, False, True]),
    min_tokens=st.sampled_from([0, 0, 3]),
    keep_names=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
VOCAB = st.sampled_from([2, 97, 600, 4096])

Maker = Callable[..., Sampler]
"""Makes a sampler of so many rows over so large a vocabulary."""


class OnDevice(DeviceSampler):
    """The device's sampler, on the CPU, over logits that are given as an array."""

    def __init__(
        self, capacity: int, vocab: int, masks: TokenMasks | None = None, recorder: Recorder | None = None
    ) -> None:
        super().__init__(capacity, vocab, torch.device("cpu"), recorder or eager, masks)

    def sample(self, logits_BV: Any, position_B: Tokens) -> tuple[Tokens, Flags]:
        return super().sample(DeviceLogits(torch.from_numpy(logits_BV)), position_B)


def natives(capacity: int, vocab: int, masks: TokenMasks | None = None) -> list[NativeSampler]:
    """The sampler in C, by every path that this processor can run; the best first."""
    return [NativeSampler(capacity, vocab, number, masks) for number in paths().values()]


NATIVE = pytest.param(lambda *sizes: natives(*sizes)[0], marks=needs_native, id="native")


@pytest.fixture(scope="module", params=[pytest.param(SamplingRows, id="numpy"), NATIVE, OnDevice])
def rows_of(request: pytest.FixtureRequest) -> Maker:
    """Every sampler."""
    maker: Maker = request.param
    return maker


def some_logits(rng: np.random.Generator, vocab: int) -> np.ndarray:
    """Rows of every kind: flat, peaked, with ties, with forbidden tokens."""
    logits: np.ndarray = rng.standard_normal(vocab) * rng.choice([0.1, 1, 3, 8])
    if rng.random() < 0.3:
        logits = np.round(logits)
    if rng.random() < 0.2:
        logits[rng.random(vocab) < 0.5] = -np.inf
        logits[rng.integers(1, vocab)] = 1.0  # the end of story may be forbidden by the settings
    return logits.astype(np.float32)


@cache
def some_masks(vocab: int) -> TokenMasks:
    """Of a vocabulary with every byte and pieces of one to four bytes; nothing is forbidden in a small one."""
    if vocab < 300:
        return TokenMasks.none(vocab)
    rng = np.random.default_rng(vocab)
    pieces = [b"", *(bytes([byte]) for byte in range(256)), "ß".encode(), "日".encode(), "🦊".encode()]
    letters = "aé日🦊".encode()
    while len(pieces) < vocab:
        start = int(rng.integers(len(letters)))
        pieces.append(letters[start : start + int(rng.integers(1, 5))])
    return TokenMasks.of(pieces, vocab)


def begun(masks: TokenMasks, story: list[int]) -> bytes:
    """What a story ends in that is no whole character yet, by Python's own decoder."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(b"".join(masks.token_bytes[token] for token in story))
    return decoder.getstate()[0] if not half_surrogate(decoder) else b""


def half_surrogate(decoder: codecs.IncrementalDecoder) -> bool:
    """Whether the decoder waits for the end of a surrogate, which it would refuse then."""
    return b"\xed\xa0" <= decoder.getstate()[0] <= b"\xed\xbf"


@cache
def breaking(vocab: int, before: bytes) -> np.ndarray:
    """Which tokens do not go on with a character that has begun, by Python's own decoder."""

    def breaks(token: int, data: bytes) -> bool:
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        try:
            decoder.decode(before + data)
        except UnicodeDecodeError:
            return True
        return half_surrogate(decoder) or (bool(before) and token == 0)

    return np.array([breaks(*each) for each in enumerate(some_masks(vocab).token_bytes)])


def splitmix(seed: int, position: int) -> float:
    """The random number of a token, in Python's integers."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    return (mix((mix((seed + golden) % 2**64) + position * golden) % 2**64) >> 11) / 2**53


def naive(
    logits: np.ndarray,
    sampling: SamplingParams,
    prompt: list[int],
    generated: list[int],
    position: int,
    masks: TokenMasks,
) -> set[int]:
    """The token that must come, or the two between which rounding decides.

    Sorts the whole vocabulary and adds in Python's exact `fsum`. Where float32 rounding may move a border,
    both neighbours are allowed.
    """
    scale = np.float32(1 / max(sampling.temperature, 1e-5) if sampling.temperature else 1)
    logits = np.where(breaking(len(logits), begun(masks, [*prompt, *generated])), np.float32(-np.inf), logits)
    if sampling.keep_names:
        logits[misspelling(masks.token_bytes, [*prompt, *generated])] = -np.inf
    if sampling.ignore_eos or len(generated) < sampling.min_tokens:
        logits[0] = -np.inf
    for token, bias in sampling.logit_bias:
        logits[token] += np.float32(bias)
    scaled = logits * scale
    for token in {*prompt, *generated}:
        penalty = np.float32(sampling.repetition_penalty)
        scaled[token] = scaled[token] / penalty if scaled[token] > 0 else scaled[token] * penalty
    for token in set(generated):
        deduction = sampling.presence_penalty + sampling.frequency_penalty * generated.count(token)
        scaled[token] -= np.float32(deduction * float(scale))
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


# What is drawn


@settings(max_examples=100)
@given(vocab=VOCAB, several=st.lists(SETTINGS, min_size=1, max_size=5), noise=st.integers(0, 2**32))
def test_every_row_is_what_a_naive_sampler_draws(
    rows_of: Maker, vocab: int, several: list[SamplingParams], noise: int
) -> None:
    rng = np.random.default_rng(noise)
    masks = some_masks(vocab)
    rows = rows_of(len(several), vocab, masks)
    prompts, generated = ([rng.integers(0, vocab, rng.integers(5)).tolist() for _ in several] for _ in range(2))
    if rng.random() < 0.5:  # within a character
        generated = [[*story, int(rng.integers(0xC1, 0xF6))] if vocab >= 300 else story for story in generated]
    elif vocab >= 300:  # within a name; the token of a byte is the next number
        prompts = [[byte + 1 for byte in b"So Zeb and Zo\xc3\xab sat. Then "] for _ in several]
        generated = [[byte + 1 for byte in b"Zo\xc3\xab "[: rng.integers(6)]] for _ in several]
    for row, sampling in enumerate(several):
        rows.set(row, sampling, prompts[row], generated[row])
        for _ in range(rng.integers(3)):
            so_far = [*prompts[row], *generated[row]]
            allowed = ~breaking(vocab, begun(masks, so_far))
            if sampling.keep_names:
                allowed &= ~misspelling(masks.token_bytes, so_far)
            generated[row] = [*generated[row], int(rng.choice(allowed.nonzero()[0]))]
            rows.note(row, generated[row][-1])
    logits_BV = np.stack([some_logits(rng, vocab) for _ in several])
    for row, story in enumerate(zip(prompts, generated, strict=True)):  # some token spells the name
        spelling = (~misspelling(masks.token_bytes, [*story[0], *story[1]])).nonzero()[0]
        logits_BV[row, spelling[-1]] = 1.0
    before = logits_BV.copy()
    position_B = rng.integers(0, 10_000, len(several))
    chosen_B, usable_B = rows.sample(logits_BV, position_B)
    assert usable_B.all()
    assert np.array_equal(logits_BV, before)
    for row, sampling in enumerate(several):
        story = prompts[row], generated[row]
        assert int(chosen_B[row]) in naive(logits_BV[row], sampling, *story, int(position_B[row]), masks)


@pytest.mark.parametrize("others", [pytest.param(natives, marks=needs_native), lambda *size: [OnDevice(*size)]])
def test_of_many_draws_nearly_all_are_those_of_numpy_all_greedy_ones_and_all_paths_agree(
    others: Callable[..., list[Any]],
) -> None:
    """9,600 draws under settings of every kind; the few that may differ lie at a border of two tokens."""
    rng = np.random.default_rng(0)
    differ = drawn = 0
    for vocab in (97, 600, 4096):
        for _ in range(20):
            host, ours = SamplingRows(16, vocab, some_masks(vocab)), others(16, vocab, some_masks(vocab))
            several = [
                SamplingParams(
                    temperature=float(rng.choice([0, 0.3, 0.7, 1, 2])),
                    top_k=int(rng.choice([0, 0, 1, 3, 50, 200])),
                    top_p=float(rng.choice([1, 0.95, 0.999, 0.5, 0.01])),
                    min_p=float(rng.choice([0, 0, 0.02, 0.3, 1])),
                    repetition_penalty=float(rng.choice([1, 1, 1.3])),
                    presence_penalty=float(rng.choice([0, 0, 0.6, -1])),
                    frequency_penalty=float(rng.choice([0, 0, 0.2])),
                    logit_bias=((int(rng.integers(vocab)), float(rng.normal() * 9)),) * int(rng.integers(2)),
                    ignore_eos=bool(rng.random() < 0.2),
                    min_tokens=int(rng.choice([0, 0, 5])),
                    seed=int(rng.integers(2**63 - 1)),
                )
                for _ in range(16)
            ]
            for row, sampling in enumerate(several):
                for each in (host, *ours):
                    each.set(row, sampling, range(row))
            greedy_B = np.array([sampling.temperature == 0 for sampling in several])
            for _ in range(10):
                logits_BV = np.stack([some_logits(rng, vocab) for _ in several])
                position_B = rng.integers(0, 10_000, 16)
                expected_B = host.sample(logits_BV.copy(), position_B)[0]
                chosen = [each.sample(logits_BV, position_B)[0] for each in ours]
                assert all(np.array_equal(each, chosen[0]) for each in chosen)
                unequal_B = chosen[0] != expected_B
                assert not (unequal_B & greedy_B).any()
                differ, drawn = differ + int(unequal_B.sum()), drawn + 16
                for row, token in enumerate(expected_B.tolist()):
                    for each in (host, *ours):
                        each.note(row, token)
    assert drawn == 9_600
    assert differ <= drawn / 1000


def test_draws_follow_the_filtered_distribution(rows_of: Maker) -> None:
    """Chi-squared over 6,400 draws of 64 rows, at its 99.99 % bound for 3 degrees of freedom."""
    probability = np.array([0.5, 0.25, 0.15, 0.06, 0.04])
    logits_BV = np.repeat(np.log(probability).astype(np.float32)[None], 64, axis=0)
    rows = rows_of(64, 5)
    for row in range(64):
        rows.set(row, SamplingParams(temperature=1, top_p=0.95, seed=row))
    drawn = np.concatenate([rows.sample(logits_BV, np.full(64, place))[0].copy() for place in range(100)])
    count = np.bincount(drawn, minlength=5)
    assert count[4] == 0  # 0.96 of the mass is there before it
    expected = probability[:4] / probability[:4].sum() * len(drawn)
    assert ((count[:4] - expected) ** 2 / expected).sum() < 21.1


def test_top_p_counts_all_that_top_k_leaves_however_unlikely(rows_of: Maker) -> None:
    """Of the weights 1, 0.25 and 48 times 0.0017, 79 % are more than 1: the second token is in the nucleus."""
    weights = np.array([1.0, 0.25, *[0.0017] * 48, *[0.0] * 50])
    with np.errstate(divide="ignore"):
        logits = np.log(weights).astype(np.float32)[None]
    rows = rows_of(1, 100)
    rows.set(0, SamplingParams(temperature=1, top_k=50, top_p=0.79))
    assert {int(rows.sample(logits, np.array([place]))[0][0]) for place in range(100)} == {0, 1}


def test_a_token_without_mass_never_comes(rows_of: Maker) -> None:
    """Neither before all others, nor between them, nor behind; 1,000 draws without a filter."""
    logits = np.full((1, 600), -np.inf, np.float32)
    logits[0, [3, 300, 590]] = 0.0
    rows = rows_of(1, 600)
    rows.set(0, SamplingParams(temperature=2, top_p=1, seed=4))
    drawn = [int(rows.sample(logits, np.array([place]))[0][0]) for place in range(1000)]
    count = np.bincount(drawn, minlength=600)
    assert count.sum() == count[[3, 300, 590]].sum()
    assert (np.abs(count[[3, 300, 590]] - 1000 / 3) < 70).all()  # 4.7 standard deviations


def test_greedy_takes_the_likeliest_and_the_first_of_equals(rows_of: Maker) -> None:
    logits = np.array([[1, 3, 3, 2], [3, 1, 2, 0]], dtype=np.float32)
    rows = rows_of(2, 4)
    rows.set(0, SamplingParams(temperature=0))
    rows.set(1, SamplingParams(temperature=0, repetition_penalty=2.0), [0])
    assert rows.sample(logits, np.array([0, 0]))[0].tolist() == [1, 2]


def test_random_numbers_are_those_of_splitmix_and_look_uniform() -> None:
    seeds = [0, 1, 2**63 - 1]
    numbers_B = uniform(np.array([start_of(seed) for seed in seeds]), np.array([12_345] * 3))
    assert numbers_B.tolist() == [splitmix(seed, 12_345) for seed in seeds]
    numbers = np.array([splitmix(seed, position) for seed in range(100) for position in range(50)])
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 250.0) ** 2 / 250).sum() < 50  # 99.99 % of 19 degrees of freedom
    assert len(set(numbers.tolist())) == len(numbers)


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**40)), min_size=1, max_size=30))
def test_random_numbers_on_the_device_are_those_of_the_host_to_the_last_bit(places: list[tuple[int, int]]) -> None:
    start_B = np.array([start_of(seed) for seed, _ in places], dtype=np.uint64)
    position_B = np.array([position for _, position in places])
    ours = model.runtimes.torch.sampling.uniform(torch.from_numpy(start_B.view(np.int64)), torch.from_numpy(position_B))
    assert np.array_equal(ours.numpy(), uniform(start_B, position_B))


# Rows


@settings(max_examples=50)
@given(
    vocab=VOCAB,
    several=st.lists(SETTINGS, min_size=2, max_size=9),
    noise=st.integers(0, 2**32),
    leaves=st.integers(0, 8),
)
def test_a_row_does_not_depend_on_the_others_nor_on_its_place(
    rows_of: Maker, vocab: int, several: list[SamplingParams], noise: int, leaves: int
) -> None:
    rng = np.random.default_rng(noise)
    logits_BV = np.stack([some_logits(rng, vocab) for _ in several])
    position_B = rng.integers(0, 10_000, len(several))
    together, alone = rows_of(len(several) + 3, vocab), rows_of(1, vocab)
    for row, sampling in enumerate(several):
        together.set(row, sampling, range(min(vocab, 7)))
    chosen = together.sample(logits_BV, position_B)[0].tolist()
    for row, sampling in enumerate(several):
        alone.set(0, sampling, range(min(vocab, 7)))
        assert alone.sample(logits_BV[row : row + 1], position_B[row : row + 1])[0][0] == chosen[row]
    last, gone = len(several) - 1, leaves % len(several)
    together.move(last, gone)
    order = [last if row == gone else row for row in range(last)]
    left = together.sample(logits_BV[order], position_B[order])[0].tolist()
    assert left == [chosen[row] for row in order]


def test_a_penalty_knows_what_was_noted_and_forgets_it_with_the_row(rows_of: Maker) -> None:
    rows = rows_of(3, 4)

    def drawn(*logits: float) -> int:
        return int(rows.sample(np.array([logits], dtype=np.float32), np.array([0]))[0][0])

    rows.set(0, SamplingParams(temperature=0, repetition_penalty=2), [0])
    assert drawn(5, 4, 3, 2) == 1
    rows.note(0, 1)
    rows.note(0, 2)  # two between two draws
    assert drawn(5, 4, 3, 2) == 0  # 2.5, 2, 1.5, 2
    rows.note(0, 3)
    rows.move(0, 2)
    rows.move(2, 0)
    assert drawn(5, 4, 3, 2.6) == 0  # 3 was recorded before the moves
    rows.note(0, 0)
    rows.set(0, SamplingParams(temperature=0, repetition_penalty=2), [])
    assert drawn(1, 1.5, 0, 0) == 1


@pytest.mark.parametrize("greedy", [True, False])
def test_a_row_that_is_not_finite_is_reported_and_touches_no_other(rows_of: Maker, greedy: bool) -> None:
    rng = np.random.default_rng(1)
    logits_BV = np.stack([some_logits(rng, 300) for _ in range(5)])
    rows = rows_of(5, 300)
    for row in range(5):
        rows.set(row, SamplingParams(seed=row, temperature=0.0 if greedy or row == 4 else 1.0))
    clean = rows.sample(logits_BV, np.arange(5))[0].tolist()
    broken_BV = logits_BV.copy()
    broken_BV[1, 7] = np.nan
    broken_BV[2, 9] = np.inf
    broken_BV[3] = -np.inf
    chosen_B, usable_B = rows.sample(broken_BV, np.arange(5))
    assert usable_B.tolist() == [True, False, False, False, True]
    assert chosen_B[[0, 4]].tolist() == [clean[0], clean[4]]
    assert ((chosen_B >= 0) & (chosen_B < 300)).all()


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), SETTINGS, st.integers(0, 299)),
        st.tuples(st.just("leave"), st.integers(0, 5), st.none()),
        st.tuples(st.just("note"), st.integers(0, 5), st.integers(0, 299)),
        st.tuples(st.just("sample"), st.integers(0, 2**32), st.none()),
    ),
    min_size=4,
    max_size=40,
)


@settings(max_examples=30)
@given(ACTIONS)
def test_rows_on_the_device_that_join_leave_and_take_note_stay_those_of_the_host(
    actions: list[tuple[str, Any, Any]],
) -> None:
    """Replayed from a tape: nothing of what is set may be fixed while it is recorded."""
    masks = some_masks(300)
    host, taped = SamplingRows(6, 300, masks), OnDevice(6, 300, masks, Tapes())
    size = differ = drawn = 0
    for kind, value, extra in actions:
        if kind == "join" and size < 6:
            for sampler in (host, taped):
                sampler.set(size, value, [extra], [extra // 2])
            size += 1
        elif kind == "leave" and value < size:
            size -= 1
            for sampler in (host, taped):
                sampler.move(size, value)
        elif kind == "note" and value < size:
            for sampler in (host, taped):
                sampler.note(value, extra)
        elif kind == "sample" and size:
            rng = np.random.default_rng(value)
            logits_BV = np.stack([some_logits(rng, 300) for _ in range(size)])
            position_B = rng.integers(0, 1000, size)
            expected_B, _ = host.sample(logits_BV.copy(), position_B)
            chosen_B, usable_B = taped.sample(logits_BV, position_B)
            assert usable_B.all()
            differ, drawn = differ + int((chosen_B != expected_B).sum()), drawn + size
    assert differ <= (drawn > 0)  # one may lie at a border; a wrong setting shows in more than one draw


# Bad use, and log-probabilities


@needs_native
def test_arrays_of_another_shape_are_refused_before_c_reads_them() -> None:
    rows = natives(2, 40)[0]
    for shape, positions in (((1, 39), 1), ((3, 40), 3), ((2, 40), 1)):
        with pytest.raises(ValueError, match="got logits of"):
            rows.sample(np.zeros(shape, np.float32), np.zeros(positions, np.int64))


def test_too_large_a_batch_or_vocabulary_is_refused(rows_of: Maker) -> None:
    with pytest.raises(ValueError, match=r"1 to 4096 rows of 2 to 2\^20 tokens, got 1 rows of 2097152"):
        rows_of(1, 1 << 21)
    with pytest.raises(ValueError, match="sampling takes"):
        rows_of(0, 40)


def test_a_row_of_the_devices_logits_can_be_read() -> None:
    logits_BV = np.stack([some_logits(np.random.default_rng(0), 300)] * 3)
    given_BV = DeviceLogits(torch.from_numpy(logits_BV))
    assert len(given_BV) == 3
    assert all(np.array_equal(given_BV[row], logits_BV[row]) for row in range(3))


@given(VOCAB, st.integers(0, 20), st.integers(0, 2**32))
def test_log_probabilities_are_those_of_the_softmax(vocab: int, best: int, noise: int) -> None:
    logits = some_logits(np.random.default_rng(noise), vocab)
    top = float(logits.max())
    total = math.log(math.fsum(math.exp(x - top) for x in logits.tolist())) + top
    order = sorted(range(vocab), key=lambda token: (-logits[token], token))[:best]
    ((own, alternatives),) = log_probabilities(logits[None], [vocab - 1], best)
    assert own == pytest.approx(float(logits[vocab - 1]) - total, abs=1e-9)
    assert [token for token, _ in alternatives] == order
    assert [p for _, p in alternatives] == pytest.approx([float(logits[t]) - total for t in order], abs=1e-9)
