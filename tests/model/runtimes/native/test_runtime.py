"""The decoder in C: its products against exact sums, its paths against each other, its stories against numpy.

What every runtime must do is tested in test_logits.py and test_batches.py.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.architecture.folder import PRETRAINED, ModelFolder, read_weights
from model.architecture.network import load_network
from model.architecture.tokenizer import StoryTokenizer
from model.errors import ModelError
from model.runtimes.native.library import paths
from model.runtimes.native.runtime import NativeRuntime, NativeState
from model.runtimes.protocol import Logits
from tests.model.runtimes.native.reference import Reference, product
from tests.model.runtimes.shared import bits, decode, needs_native, random_tokens, read, shipped, small
from tests.model.small_model import SMALL, small_folder, story_tokens
from training.export.export import BATCHES, accept

pytestmark = needs_native


@cache
def by_path(name: str) -> NativeRuntime:
    """The shipped model by one path."""
    folder = ModelFolder.open(PRETRAINED)
    return NativeRuntime(folder.weights, folder.config, max_batch=32, path_name=name)


# Products


@given(rows=st.integers(1, 40), outputs=st.integers(1, 70), positive=st.booleans(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_on_every_path_sums_of_whole_numbers_are_exact(rows: int, outputs: int, positive: bool, seed: int) -> None:
    """With scales of one, a product of one block is its sum of whole numbers: up to 64 x 127 x 255, no saturation."""
    rng = np.random.default_rng(seed)
    most = 255 if positive else 127
    weight = rng.integers(-127, 128, (outputs, 64))
    x = rng.integers(0 if positive else -most, most + 1, (rows, 64))
    extremes = rng.random((rows, 64)) < rng.random()
    x = np.where(extremes, np.where(positive | (x > 0), most, -most), x)
    weight[:, 0], x[:, 0] = 127, most  # so that both scales are one
    runtime: NativeRuntime = small("native")
    matrix = runtime.packed.pack(weight.astype(np.float32), positive=positive)
    expected = x @ weight.T
    for name in paths():
        assert np.array_equal(runtime.product(matrix, x.astype(np.float32), name), expected), name


@given(
    rows=st.integers(1, 9),
    outputs=st.integers(1, 50),
    inputs=st.integers(1, 200),
    positive=st.booleans(),
    size=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_a_product_is_that_of_numpy_and_has_the_same_bits_on_every_path_and_among_any_rows(
    rows: int, outputs: int, inputs: int, positive: bool, size: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    x = (rng.standard_normal((rows, inputs)) * size).astype(np.float32)
    x[rng.random(rows) < 0.1] = 0
    x = np.abs(x) if positive else x
    runtime: NativeRuntime = small("native")
    matrix = runtime.packed.pack(weight, positive=positive)
    found = {name: runtime.product(matrix, x, name) for name in paths()}
    one = next(iter(found.values()))
    assert all(np.array_equal(other, one) for other in found.values())
    alone = np.concatenate([runtime.product(matrix, row[None], runtime.path) for row in x])
    assert np.array_equal(alone, one)
    expected = np.array([product(weight, row, 255 if positive else 127) for row in x])
    assert one == pytest.approx(expected, rel=1e-5, abs=1e-4 * size * inputs**0.5)


@pytest.mark.parametrize("sick", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_not_hidden_by_a_whole_one(sick: float) -> None:
    runtime: NativeRuntime = small("native")
    matrix = runtime.packed.pack(np.ones((20, 100), np.float32), positive=False)
    x = np.ones((3, 100), np.float32)
    x[1, 70] = sick
    for name in paths():
        found = runtime.product(matrix, x, name)
        assert np.isnan(found[1]).all()
        assert np.isfinite(found[[0, 2]]).all()


# Whole stories


def test_the_small_model_computes_what_the_reference_in_numpy_does() -> None:
    tokens = [*random_tokens(60, 1), *random_tokens(20, 2)]  # the window turns twice, a story ends inside
    reference = Reference(SMALL, read_weights(small_folder() / "model.safetensors"))
    expected = np.array([reference.step(token) for token in tokens])
    found, _ = decode(small("native"), small("native").empty, tokens)
    gap = np.abs(found - expected)
    assert np.median(gap) < 1e-5  # nearly all is equal; a rounding that tips shows in the logits that follow
    assert gap.max() < 0.1


def test_the_shipped_model_computes_what_the_reference_in_numpy_does() -> None:
    story = story_tokens(StoryTokenizer.load(PRETRAINED), 1)[0][:24]
    folder = ModelFolder.open(PRETRAINED)
    reference = Reference(folder.config, read_weights(folder.weights))
    expected = np.array([reference.step(token) for token in story])
    found, _ = decode(shipped("native"), shipped("native").empty, story)
    gap = np.abs(found - expected)
    assert np.median(gap) < 0.02
    assert gap.max() < 0.3


def test_every_path_gives_a_story_the_same_bits() -> None:
    story = story_tokens(StoryTokenizer.load(PRETRAINED), 1)[0][:60]
    results = []
    for name in paths():
        runtime = by_path(name)
        first, state = runtime.prefill(story[:50])
        then, last = decode(runtime, state, story[50:])
        results.append((first.tobytes(), then.tobytes(), bits(last)))
    assert len(results) == len(paths()) >= 1
    assert all(result == results[0] for result in results)


@given(cuts=st.lists(st.integers(1, 149), max_size=4), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_prefill_step_and_scoring_give_the_same_bits_wherever_they_are_cut(cuts: list[int], seed: int) -> None:
    runtime: NativeRuntime = small("native")
    tokens = random_tokens(150, seed)
    whole, end = decode(runtime, runtime.empty, tokens)
    state: NativeState | None = None
    edges = [0, *sorted(set(cuts)), 150]
    for first, last in pairwise(edges):
        logits, state = runtime.prefill(tokens[first:last], state)
        assert np.array_equal(logits, whole[last - 1])
    assert state is not None
    assert bits(state) == bits(end)
    scored = np.concatenate([logits[1] for _, logits in runtime.score([tokens[:30], tokens])])
    assert np.array_equal(scored, whole)


def test_it_is_accepted_at_every_batch_size_on_trained_weights() -> None:
    stories = story_tokens(StoryTokenizer.load(PRETRAINED), 8)
    accepted = accept(load_network(PRETRAINED), shipped("native"), "int8", stories)
    assert tuple(accepted.largest) == BATCHES
    assert 1e-3 < max(accepted.largest.values()) < 0.6


def test_memories_that_fade_below_the_smallest_normal_number_become_zero_and_nothing_else() -> None:
    runtime: NativeRuntime = small("native")
    _, state = runtime.prefill(random_tokens(20, 3))
    faint = NativeState(state.position, (state.memory * np.float32(1e-42)).astype(np.float32))
    assert (np.abs(faint.memory[faint.memory != 0]) < np.finfo(np.float32).tiny).any()
    logits, _ = decode(runtime, faint, [5, 6])
    assert np.isfinite(logits).all()
    # Numpy itself still has such numbers: the processor's mode is put back after each call.
    assert np.float32(1e-38) * np.float32(0.1) > 0


# Bad use


def test_tokens_outside_the_vocabulary_are_refused_and_change_nothing() -> None:
    runtime: NativeRuntime = small("native")
    _, state = runtime.prefill([0, 5, 6])
    batch = runtime.new_batch()
    batch.append(state)
    for token in (-1, SMALL.vocab_size):
        with pytest.raises(ValueError, match="tokens must be between 0 and 383"):
            runtime.step(np.array([token]), batch)
        with pytest.raises(ValueError, match="tokens must be between 0 and 383"):
            runtime.prefill([0, token], state)
    assert bits(read(batch, 0)) == bits(state)


def test_a_path_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match=r"path must be one of .*plain on this machine, got 'neon'"):
        NativeRuntime(small_folder() / "model.safetensors", SMALL, path_name="neon")


def test_a_path_that_computes_wrongly_on_this_machine_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Made wrong here by hand: no machine with such a fault is at hand."""
    real = NativeRuntime.product
    if len(paths()) == 1:
        pytest.skip("this processor runs the plain path only")
    best = next(iter(paths()))

    def faulty(self: NativeRuntime, matrix: Any, x: Logits, path_name: str) -> Logits:
        found = real(self, matrix, x, path_name)
        return cast(Logits, found + np.float32(1e-3)) if path_name == best else found

    monkeypatch.setattr(NativeRuntime, "product", faulty)
    runtime = NativeRuntime(small_folder() / "model.safetensors", SMALL)
    assert runtime.path == list(paths())[1]
    assert f"the native path {best} computes wrongly on this machine" in caplog.text
