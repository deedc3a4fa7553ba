"""An export is accepted only if it is the network: graphs that are almost it are built here, and refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from model.architecture.folder import PRECISIONS
from model.architecture.network import StoryNetwork, load_network
from model.architecture.tokenizer import StoryTokenizer
from model.errors import ModelError
from model.runtimes.onnx.runtime import OnnxRuntime
from tests.model.small_model import SMALL, copy_of, small_folder, small_tokenizer, story_tokens
from training.export.export import BATCHES, LIMITS, PREFILL, STEPS, accept, reference_logits
from training.export.graph import WeightFile, build_graph


@cache
def network() -> StoryNetwork:
    return load_network(small_folder())


@cache
def stories() -> list[list[int]]:
    return story_tokens(StoryTokenizer.load(small_tokenizer()), 4)


def runtime_with(changes: dict[str, tuple[tuple[int, ...], float]], precision: str, folder: Path) -> OnnxRuntime:
    """A graph of the small model's weights, single ones of which (name: place, value) are changed."""
    folder = copy_of(small_folder(), folder)
    path = folder / "model.safetensors"
    source, content = WeightFile.read(path), bytearray(path.read_bytes())
    for name, (place, value) in changes.items():
        tensor = source.tensors[name]
        tensor[place] = value
        offset, length = source.spans[name]
        content[offset : offset + length] = tensor.tobytes()
    path.write_bytes(content)
    graph = folder / "changed.onnx"
    graph.write_bytes(build_graph(SMALL, source, precision).SerializeToString())
    return OnnxRuntime(graph, SMALL, max_batch=3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_exported_graph_is_accepted_with_its_largest_difference_at_each_batch_size(precision: str) -> None:
    runtime = OnnxRuntime(small_folder() / f"decode.{precision}.onnx", SMALL, max_batch=64)
    accepted = accept(network(), runtime, precision, stories())
    assert accepted.precision == precision
    assert tuple(accepted.largest) == BATCHES == (1, 2, 3, 8, 16, 32, 64)
    assert all(0 < off <= LIMITS[precision] for off in accepted.largest.values())
    if precision == "int8":
        assert max(accepted.largest.values()) > 1e-3  # else it would not be int8 that ran
    cut = [story[: PREFILL + STEPS] for story in stories()]
    assert accepted.spread == pytest.approx(np.std(np.concatenate(reference_logits(network(), cut))))


def test_only_batches_that_the_runtime_has_capacity_for_are_tried() -> None:
    runtime = OnnxRuntime(small_folder() / "decode.fp32.onnx", SMALL, max_batch=9)
    assert tuple(accept(network(), runtime, "fp32", stories()).largest) == (1, 2, 3, 8)


def test_the_rebuilt_graph_without_a_change_is_accepted(tmp_path: Path) -> None:
    """So that what is refused below is refused for its change."""
    for precision in PRECISIONS:
        accept(network(), runtime_with({}, precision, tmp_path / precision), precision, stories())


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks.0.up.weight": ((3, 4), 1.0)},
        {"blocks.1.mixer.gain": ((0, 0), 2.5)},
        {"blocks.2.mixer.conv": ((0, 7), 1.5)},
        {"blocks.0.mixer.log_decay": ((1,), 1.0)},
    ],
    ids=["a weight of the MLP", "attention's gain", "a tap of the convolution", "a decay"],
)
def test_a_graph_with_a_single_other_weight_is_refused(
    changes: dict[str, tuple[tuple[int, ...], float]], tmp_path: Path
) -> None:
    runtime = runtime_with(changes, "fp32", tmp_path / "model")
    with pytest.raises(ModelError, match=r"fp32 runtime is not the network: at batch 1 a logit is off by \d.*0\.001"):
        accept(network(), runtime, "fp32", stories())


def test_an_int8_graph_of_another_network_is_refused(tmp_path: Path) -> None:
    changes = {"blocks.3.down.weight": ((slice(0, 64), slice(0, 64)), 0.5)}
    runtime = runtime_with(changes, "int8", tmp_path / "model")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="int8 runtime is not the network: at batch 1 a logit is off by"):
        accept(network(), runtime, "int8", stories())


def test_a_graph_with_one_nan_is_refused_and_reported_as_such(tmp_path: Path) -> None:
    runtime = runtime_with({"blocks.1.mixer.output.weight": ((5, 6), np.nan)}, "fp32", tmp_path / "model")
    with pytest.raises(ModelError, match="fp32 runtime is not the network: at batch 1 a logit is not finite"):
        accept(network(), runtime, "fp32", stories())


def test_a_fault_of_one_row_of_one_batch_size_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel that is wrong for many rows only would show: one NaN, in the last row of 16."""
    runtime = OnnxRuntime(small_folder() / "decode.fp32.onnx", SMALL, max_batch=16)
    step = runtime.step

    def faulty(tokens: np.ndarray, batch: object) -> np.ndarray:
        logits = step(tokens, batch).copy()  # type: ignore[arg-type]
        if len(logits) == 16:
            logits[15, 7] = np.nan
        return logits

    monkeypatch.setattr(runtime, "step", faulty)
    with pytest.raises(ModelError, match="at batch 16 a logit is not finite"):
        accept(network(), runtime, "fp32", stories())


def test_a_network_that_is_not_finite_itself_is_reported_so() -> None:
    broken = load_network(small_folder())
    with torch.no_grad():
        broken.get_parameter("blocks.0.up.weight")[0, 0] = torch.nan
    runtime = OnnxRuntime(small_folder() / "decode.fp32.onnx", SMALL, max_batch=1)
    with pytest.raises(ModelError, match="the network itself gives logits that are not finite"):
        accept(broken, runtime, "fp32", stories())


def test_stories_that_prove_nothing_are_refused() -> None:
    runtime = OnnxRuntime(small_folder() / "decode.fp32.onnx", SMALL, max_batch=1)
    for unusable in ([], [[0, 5, 6]], [story[1:] for story in stories()]):
        with pytest.raises(ModelError, match="acceptance needs stories of at least 48 tokens"):
            accept(network(), runtime, "fp32", unusable)
