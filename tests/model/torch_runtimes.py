"""PyTorch runtimes that tests share, each loaded once; and what drives one stream or tells two states apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from model.architecture.checkpoint import load_network
from model.architecture.folder import PRETRAINED
from model.architecture.network import StoryNetwork
from model.runtimes.protocol import Logits
from model.runtimes.torch.prefill import TorchState
from model.runtimes.torch.runtime import TorchRuntime
from tests.model.small_model import small_folder
from training.export.acceptance import BATCHES


@cache
def shipped_torch() -> TorchRuntime:
    return TorchRuntime.load(PRETRAINED, max_batch=max(BATCHES))


@cache
def small_torch() -> TorchRuntime:
    return TorchRuntime.load(small_folder(), max_batch=8)


@cache
def small_network() -> StoryNetwork:
    return load_network(small_folder())


def parallel_logits(network: StoryNetwork, rows: Sequence[Sequence[int]]) -> Logits:
    """(B, T, V) of equally long rows, by the network's form for training."""
    with torch.no_grad():
        return network(torch.tensor([list(row) for row in rows])).numpy()  # type: ignore[no-any-return]


def worst(ours: Logits, theirs: Logits) -> float:
    """The largest difference; both must be finite."""
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max())


def decode(runtime: TorchRuntime, state: TorchState, tokens: Sequence[int]) -> tuple[Logits, TorchState]:
    """One stream alone, token by token: logits (T, V) and the last state."""
    batch = runtime.new_batch()
    batch.append(state)
    logits = [runtime.step(np.array([token]), batch)[0].copy() for token in tokens]
    return np.array(logits), batch.read(0)


def bits(state: TorchState) -> tuple[int, bytes, bytes, bytes]:
    """All of a state, to be compared."""
    parts = (state.conv_RKM, state.memory_RHNP, state.ring_AWP)
    conv, memory, ring = (part.numpy(force=True).tobytes() for part in parts)
    return state.position, conv, memory, ring


def poisoned(state: TorchState) -> TorchState:
    """The same place of a story, remembered as nothing but NaN."""
    parts = (state.conv_RKM, state.memory_RHNP, state.ring_AWP)
    return TorchState(state.position, *(torch.full_like(part, torch.nan) for part in parts))
