"""Quantising and packing: what is lost, and that each number lies where the kernels look for it."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from model.architecture.folder import read_weights
from model.errors import ModelError
from model.runtimes.native.library import Matrix, PackedNetwork, quantize_matrix, unsuitable
from tests.model.small_model import SMALL, small_folder


def small_weights() -> dict[str, Any]:
    return read_weights(small_folder() / "model.safetensors")


@given(
    weight=arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 200)),
        elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
        fill=st.just(0.0),
    )
)
def test_a_weight_comes_back_within_half_a_step_of_its_block(weight: np.ndarray) -> None:
    levels, scale = quantize_matrix(weight)
    outputs, inputs = weight.shape
    assert levels.dtype == np.int8
    assert scale.dtype == np.float32
    assert levels.shape == (outputs, -(-inputs // 64), 64)
    assert scale.shape == levels.shape[:2]
    back = (levels.astype(np.float64) * scale[..., None]).reshape(outputs, -1)
    step = np.repeat(scale.astype(np.float64), 64, axis=1)[:, :inputs]
    # Beside half a step, the rounding of the scale itself, 127 levels away; and scales too small for fp32.
    assert (np.abs(back[:, :inputs] - weight) <= step * (0.5 + 127 * 2.0**-23) + 1e-36).all()
    assert (back[:, inputs:] == 0).all()  # what fills the last block
    assert levels.min() >= -127  # symmetric


def test_a_block_of_zeros_stays_exactly_zero_and_costs_its_neighbours_nothing() -> None:
    weight = np.zeros((2, 192), np.float32)
    weight[0, 64:128] = np.linspace(-1, 1, 64)
    weight[1, 134] = 1000.0
    levels, scale = quantize_matrix(weight)
    assert np.isfinite(scale).all()
    assert (scale == 0).tolist() == [[True, False, True], [True, True, False]]
    assert (levels[scale == 0] == 0).all()
    assert (levels[0, 1, 0], levels[0, 1, -1]) == (-127, 127)
    assert levels[1, 2].tolist() == [127 if place == 6 else 0 for place in range(64)]


def array_at(address: int, kind: Any, *shape: int) -> np.ndarray:
    pointer = ctypes.cast(address, ctypes.POINTER(np.ctypeslib.as_ctypes_type(kind)))
    return np.ctypeslib.as_array(pointer, shape=shape)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 64), (21, 64), (48, 200)])
def test_each_number_lies_where_the_kernels_look_for_it(outputs: int, inputs: int, positive: bool) -> None:
    packed = PackedNetwork(SMALL, small_weights(), "a file")
    weight = np.random.default_rng(1).standard_normal((outputs, inputs)).astype(np.float32)
    matrix: Matrix = packed.pack(weight, positive=positive)
    levels, scale = quantize_matrix(weight)
    groups, blocks = -(-outputs // 16), -(-inputs // 64)
    assert (matrix.outputs, matrix.inputs, matrix.blocks) == (outputs, inputs, blocks)
    found = array_at(matrix.levels, np.int8, groups, blocks * 16, 16, 4)
    scales = array_at(matrix.scale, np.float32, groups, blocks, 16)
    starts = array_at(matrix.start, np.int32, groups, blocks, 16)
    for output in range(groups * 16):
        for block in range(blocks):
            place = (output // 16, block, output % 16)
            held = found[output // 16, block * 16 : block * 16 + 16, output % 16].reshape(-1)
            expected = levels[output, block] if output < outputs else np.zeros(64)
            assert np.array_equal(held, expected)
            assert scales[place] == (scale[output, block] if output < outputs else 0)
            assert starts[place] == (0 if positive else -128 * expected.astype(int).sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.up.weight": None}, "a file has no blocks.0.up.weight"),
        ({"blocks.1.mixer.gain": np.ones((3, 1))}, r"gain has the shape \(3, 1\), config.json asks for \(2, 1\)"),
        ({"embedding.weight": np.full((384, 64), np.inf)}, "embedding.weight holds a value that is not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    weights = {name: value for name, value in {**small_weights(), **change}.items() if value is not None}
    with pytest.raises(ModelError, match=message):
        PackedNetwork(SMALL, weights, "a file")


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({}, None),
        ({"width": 60}, "width must be a multiple of 8, got 60"),
        ({"head_dim": 24}, "head_dim must be a multiple of 16, got 24"),
        ({"head_dim": 272}, "head_dim must be at most 256, got 272"),
        ({"window": 10}, "window must be a multiple of 8, got 10"),
    ],
)
def test_sizes_that_the_decoder_cannot_run_are_refused(sizes: dict[str, Any], reason: str | None) -> None:
    config = dataclasses.replace(SMALL, **sizes)
    assert unsuitable(config) == reason
    if reason is not None:
        with pytest.raises(ModelError, match=reason):
            PackedNetwork(config, small_weights(), "a file")
