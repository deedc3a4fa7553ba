"""Runtimes that tests share, each loaded once: over the shipped folder and over the small model's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from model.folder import PRECISIONS, PRETRAINED, ModelFolder
from model.load import load_runtime
from model.network import END_OF_STORY_ID
from model.onnx_runtime import OnnxRuntime, OnnxState
from model.runtime import Logits
from tests.model.small_model import SMALL, small_folder
from training.acceptance import BATCHES

both_precisions = pytest.mark.parametrize("precision", PRECISIONS)


@cache
def shipped(precision: str) -> OnnxRuntime:
    return load_runtime(ModelFolder.open(PRETRAINED), slots=max(BATCHES), precision=precision)


@cache
def small(precision: str) -> OnnxRuntime:
    return load_runtime(ModelFolder.open(small_folder()), slots=8, precision=precision)


def random_tokens(count: int, seed: int, vocab_size: int = SMALL.vocab_size) -> list[int]:
    """A story's beginning of `count` tokens: the end of story, then anything else."""
    rng = np.random.default_rng(seed)
    return [END_OF_STORY_ID, *map(int, rng.integers(1, vocab_size, count - 1))]


def decode(runtime: OnnxRuntime, state: OnnxState, tokens: Sequence[int]) -> tuple[Logits, OnnxState]:
    """One stream alone, token by token: logits (T, V) and the last state."""
    batch = runtime.new_batch()
    batch.append(state)
    logits = [runtime.step(np.array([token]), batch)[0].copy() for token in tokens]
    return np.array(logits), batch.read(0)
