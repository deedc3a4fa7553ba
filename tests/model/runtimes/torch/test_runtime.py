"""What is PyTorch's alone: launches of sizes that agree to the last bit, the memory that batches share, devices.

What every runtime must do is tested in test_logits.py and test_batches.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

import model.runtimes.torch.runtime
from model.architecture.folder import ModelConfig
from model.errors import ModelError
from model.runtimes.torch.forward import NetworkWeights, StepBuffers
from model.runtimes.torch.runtime import TorchRuntime, find_device
from tests.model.runtimes.shared import (
    LIMITS,
    arrays_of,
    check_batch_invariance,
    decode,
    network_in,
    poisoned,
    random_tokens,
    read,
    small,
    worst,
)
from tests.model.runtimes.torch.tape import Tapes
from tests.model.small_model import SMALL, random_network, small_folder

# Batches


Step = Callable[[NetworkWeights, StepBuffers, int, int], None]


def uneven(spoilt: Callable[[int, int], bool]) -> Step:
    """A step without matrix products, whose bits depend on (rows of the launch, row) where `spoilt` says so.

    It stands in for the real one since which kernels disagree, and where, depends on the processor.
    """

    def step(weights: NetworkWeights, buffers: StepBuffers, first: int, rows: int) -> None:
        token_B, memory_B = (buffers.feed_2B[0, first : first + rows], buffers.memory_RBHNP[0, first : first + rows])
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
def test_launches_are_of_sizes_that_agree_to_the_last_bit(
    spoilt: Callable[[int, int], bool], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.runtimes.torch.runtime, "decode_step", uneven(spoilt))
    runtime = TorchRuntime(network_in(small_folder()), max_batch=11)
    assert runtime.sizes == sizes
    assert max(check_batch_invariance(runtime, streams=11, steps=5, seed=2)) == 11


def test_a_state_holds_no_more_memory_than_it_needs() -> None:
    runtime = small("torch")
    states = [runtime.prefill(random_tokens(length, 0))[1] for length in (1, 2, 25, 200)]
    batch = runtime.new_batch()
    batch.append(states[0])
    for state in (*states, read(batch, 0)):
        for part in arrays_of(state).values():
            assert part.untyped_storage().nbytes() == part.nbytes


def test_two_batches_that_live_at_once_share_no_memory() -> None:
    runtime = small("torch")
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
    runtime = TorchRuntime(network_in(small_folder()), max_batch=6, recorder=tapes)
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


# The network


def test_a_step_is_the_networks_own_step() -> None:
    network, runtime = network_in(small_folder()), small("torch")
    stories = np.array([random_tokens(60, seed) for seed in range(5)])
    state, batch = network.initial_state(5), runtime.new_batch()
    for _ in stories:
        batch.append(runtime.empty)
    for fed in stories.T:
        with torch.no_grad():
            expected, state = network.step(torch.from_numpy(fed), state)
        assert worst(runtime.step(fed, batch), expected.numpy()) <= LIMITS["torch"]


@pytest.mark.parametrize(
    "config",
    [dataclasses.replace(SMALL, conv_width=1), dataclasses.replace(SMALL, window=100, heads=3, head_dim=20)],
    ids=["no convolution", "odd sizes"],
)
def test_other_shapes_give_the_networks_logits(config: ModelConfig) -> None:
    network = random_network(config)
    runtime, tokens = TorchRuntime(network), random_tokens(130, 9)
    expected = network(torch.tensor([tokens]))[0].detach().numpy()
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
    with pytest.raises(ModelError, match=r"device cuda is not there: (no GPU answers|torch .* is built without)"):
        find_device("cuda")
