"""A batch of streams in PyTorch against its rows alone, to the last bit, and the memory that batches share.

The engine's promise that a seed gives one story, alone or among others, rests on this.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model.runtimes.torch.batch
from model.runtimes.torch.batch import TorchBatch
from model.runtimes.torch.prefill import TorchState
from model.runtimes.torch.runtime import TorchRuntime
from model.runtimes.torch.step import StepBuffers, StepWeights
from tests.model.all_runtimes import random_tokens
from tests.model.small_model import SMALL
from tests.model.tape import Tapes
from tests.model.torch_runtimes import bits, decode, poisoned, shipped_torch, small_network, small_torch


def check_company(runtime: TorchRuntime, streams: int, steps: int, seed: int) -> set[int]:
    """Streams join and leave at random; each row's logits must be the bits that the stream gets alone.

    A stream that leaves before its end is read, waits, and comes back later. Returns the batch sizes met.
    """
    rng = np.random.default_rng(seed)
    vocab = runtime.vocab_size
    tokens = [random_tokens(3 + int(rng.integers(6)) + steps, stream, vocab) for stream in range(streams)]
    waiting = {stream: runtime.prefill(tokens[stream][:-steps])[1] for stream in range(streams)}
    alone = {stream: decode(runtime, waiting[stream], tokens[stream][-steps:]) for stream in range(streams)}
    batch, rows, done, sizes = runtime.new_batch(), list[int](), dict.fromkeys(range(streams), 0), set[int]()
    while waiting or rows:
        count = int(rng.integers(len(waiting) + 1)) if rows else len(waiting)
        for stream in list(waiting)[:count]:
            assert batch.append(waiting.pop(stream)) == len(rows)
            rows.append(stream)
        logits = runtime.step(np.array([tokens[stream][done[stream] - steps] for stream in rows]), batch)
        sizes.add(len(rows))
        for row, stream in enumerate(rows):
            assert np.array_equal(logits[row], alone[stream][0][done[stream]]), (len(rows), row)
            done[stream] += 1
        for row in reversed(range(len(rows))):
            finished = done[rows[row]] == steps
            if finished or rng.random() < 0.4:
                state = batch.read(row)
                batch.remove(row)
                if finished:
                    assert bits(state) == bits(alone[rows[row]][1])
                else:
                    waiting[rows[row]] = state
                rows[row] = rows[-1]
                rows.pop()
    assert len(batch) == 0
    return sizes


def test_a_row_has_the_same_bits_alone_and_at_every_batch_size_on_shipped_weights() -> None:
    runtime = shipped_torch()
    states = [runtime.prefill(random_tokens(9, stream, 4096))[1] for stream in range(64)]
    fed = np.arange(1, 65) * 50
    alone = np.concatenate(
        [decode(runtime, state, [int(token)])[0] for state, token in zip(states, fed, strict=True)]
    )
    for size in range(1, 65):
        batch = runtime.new_batch()
        for state in states[:size]:
            batch.append(state)
        assert np.array_equal(runtime.step(fed[:size], batch), alone[:size]), size


def test_streams_that_come_and_go_keep_their_bits_on_shipped_weights() -> None:
    sizes = check_company(shipped_torch(), streams=19, steps=4, seed=0)
    assert len(sizes) >= 4
    assert max(sizes) == 19


@given(streams=st.integers(1, 8), steps=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8)
def test_streams_that_come_and_go_keep_their_bits(streams: int, steps: int, seed: int) -> None:
    check_company(small_torch(), streams, steps, seed)


Step = Callable[[StepWeights, StepBuffers, int, int], None]


def uneven(spoilt: Callable[[int, int], bool]) -> Step:
    """A step without matrix products, whose bits depend on (rows of the launch, row) where they are told to.

    It stands in for the real one since which kernels disagree, and where, is each processor's own affair.
    """

    def step(weights: StepWeights, buffers: StepBuffers, first: int, rows: int) -> None:
        token_B, memory_B = (
            buffers.feed_2B[0, first : first + rows],
            buffers.memory_RBHNP[0, first : first + rows],
        )
        memory_B.mul_(0.5).add_(token_B[:, None, None, None])
        place_V = torch.arange(buffers.logits_BV.size(1))
        logits_BV = buffers.logits_BV[first : first + rows]
        logits_BV.copy_(memory_B[:, 0, 0, :1] * place_V)
        for row in range(rows):
            if spoilt(rows, row):
                logits_BV[row] *= 1 + 1e-6

    return step


@pytest.mark.parametrize(
    ("spoilt", "sizes"),
    [
        (lambda rows, row: False, [1, 2, 4, 8, 16]),
        (lambda rows, row: rows < 8, [8, 16]),
        (lambda rows, row: rows == 16, [16]),
        (lambda rows, row: rows in (1, 2) or (rows == 16 and row % 2 == 1), [4, 8]),
        (lambda rows, row: rows > 1 and row == rows - 1, [1]),
    ],
    ids=[
        "none differ",
        "few rows differ",
        "many rows differ",
        "two rows of many differ",
        "the last row of several differs",
    ],
)
def test_launches_are_of_sizes_at_which_company_does_not_show(
    spoilt: Callable[[int, int], bool], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.runtimes.torch.batch, "decode_step", uneven(spoilt))
    runtime = TorchRuntime(small_network(), max_batch=11)
    assert runtime.sizes == sizes
    assert max(check_company(runtime, streams=11, steps=5, seed=2)) == 11


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(0, 3)),
            st.tuples(st.just("remove"), st.integers(0, 7)),
            st.tuples(st.just("fork"), st.integers(0, 7)),
            st.tuples(st.just("step"), st.integers(0, 99)),
        ),
        max_size=25,
    )
)
@settings(max_examples=12)
def test_rows_are_where_a_list_with_swap_remove_has_them(actions: list[tuple[str, int]]) -> None:
    runtime = small_torch()
    states = [runtime.prefill(random_tokens(5 + 10 * length, length))[1] for length in range(4)]
    batch, expected = runtime.new_batch(), list[TorchState]()
    for kind, value in actions:
        if kind == "append" and len(expected) < runtime.max_batch:
            assert batch.append(states[value]) == len(expected)
            expected.append(states[value])
        elif kind == "remove" and value < len(expected):
            batch.remove(value)
            expected[value] = expected[-1]
            expected.pop()
        elif kind == "fork" and value < len(expected) < runtime.max_batch:
            assert batch.append(batch.read(value)) == len(expected)
            expected.append(expected[value])
        elif kind == "step" and expected:
            fed = [(value + row) % 300 for row in range(len(expected))]  # now and then the end of story
            logits = runtime.step(np.array(fed), batch).copy()
            for row, state in enumerate(expected):
                alone, expected[row] = decode(runtime, state, [fed[row]])
                assert np.array_equal(logits[row], alone[0])
        assert len(batch) == len(expected)
    assert [bits(batch.read(row)) for row in range(len(batch))] == [bits(state) for state in expected]


def test_a_stream_that_turned_into_nan_touches_no_other_and_leaves_nothing_behind() -> None:
    runtime = small_torch()
    states = [runtime.prefill(random_tokens(30, stream))[1] for stream in range(4)]
    alone = [decode(runtime, state, range(1, 4))[0] for state in states]
    batch = runtime.new_batch()
    for state in (states[0], poisoned(states[1]), *states[2:]):
        batch.append(state)
    for step, token in enumerate(range(1, 4)):
        logits = runtime.step(np.full(4, token), batch)
        assert np.isnan(logits[1]).all()
        for row in (0, 2, 3):
            assert np.array_equal(logits[row], alone[row][step])
    # A new story in its row, and then one where it was and nobody is.
    fresh = decode(runtime, runtime.empty, [0, 7])[0]
    for step, token in enumerate((0, 7)):
        logits = runtime.step(np.array([1, token, 1, 1]), batch)
        assert np.array_equal(logits[1], fresh[step])
    batch.remove(1)
    batch.append(states[1])
    for step, token in enumerate(range(1, 4)):
        assert np.array_equal(runtime.step(np.array([5, 5, 5, token]), batch)[3], alone[1][step])


def test_a_state_once_handed_out_never_changes() -> None:
    runtime = small_torch()
    _, state = runtime.prefill(random_tokens(40, 0))
    before = bits(state)
    batch = runtime.new_batch()
    batch.append(state)
    read = batch.read(0)
    assert bits(read) == before
    for token in (5, 6, 7):
        runtime.step(np.array([token]), batch)
    later = batch.read(0)
    runtime.prefill([8, 9], state)
    batch.remove(0)
    batch.append(runtime.empty)
    assert bits(state) == bits(read) == before
    assert bits(later) != before
    assert bits(later) == bits(decode(runtime, state, (5, 6, 7))[1])


def test_a_forked_story_goes_on_as_the_one_it_was_forked_from() -> None:
    runtime = small_torch()
    tokens = random_tokens(60, 6)
    whole, _ = decode(runtime, runtime.empty, tokens)
    _, middle = decode(runtime, runtime.empty, tokens[:33])
    rest, _ = decode(runtime, middle, tokens[33:])
    assert np.array_equal(rest, whole[33:])


def test_a_state_has_the_same_size_however_long_the_story_and_holds_no_more_memory_than_it_tells() -> None:
    runtime = small_torch()
    states = [runtime.prefill(random_tokens(length, 0))[1] for length in (1, 2, 25, 200)]
    batch = runtime.new_batch()
    batch.append(states[0])
    states.append(batch.read(0))
    assert {state.nbytes for state in states} == {runtime.empty.nbytes}
    for state in states:
        parts = (state.conv_RKM, state.memory_RHNP, state.ring_AWP)
        assert sum(part.untyped_storage().nbytes() for part in parts) == state.nbytes


def test_a_batch_has_the_room_that_was_asked_for_and_no_more() -> None:
    runtime = TorchRuntime(small_network(), max_batch=5)
    batch = runtime.new_batch()
    for _ in range(5):
        batch.append(runtime.empty)
    with pytest.raises(IndexError, match="at most 5 streams"):
        batch.append(runtime.empty)
    for row in (-1, 5):
        with pytest.raises(IndexError, match="row must be below 5"):
            batch.remove(row)
        with pytest.raises(IndexError, match="row must be below 5"):
            batch.read(row)


def test_tokens_must_be_as_many_as_streams() -> None:
    runtime = small_torch()
    batch: TorchBatch = runtime.new_batch()
    assert runtime.step(np.zeros(0, np.int64), batch).shape == (0, SMALL.vocab_size)
    batch.append(runtime.empty)
    batch.append(runtime.empty)
    for tokens in (np.array([3]), np.array([3, 4, 5])):
        with pytest.raises(ValueError, match="one token for each of 2 streams"):
            runtime.step(tokens, batch)


def test_two_batches_that_live_at_once_share_no_memory() -> None:
    runtime = small_torch()
    tokens = random_tokens(12, 3)
    alone, _ = decode(runtime, runtime.empty, tokens)
    batches = [runtime.new_batch(), runtime.new_batch()]
    assert batches[0].arena is not batches[1].arena
    for batch in batches:
        batch.append(runtime.empty)
    for place, token in enumerate(tokens):
        ours = runtime.step(np.array([token]), batches[0]).copy()
        runtime.step(np.array([(token + 1) % 300]), batches[1])
        assert np.array_equal(ours[0], alone[place])


def test_a_batch_that_is_given_up_leaves_its_memory_and_launches_to_the_next() -> None:
    tapes = Tapes()
    runtime = TorchRuntime(small_network(), max_batch=6, recorder=tapes)
    recorded = tapes.recorded
    first = runtime.new_batch()
    arena = first.arena
    for _ in range(3):
        first.append(poisoned(runtime.empty))
    runtime.step(np.array([1, 2, 3]), first)
    del first
    second = runtime.new_batch()
    assert second.arena is arena
    assert tapes.recorded == recorded
    second.append(runtime.empty)
    assert np.array_equal(runtime.step(np.array([5]), second), decode(runtime, runtime.empty, [5])[0])
    assert tapes.recorded > recorded  # `decode` needed a batch beside it
