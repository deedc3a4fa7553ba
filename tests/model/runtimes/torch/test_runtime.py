"""The PyTorch runtime, on the CPU, against the network and the ONNX graph, logit by logit.

What only trained weights can show is tested on the shipped ones; the rest on the small model.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.architecture.checkpoint import load_network
from model.architecture.config import ModelConfig
from model.architecture.folder import PRETRAINED
from model.architecture.network import END_OF_STORY_ID
from model.architecture.tokenizer import StoryTokenizer
from model.errors import ModelError
from model.runtimes.torch.runtime import PREFILL_CHUNK, TorchRuntime, find_device
from tests.model.all_runtimes import random_tokens, shipped
from tests.model.small_model import SMALL, random_network, story_tokens
from tests.model.torch_runtimes import (
    bits,
    decode,
    parallel_logits,
    shipped_torch,
    small_network,
    small_torch,
    worst,
)
from training.data.corpus import load_own_stories
from training.export.acceptance import BATCHES

BOUND = 2e-4
"""Largest difference of a logit; a fp32 runtime is accepted within 1e-3."""


def test_every_logit_at_every_batch_size_is_the_networks_and_the_graphs_on_shipped_weights() -> None:
    runtime, graph = shipped_torch(), shipped("fp32")
    stories = [tokens[:28] for tokens in story_tokens(StoryTokenizer.load(PRETRAINED), max(BATCHES))]
    expected = parallel_logits(load_network(PRETRAINED), stories)
    ours = [runtime.prefill(story[:20]) for story in stories]
    theirs = [graph.prefill(story[:20]) for story in stories]
    assert worst(np.array([logits for logits, _ in ours]), expected[:, 19]) <= BOUND
    assert (
        worst(np.array([logits for logits, _ in ours]), np.array([logits for logits, _ in theirs])) <= BOUND
    )
    off = {}
    for size in BATCHES:
        batch, other = runtime.new_batch(), graph.new_batch()
        for row in range(size):
            batch.append(ours[row][1])
            other.append(theirs[row][1])
        for place in range(20, 28 if size < 16 else 24):
            fed = np.array([story[place] for story in stories[:size]])
            logits = runtime.step(fed, batch)
            off[size, place] = max(
                worst(logits, expected[:size, place]), worst(logits, graph.step(fed, other))
            )
    assert {size for size, _ in off} == {1, 2, 3, 8, 16, 32, 64}
    assert max(off.values()) <= BOUND, off


def test_a_story_longer_than_the_window_gives_the_networks_logits_at_every_token() -> None:
    tokenizer = StoryTokenizer.load(PRETRAINED)
    text = "\n".join(story.text for story in load_own_stories("heldout")[:8])
    story = [END_OF_STORY_ID, *tokenizer.encode(text)][:600]
    expected = parallel_logits(load_network(PRETRAINED), [story])[0]
    runtime = shipped_torch()
    assert runtime.config.window == 256
    # Steps begin before the window is full for the first time; the prefill after them goes round once more.
    logits, state = runtime.prefill(story[:230])
    assert worst(logits, expected[229]) <= BOUND
    stepped, state = decode(runtime, state, story[230:300])
    assert worst(stepped, expected[230:300]) <= BOUND
    logits, state = runtime.prefill(story[300:560], state)
    assert worst(logits, expected[559]) <= BOUND
    stepped, state = decode(runtime, state, story[560:])
    assert worst(stepped, expected[560:]) <= BOUND
    assert state.position == 600


@given(
    first=st.integers(1, 150), second=st.integers(0, 150), steps=st.integers(0, 30), seed=st.integers(0, 99)
)
@settings(max_examples=15)
def test_prefill_whole_or_in_pieces_and_then_steps_give_the_networks_logits(
    first: int, second: int, steps: int, seed: int
) -> None:
    runtime, tokens = small_torch(), random_tokens(first + second + steps, seed)
    expected = parallel_logits(small_network(), [tokens])[0]
    logits, state = runtime.prefill(tokens[:first])
    assert worst(logits, expected[first - 1]) <= BOUND
    if second:
        logits, state = runtime.prefill(tokens[first : first + second], state)
        assert worst(logits, expected[first + second - 1]) <= BOUND
    assert state.position == first + second
    if steps:
        stepped, _ = decode(runtime, state, tokens[first + second :])
        assert worst(stepped, expected[first + second :]) <= BOUND


def test_a_step_is_the_networks_own_step() -> None:
    network, runtime = small_network(), small_torch()
    stories = np.array([random_tokens(60, seed) for seed in range(5)])
    state, batch = network.initial_state(5), runtime.new_batch()
    for _ in stories:
        batch.append(runtime.empty)
    for fed in stories.T:
        with torch.no_grad():
            expected, state = network.step(torch.from_numpy(fed), state)
        assert worst(runtime.step(fed, batch), expected.numpy()) <= BOUND


def test_a_cut_at_the_borders_of_pieces_changes_no_bit() -> None:
    runtime, tokens = small_torch(), random_tokens(3 * PREFILL_CHUNK + 5, seed=0)
    logits, state = runtime.prefill(tokens)
    _, half = runtime.prefill(tokens[: 2 * PREFILL_CHUNK])
    again, other = runtime.prefill(tokens[2 * PREFILL_CHUNK :], half)
    assert np.array_equal(logits, again)
    assert bits(state) == bits(other)


def test_the_end_of_a_story_inside_a_run_starts_anew_as_in_the_network() -> None:
    runtime = small_torch()
    tokens = [*random_tokens(70, 1), *random_tokens(9, 2), *random_tokens(30, 3)]
    expected = parallel_logits(small_network(), [tokens])[0]
    for cut in (40, 70, 75, 100):
        logits, state = runtime.prefill(tokens[:cut])
        assert worst(logits, expected[cut - 1]) <= BOUND
        stepped, end = decode(runtime, state, tokens[cut:])
        assert worst(stepped, expected[cut:]) <= BOUND
        assert end.position == 30


def test_ten_thousand_tokens_on_the_window_is_as_it_was() -> None:
    """A network of attention alone sees no further than its layers' windows, wherever it stands."""
    config = dataclasses.replace(SMALL, pattern="AA", window=16)
    runtime = TorchRuntime(random_network(config))
    seen = 2 * (config.window - 1) + 1
    tokens = random_tokens(10_050, seed=4)
    _, state = runtime.prefill(tokens[:10_000])
    late, _ = decode(runtime, state, tokens[10_000:])
    for place in (10_000, 10_049):
        alone, _ = runtime.prefill(tokens[place + 1 - seen : place + 1])
        assert worst(late[place - 10_000], alone) <= 1e-4


