"""Runtimes that tests share, each loaded once: over the shipped folder and over the small model's.

`native` is the decoder in C, `int8` and `fp32` are the exported graphs under ONNX Runtime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch

from model.architecture.checkpoint import load_network, save_network
from model.architecture.config import ModelConfig
from model.architecture.folder import PRECISIONS, PRETRAINED, ModelFolder, compute_digest
from model.architecture.network import END_OF_STORY_ID, StoryNetwork
from model.engine.load import load_runtime, why_not_native
from model.runtimes.native.runtime import NativeRuntime, NativeState
from model.runtimes.onnx.runtime import OnnxRuntime, OnnxState
from model.runtimes.protocol import Logits
from tests.model.small_model import SMALL, random_network, small_folder, small_tokenizer, workplace
from training.export import acceptance
from training.export.graph import WeightFile, build_graph

NOT_NATIVE = why_not_native(SMALL, "int8")
needs_native = pytest.mark.skipif(NOT_NATIVE is not None, reason=f"the native runtime: {NOT_NATIVE}")
KINDS = ("native", *PRECISIONS)
LIMITS = {"native": acceptance.LIMITS["int8"], **acceptance.LIMITS}
both_precisions = pytest.mark.parametrize("precision", PRECISIONS)
every_runtime = pytest.mark.parametrize("kind", [pytest.param("native", marks=needs_native), *PRECISIONS])

EmbeddedState = NativeState | OnnxState


def load_kind(kind: str, folder: ModelFolder, slots: int) -> NativeRuntime | OnnxRuntime:
    """A new runtime of one of `KINDS`."""
    if kind == "native":
        return cast(NativeRuntime, load_runtime(folder, slots=slots, runtime="native"))
    return cast(OnnxRuntime, load_runtime(folder, slots=slots, precision=kind, runtime="onnx"))


@cache
def shipped(kind: str) -> Any:
    return load_kind(kind, ModelFolder.open(PRETRAINED), max(acceptance.BATCHES))


@cache
def small(kind: str) -> Any:
    return load_kind(kind, ModelFolder.open(small_folder()), 8)


def parts_of(state: EmbeddedState) -> dict[str, npt.NDArray[np.float32]]:
    """All that a state holds beside its position."""
    if isinstance(state, NativeState):
        return {"memory": state.memory}
    return {"conv": state.conv, "memory": state.memory, "ring": state.ring}


def bits(state: EmbeddedState) -> tuple[int, tuple[bytes, ...]]:
    """All of a state, to be compared to the last bit."""
    return state.position, tuple(part.tobytes() for part in parts_of(state).values())


def random_tokens(count: int, seed: int, vocab_size: int = SMALL.vocab_size) -> list[int]:
    """A story's beginning of `count` tokens: the end of story, then anything else."""
    rng = np.random.default_rng(seed)
    return [END_OF_STORY_ID, *map(int, rng.integers(1, vocab_size, count - 1))]


def decode(runtime: Any, state: Any, tokens: Sequence[int]) -> tuple[Logits, Any]:
    """One stream alone, token by token: logits (T, V) and the last state."""
    batch = runtime.new_batch()
    batch.append(state)
    logits = [runtime.step(np.array([token]), batch)[0].copy() for token in tokens]
    return np.array(logits), batch.read(0)


@cache
def network_in(folder: Path) -> StoryNetwork:
    return load_network(folder)


def torch_logits(folder: Path, tokens: Sequence[Sequence[int]]) -> Logits:
    """(B, T, V) of equally long rows, by the parallel form in fp32."""
    with torch.no_grad():
        return network_in(folder)(torch.tensor([list(row) for row in tokens])).numpy()  # type: ignore[no-any-return]


def worst(ours: Logits, theirs: Logits) -> float:
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max())


@cache
def random_folder(config: ModelConfig) -> Path:
    """A checkpoint of random weights, for a shape that no other here has, with both graphs beside it."""
    folder = Path(tempfile.mkdtemp(dir=workplace()))
    save_network(random_network(config), folder, tokenizer=small_tokenizer(), notes={}, dtype=torch.float16)
    source = WeightFile.read(folder / "model.safetensors")
    for precision in PRECISIONS:
        graph = build_graph(config, source, precision)
        (folder / f"decode.{precision}.onnx").write_bytes(graph.SerializeToString())
    (folder / "digest").write_text(compute_digest(folder), "ascii")
    return folder
