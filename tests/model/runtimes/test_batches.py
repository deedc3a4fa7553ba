"""A batch of streams in each runtime against its rows alone, to the last bit.

The engine's promise that a seed gives one story, alone or among others, rests on this.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.runtimes.shared import arrays_of, bits, check_batch_invariance, decode, poisoned, random_tokens, read
from tests.model.small_model import SMALL

# Batch invariance


def test_a_row_has_the_same_bits_alone_and_in_any_batch_on_shipped_weights(shipped_runtime: Any) -> None:
    sizes = check_batch_invariance(shipped_runtime, streams=19, steps=4, seed=0)
    assert len(sizes) >= 4
    assert max(sizes) == 19


def test_a_row_has_the_same_bits_alone_and_at_every_batch_size_on_shipped_weights(shipped_runtime: Any) -> None:
    vocab = shipped_runtime.vocab_size
    states = [shipped_runtime.prefill(random_tokens(9, stream, vocab))[1] for stream in range(64)]
    fed = np.arange(1, 65) * 50
    alone = [decode(shipped_runtime, state, [token])[0] for state, token in zip(states, fed.tolist(), strict=True)]
    for size in range(1, 65):
        batch = shipped_runtime.new_batch()
        for state in states[:size]:
            batch.append(state)
        assert np.array_equal(shipped_runtime.step(fed[:size], batch), np.concatenate(alone[:size])), size


@given(streams=st.integers(1, 8), steps=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(runtime: Any, streams: int, steps: int, seed: int) -> None:
    check_batch_invariance(runtime, streams, steps, seed)


def test_a_stream_that_turned_into_nan_touches_no_other_and_leaves_nothing_behind(runtime: Any) -> None:
    states = [runtime.prefill(random_tokens(30, stream))[1] for stream in range(4)]
    alone = [decode(runtime, state, range(1, 6))[0] for state in states]
    batch = runtime.new_batch()
    for state in (states[0], poisoned(states[1]), *states[2:]):
        batch.append(state)
    for step, token in enumerate(range(1, 4)):
        logits = runtime.step(np.full(4, token), batch)
        assert np.isnan(logits[1]).all()
        assert all(np.array_equal(logits[row], alone[row][step]) for row in (0, 2, 3))
    # A new story begins in its row; then it leaves, and another stream gets the row behind the others.
    fresh = decode(runtime, runtime.empty, [0, 7])[0]
    for step, (other, token) in enumerate(((4, 0), (5, 7))):
        logits = runtime.step(np.array([other, token, other, other]), batch)
        assert np.array_equal(logits[1], fresh[step])
        assert np.array_equal(logits[3], alone[3][3 + step])
    batch.remove(1)
    batch.append(states[1])
    for step, token in enumerate(range(1, 4)):
        assert np.array_equal(runtime.step(np.array([5, 5, 5, token]), batch)[3], alone[1][step])


# States and batches


OPERATION = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 5)),
    st.tuples(st.just("remove"), st.integers(0, 7)),
    st.tuples(st.just("copy"), st.integers(0, 7)),
    st.tuples(st.just("step"), st.integers(0, 300)),
)


@given(operations=st.lists(OPERATION, max_size=25))
@settings(max_examples=20)
def test_a_batch_behaves_as_a_list_of_streams(runtime: Any, operations: list[tuple[str, int]]) -> None:
    """Against a list of states that are stepped one by one, to the last bit."""
    prepared = [runtime.prefill(random_tokens(4 + 9 * n, n))[1] for n in range(6)]
    batch, model = runtime.new_batch(), list[Any]()
    for what, value in operations:
        if what == "append" and len(model) < runtime.max_batch:
            assert batch.append(prepared[value]) == len(model)
            model.append(prepared[value])
        elif what == "remove" and value < len(model):
            batch.remove(value)
            model[value] = model[-1]
            model.pop()
        elif what == "copy" and value < len(model) < runtime.max_batch:
            assert batch.append(read(batch, value)) == len(model)
            model.append(model[value])
        elif what == "step" and model:
            fed = [(value + row) % 300 for row in range(len(model))]  # now and then the end of story
            logits = runtime.step(np.array(fed), batch).copy()
            for row, state in enumerate(model):
                expected, model[row] = decode(runtime, state, [fed[row]])
                assert np.array_equal(logits[row], expected[0])
        assert len(batch) == len(model)
        assert all(bits(read(batch, row)) == bits(state) for row, state in enumerate(model))


def test_a_state_once_handed_out_never_changes(runtime: Any) -> None:
    _, state = runtime.prefill(random_tokens(40, 0))
    before = bits(state)
    batch = runtime.new_batch()
    batch.append(state)
    kept = read(batch, 0)
    assert bits(kept) == before
    for token in (5, 6, 7):
        runtime.step(np.array([token]), batch)
    later = read(batch, 0)
    runtime.prefill([8, 9], state)
    batch.remove(0)
    batch.append(runtime.empty)
    assert bits(state) == bits(kept) == before
    assert bits(later) != before
    assert bits(later) == bits(decode(runtime, state, (5, 6, 7))[1])


def test_a_story_goes_on_from_a_state_as_it_would_have(runtime: Any) -> None:
    tokens = random_tokens(60, 6)
    whole, _ = decode(runtime, runtime.empty, tokens)
    _, middle = decode(runtime, runtime.empty, tokens[:33])
    rest, _ = decode(runtime, middle, tokens[33:])
    assert np.array_equal(rest, whole[33:])


def test_a_state_has_the_same_size_however_long_the_story(runtime: Any) -> None:
    def shapes(state: Any) -> list[tuple[int, ...]]:
        return [tuple(part.shape) for part in arrays_of(state).values()]

    for length in (1, 2, 25, 200):
        assert shapes(runtime.prefill(random_tokens(length, 0))[1]) == shapes(runtime.empty)


def test_a_batch_has_the_capacity_that_was_asked_for_and_no_more(runtime: Any) -> None:
    batch = runtime.new_batch()
    for _ in range(runtime.max_batch):
        batch.append(runtime.empty)
    with pytest.raises(IndexError, match="at most 8 streams"):
        batch.append(runtime.empty)
    for row in (-1, 8):
        with pytest.raises(IndexError, match="row must be below 8"):
            batch.remove(row)


def test_tokens_must_be_as_many_as_streams(runtime: Any) -> None:
    batch = runtime.new_batch()
    assert runtime.step(np.zeros(0, np.int64), batch).shape == (0, SMALL.vocab_size)
    batch.append(runtime.empty)
    batch.append(runtime.empty)
    for tokens in (np.array([3]), np.array([3, 4, 5])):
        with pytest.raises(ValueError, match="one token for each of 2 streams"):
            runtime.step(tokens, batch)
