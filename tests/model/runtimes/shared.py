"""Runtimes that tests share, each loaded once over the shipped and over the small model's folder, and what drives them.

`native` is the decoder in C, `int8` and `fp32` are the exported graphs under ONNX Runtime, `torch` is PyTorch on a CPU.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.architecture.folder import END_ID, PRECISIONS, PRETRAINED, ModelConfig, ModelFolder, compute_digest
from model.architecture.network import StoryNetwork, load_network, save_network
from model.engine.load import load_runtime, load_torch_runtime, why_not_native
from model.runtimes.native.runtime import NativeBatch, NativeState
from model.runtimes.onnx.runtime import OnnxBatch, OnnxState
from model.runtimes.protocol import Logits
from model.runtimes.torch.forward import TorchState
from tests.model.small_model import SMALL, random_network, small_folder, small_tokenizer
from tests.once import shared_folder
from training.export.export import BATCHES
from training.export.export import LIMITS as ACCEPTED
from training.export.graph import WeightFile, build_graph

NOT_NATIVE = why_not_native(SMALL, "int8")
needs_native = pytest.mark.skipif(NOT_NATIVE is not None, reason=f"the native runtime: {NOT_NATIVE}")
EMBEDDED = [pytest.param("native", marks=needs_native), *PRECISIONS]
LIMITS = {"native": ACCEPTED["int8"], "torch": 2e-4, **ACCEPTED}
"""Largest difference of a logit from the network's."""


def load_kind(kind: str, folder: ModelFolder, slots: int) -> Any:
    """A new runtime of a kind."""
    if kind == "torch":
        return load_torch_runtime(folder, slots=slots, device="cpu")
    if kind == "native":
        return load_runtime(folder, slots=slots, runtime="native")
    return load_runtime(folder, slots=slots, precision=kind, runtime="onnx")


@cache
def shipped(kind: str) -> Any:
    """A runtime of a kind over the shipped weights."""
    return load_kind(kind, ModelFolder.open(PRETRAINED), max(BATCHES))


@cache
def small(kind: str) -> Any:
    """A runtime of a kind over the small model, for 8 streams."""
    return load_kind(kind, ModelFolder.open(small_folder()), 8)


@cache
def network_in(folder: Path) -> StoryNetwork:
    return load_network(folder)


def network_logits(folder: Path, tokens: Sequence[Sequence[int]]) -> Logits:
    """(B, T, V) of equally long rows, by the network's form for training, in fp32."""
    with torch.no_grad():
        return network_in(folder)(torch.tensor([list(row) for row in tokens])).numpy()  # type: ignore[no-any-return]


@cache
def random_folder(config: ModelConfig) -> Path:
    """A model folder of random weights, for a shape that no other here has."""
    folder = Path(tempfile.mkdtemp(dir=shared_folder()))
    save_network(random_network(config), folder, tokenizer=small_tokenizer(), notes={}, dtype=torch.float16)
    source = WeightFile.read(folder / "model.safetensors")
    for precision in PRECISIONS:
        graph = build_graph(config, source, precision)
        (folder / f"decode.{precision}.onnx").write_bytes(graph.SerializeToString())
    (folder / "digest").write_text(compute_digest(folder), "ascii")
    return folder


def random_tokens(count: int, seed: int, vocab_size: int = SMALL.vocab_size) -> list[int]:
    """A story's beginning of `count` tokens: the end of story, then anything else."""
    rng = np.random.default_rng(seed)
    return [END_ID, *map(int, rng.integers(1, vocab_size, count - 1))]


def read(batch: Any, row: int) -> Any:
    """A copy of the state in one row of any runtime's batch, which `append` and `prefill` accept."""
    if isinstance(batch, NativeBatch):
        return NativeState(int(batch.position[row]), batch.memory[row].copy())
    if isinstance(batch, OnnxBatch):
        parts = (batch.conv[batch.now], batch.memory[batch.now], batch.ring)
        return OnnxState(int(batch.position[row]), *(part[:, row].copy() for part in parts))
    return TorchState(int(batch._position_B[row]), *(part[:, row].clone() for part in batch._states))


def decode(runtime: Any, state: Any, tokens: Sequence[int]) -> tuple[Logits, Any]:
    """One stream alone, token by token: logits (T, V) and the last state."""
    batch = runtime.new_batch()
    batch.append(state)
    logits = [runtime.step(np.array([token]), batch)[0].copy() for token in tokens]
    return np.array(logits), read(batch, 0)


def worst(ours: Logits, theirs: Logits) -> float:
    """The largest difference; all must be finite."""
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max())


def arrays_of(state: Any) -> dict[str, Any]:
    """All that a state holds beside its position: arrays, or tensors."""
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "position"}


def bits(state: Any) -> tuple[int, tuple[bytes, ...]]:
    """All of a state, to be compared to the last bit."""
    arrays = (part.numpy(force=True) if torch.is_tensor(part) else part for part in arrays_of(state).values())
    return state.position, tuple(part.tobytes() for part in arrays)


def poisoned(state: Any) -> Any:
    """The same place of a story, with a state of nothing but NaN."""
    return dataclasses.replace(state, **{name: part * float("nan") for name, part in arrays_of(state).items()})


def check_batch_invariance(runtime: Any, streams: int, steps: int, seed: int) -> set[int]:
    """Streams join and leave at random; each row's logits must be the bits that the stream gets alone.

    A stream that leaves before its end is read, waits, and comes back later. Returns the batch sizes met.
    """
    vocab, rng = runtime.vocab_size, np.random.default_rng(seed)
    tokens = [random_tokens(3 + int(rng.integers(6)) + steps, stream, vocab) for stream in range(streams)]
    waiting = {stream: runtime.prefill(tokens[stream][:-steps])[1] for stream in range(streams)}
    alone = {stream: decode(runtime, waiting[stream], tokens[stream][-steps:]) for stream in range(streams)}
    batch, rows, done, sizes = runtime.new_batch(), list[int](), dict.fromkeys(range(streams), 0), set[int]()
    while waiting or rows:
        count = int(rng.integers(len(waiting) + 1)) if rows else len(waiting)
        for stream in map(int, rng.permutation(sorted(waiting))[:count]):
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
                state = read(batch, row)
                batch.remove(row)
                if finished:
                    assert bits(state) == bits(alone[rows[row]][1])
                else:
                    waiting[rows[row]] = state
                rows[row] = rows[-1]
                rows.pop()
    assert len(batch) == 0
    return sizes