@pytest.mark.parametrize(
    "config",
    [
        *(dataclasses.replace(SMALL, pattern=pattern) for pattern in ("R", "A", "AAR")),
        dataclasses.replace(SMALL, conv_width=1),
        dataclasses.replace(SMALL, window=100, heads=3, head_dim=20),
    ],
    ids=["R", "A", "AAR", "no convolution", "odd sizes"],
)
def test_other_shapes_give_the_networks_logits(config: ModelConfig) -> None:
    network = random_network(config)
    runtime, tokens = TorchRuntime(network), random_tokens(130, 9)
    expected = parallel_logits(network, [tokens])[0]
    logits, state = runtime.prefill(tokens[:70])
    stepped, _ = decode(runtime, state, tokens[70:])
    assert worst(np.concatenate([logits[None], stepped]), expected[69:]) <= 1e-3


def test_a_network_that_is_trained_on_does_not_change_its_runtime() -> None:
    network = random_network(SMALL)
    runtime, tokens = TorchRuntime(network), random_tokens(20, 0)
    before = runtime.prefill(tokens)[0].copy()
    with torch.no_grad():
        for value in network.parameters():
            value.mul_(2)
    assert np.array_equal(runtime.prefill(tokens)[0], before)
    assert not np.array_equal(TorchRuntime(network).prefill(tokens)[0], before)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match="device must be cpu or cuda, got 'tpu'"):
        find_device("tpu")
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused_in_one_line() -> None:
    with pytest.raises(
        ModelError, match=r"device cuda is not there: (no GPU answers|torch .* is built without)"
    ):
        find_device("cuda")


def test_prefill_needs_a_token() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        small_torch().prefill([])
