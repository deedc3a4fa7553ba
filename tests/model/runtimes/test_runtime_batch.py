"""A batch of streams in each embedded runtime against its rows alone, to the last bit.

The engine's promise that a seed gives one story, alone or among others, rests on this.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.all_runtimes import (
    EmbeddedState,
    bits,
    decode,
    every_runtime,
    parts_of,
    random_tokens,
    shipped,
    small,
)
from tests.model.small_model import SMALL

# Nobody's bits depend on company


def check_company(runtime: Any, streams: int, steps: int, seed: int) -> set[int]:
    """Streams join and leave at random; each row's logits must be the bits that the stream gets alone.

    A stream that leaves before its end is read, waits, and comes back later. Returns the batch sizes met.
    """
    vocab = runtime.vocab_size
    rng = np.random.default_rng(seed)
    tokens = [random_tokens(3 + int(rng.integers(6)) + steps, stream, vocab) for stream in range(streams)]
    waiting = {stream: runtime.prefill(tokens[stream][:-steps])[1] for stream in range(streams)}
    alone = {stream: decode(runtime, waiting[stream], tokens[stream][-steps:]) for stream in range(streams)}
    batch, rows, done, sizes = runtime.new_batch(), list[int](), dict.fromkeys(range(streams), 0), set[int]()
    while waiting or rows:
        joining = (
            rng.permutation(sorted(waiting))[: rng.integers(len(waiting) + 1)] if rows else list(waiting)
        )
        for stream in map(int, joining):
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


@every_runtime
@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_has_the_same_bits_alone_and_in_any_company_on_shipped_weights(kind: str, seed: int) -> None:
    sizes = check_company(shipped(kind), streams=64 if seed else 19, steps=4, seed=seed)
    assert len(sizes) >= 4
    assert max(sizes) == (64 if seed else 19)


@every_runtime
@given(streams=st.integers(1, 8), steps=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_a_row_has_the_same_bits_alone_and_in_any_company(
    kind: str, streams: int, steps: int, seed: int
) -> None:
    check_company(small(kind), streams, steps, seed)


@every_runtime
def test_a_stream_that_turned_into_nan_touches_no_other(kind: str) -> None:
    runtime = small(kind)
    states = [runtime.prefill(random_tokens(30, stream))[1] for stream in range(4)]
    nothing = {name: np.full_like(part, np.nan) for name, part in parts_of(states[1]).items()}
    sick = dataclasses.replace(states[1], **nothing)
    alone = [decode(runtime, state, range(1, 6))[0] for state in states]
    batch = runtime.new_batch()
    for state in (states[0], sick, *states[2:]):
        batch.append(state)
    for step, token in enumerate(range(1, 4)):
        logits = runtime.step(np.full(4, token), batch)
        assert np.isnan(logits[1]).all()
        assert all(np.array_equal(logits[row], alone[row][step]) for row in (0, 2, 3))
    # Its row is given to the next stream, of which nothing may be sick.
    batch.remove(1)
    batch.append(states[1])
    logits = runtime.step(np.array([4, 4, 4, 1]), batch)
    assert np.array_equal(logits[3], alone[1][0])
    assert np.array_equal(logits[1], alone[3][3])  # the last row had moved up


# States and batches


OPERATION = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 5)),
    st.tuples(st.just("remove"), st.integers(0, 7)),
    st.tuples(st.just("fork"), st.integers(0, 7)),
    st.tuples(st.just("step"), st.integers(1, 300)),
)


@every_runtime
@given(operations=st.lists(OPERATION, max_size=25))
@settings(max_examples=25)
def test_a_batch_behaves_as_a_list_of_streams(kind: str, operations: list[tuple[str, int]]) -> None:
    """Against a list of states that are stepped one by one, to the last bit."""
    runtime = small(kind)
    prepared = [runtime.prefill(random_tokens(4 + 9 * n, n))[1] for n in range(6)]
    batch, model = runtime.new_batch(), list[EmbeddedState]()
    for kind, value in operations:
        if kind == "append" and len(model) < runtime.max_batch:
            assert batch.append(prepared[value]) == len(model)
            model.append(prepared[value])
        elif kind == "remove" and value < len(model):
            batch.remove(value)
            model[value] = model[-1]
            model.pop()
        elif kind == "fork" and value < len(model) < runtime.max_batch:
            assert batch.append(batch.read(value)) == len(model)
            model.append(model[value])
        elif kind == "step" and model:
            fed = [value % 300 + 1 + row for row in range(len(model))]
            logits = runtime.step(np.array(fed), batch).copy()
            for row, state in enumerate(model):
                expected, model[row] = decode(runtime, state, [fed[row]])
                assert np.array_equal(logits[row], expected[0])
        assert len(batch) == len(model)
        assert all(bits(batch.read(row)) == bits(state) for row, state in enumerate(model))


@every_runtime
def test_a_state_once_handed_out_never_changes(kind: str) -> None:
    runtime = small(kind)
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


@every_runtime
def test_a_forked_story_goes_on_as_the_one_it_was_forked_from(kind: str) -> None:
    runtime = small(kind)
    tokens = random_tokens(60, 6)
    whole, _ = decode(runtime, runtime.empty, tokens)
    _, middle = decode(runtime, runtime.empty, tokens[:33])
    rest, _ = decode(runtime, middle, tokens[33:])
    assert np.array_equal(rest, whole[33:])


@every_runtime
def test_a_state_has_the_same_size_however_long_the_story(kind: str) -> None:
    runtime = small(kind)
    sizes = {runtime.prefill(random_tokens(length, 0))[1].nbytes for length in (1, 2, 25, 200)}
    assert sizes == {runtime.empty.nbytes}


@every_runtime
def test_a_batch_has_the_room_that_was_asked_for_and_no_more(kind: str) -> None:
    runtime = small(kind)
    batch = runtime.new_batch()
    for _ in range(runtime.max_batch):
        batch.append(runtime.empty)
    with pytest.raises(IndexError, match="at most 8 streams"):
        batch.append(runtime.empty)
    for row in (-1, 8):
        with pytest.raises(IndexError, match="row must be below 8"):
            batch.remove(row)
        with pytest.raises(IndexError, match="row must be below 8"):
            batch.read(row)


@every_runtime
def test_tokens_must_be_as_many_as_streams(kind: str) -> None:
    runtime = small(kind)
    batch = runtime.new_batch()
    assert runtime.step(np.zeros(0, np.int64), batch).shape == (0, SMALL.vocab_size)
    batch.append(runtime.empty)
    batch.append(runtime.empty)
    for tokens in (np.array([3]), np.array([3, 4, 5])):
        with pytest.raises(ValueError, match="one token for each of 2 streams"):
            runtime.step(tokens, batch)
    with pytest.raises(ValueError, match="at least one token"):
        runtime.prefill([])
