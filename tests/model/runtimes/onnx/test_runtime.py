"""What is ONNX Runtime's alone: kernels that sum one row otherwise, rotary angles from outside, damaged graphs.

What every runtime must do is tested in test_logits.py and test_batches.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import training.export.graph
from model.architecture.folder import PRECISIONS, PRETRAINED, ModelFolder
from model.errors import ModelError
from model.runtimes.onnx.runtime import OnnxRuntime, OnnxState
from tests.model.runtimes.shared import check_batch_invariance, decode, load_kind, random_tokens, shipped, small, worst
from tests.model.runtimes.test_logits import long_story
from tests.model.small_model import SMALL, copy_of, small_folder
from training.export.graph import WeightFile, build_graph


@pytest.mark.parametrize("block", [16, 32, 128])
def test_batch_composition_does_not_show_where_kernels_sum_one_row_otherwise(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With int8 blocks of 128 it did, on a processor with AVX-512: rows are then computed in pairs."""
    monkeypatch.setattr(training.export.graph, "BLOCK", block)
    folder = copy_of(PRETRAINED, tmp_path / "model")
    config = ModelFolder.open(folder).config
    path = folder / "other.onnx"
    path.write_bytes(build_graph(config, WeightFile.read(folder / "model.safetensors"), "int8").SerializeToString())
    check_batch_invariance(OnnxRuntime(path, config, max_batch=5), streams=5, steps=3, seed=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_that_nobody_reads_change_no_bit(precision: str) -> None:
    plain = small(precision)
    padded = load_kind(precision, ModelFolder.open(small_folder()), 5)
    assert isinstance(padded, OnnxRuntime)
    padded.tile = 4 * plain.tile
    padded._allocate(-(-padded.max_batch // padded.tile) * padded.tile)
    states = [plain.prefill(random_tokens(30 + stream, stream))[1] for stream in range(5)]
    batches = plain.new_batch(), padded.new_batch()
    for step in range(20):
        for batch in batches:
            if step % 4 == 0:
                batch.append(states[step // 4])
            if step == 9:
                batch.remove(0)
        fed = np.arange(1, len(batches[0]) + 1) * 7
        assert np.array_equal(plain.step(fed, batches[0]), padded.step(fed, batches[1]))
    batches[1].append(states[0])
    with pytest.raises(IndexError, match="at most 5"):
        batches[1].append(states[0])


def test_int8_is_another_computation_than_fp32() -> None:
    tokens = random_tokens(40, 0)
    assert not np.array_equal(small("int8").prefill(tokens)[0], small("fp32").prefill(tokens)[0])


def moved(state: OnnxState, by: int, runtime: OnnxRuntime) -> OnnxState:
    """The state that the same story has `by` tokens later: every key turned on, by the rotary angle of `by`."""
    config = runtime.config
    assert by % config.window == 0, "else the tokens would stand at other places of the ring"
    half = config.head_dim // 2
    angle = by * config.rope_base ** (-np.arange(half) / half)
    ring = state.ring.copy()
    keys = state.ring[0::2].astype(np.float64)  # keys and values of each layer take turns
    left, right = keys[..., :half], keys[..., half:]
    ring[0::2, :, :half] = left * np.cos(angle) - right * np.sin(angle)
    ring[0::2, :, half:] = right * np.cos(angle) + left * np.sin(angle)
    return dataclasses.replace(state, position=state.position + by, ring=ring)


@pytest.mark.parametrize("far", [10_240, 1_024_000])
def test_only_distances_matter_at_a_far_token_on_shipped_weights(far: int) -> None:
    runtime, story = shipped("fp32"), long_story()[0]
    _, state = runtime.prefill(story[:300])
    near, _ = decode(runtime, state, story[300:312])
    late, end = decode(runtime, moved(state, far, runtime), story[300:312])
    assert end.position == far + 312
    assert worst(late, near) <= 1e-3
    wrong = dataclasses.replace(state, position=state.position + far)  # keys not turned: this must show
    assert worst(decode(runtime, wrong, story[300:312])[0], near) > 1e-2


# Bad use


def test_a_graph_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    damaged = copy_of(small_folder(), tmp_path / "model") / "decode.int8.onnx"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    for path in (tmp_path / "none.onnx", damaged):
        with pytest.raises(ModelError, match=rf"{path.name} cannot be loaded: .") as caught:
            OnnxRuntime(path, SMALL)
        assert "\n" not in str(caught.value)


def test_a_graph_without_its_weights_file_is_named(tmp_path: Path) -> None:
    folder = copy_of(small_folder(), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    for precision in PRECISIONS:
        with pytest.raises(ModelError, match=rf"decode\.{precision}\.onnx cannot be loaded"):
            OnnxRuntime(folder / f"decode.{precision}.onnx", SMALL)
