"""Accept an export only if its logits are the fp32 network's.

On trained weights and real stories, because an overflow that only trained gates reach has passed a test on random
weights. Every logit of every precision and batch size must be finite and within its bound, in prefill and step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.architecture.config import END_ID
from model.architecture.network import StoryNetwork
from model.errors import ModelError
from model.runtimes.protocol import Logits, Runtime

BATCHES = (1, 2, 3, 8, 16, 32, 64)
LIMITS = {"fp32": 1e-3, "int8": 1.0}
"""Largest difference of any logit. int8 moves single logits of unlikely tokens; what that does to the story is
bounded by bits per byte (within 0.3 %), which `story evaluate` prints for each runtime."""
PREFILL, STEPS = 24, 24
"""Tokens of each story that are taken in at once, and then one by one."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Largest absolute logit difference by batch size; `spread` is the logits' own standard deviation."""

    precision: str
    largest: dict[int, float]
    spread: float


def reference_logits(network: StoryNetwork, stories: Sequence[Sequence[int]]) -> list[Logits]:
    """The fp32 network's logits (T, V) at every place of each story."""
    with torch.no_grad():
        return [network(torch.tensor([list(story)]))[0].float().numpy() for story in stories]


def accept(network: StoryNetwork, runtime: Runtime, precision: str, stories: Sequence[Sequence[int]]) -> Acceptance:
    """Compare `runtime` with `network` at each batch size up to its `max_batch`.

    `stories` are token lists that begin with the end-of-story id. Raises `ModelError` for a logit that is not finite
    or further off than its bound.
    """
    cut = [list(story)[: PREFILL + STEPS] for story in stories if len(story) >= PREFILL + STEPS]
    if not cut or any(story[0] != END_ID for story in cut):
        raise ModelError(f"acceptance needs stories of at least {PREFILL + STEPS} tokens")
    expected = reference_logits(network, cut)
    if not all(np.isfinite(logits).all() for logits in expected):
        raise ModelError("the network itself gives logits that are not finite: its weights are unusable")
    largest = {}
    for size in (size for size in BATCHES if size <= runtime.max_batch):
        chosen = [index % len(cut) for index in range(size)]
        largest[size] = _largest(runtime, [cut[i] for i in chosen], [expected[i] for i in chosen])
        if not largest[size] <= LIMITS[precision]:
            off = f"off by {largest[size]:.3g}" if np.isfinite(largest[size]) else "not finite"
            raise ModelError(
                f"the {precision} runtime is not the network: at batch {size} a logit is {off}, "
                f"allowed is a difference of {LIMITS[precision]:g}"
            )
    return Acceptance(precision, largest, float(np.std(np.concatenate(expected))))


def _largest(runtime: Runtime, stories: list[list[int]], expected: list[Logits]) -> float:
    batch = runtime.new_batch()
    worst = 0.0
    for row, story in enumerate(stories):
        logits, state = runtime.prefill(story[:PREFILL])
        batch.append(state)
        worst = max(worst, _difference(logits, expected[row][PREFILL - 1]))
    for place in range(PREFILL, PREFILL + STEPS):
        logits_BV = runtime.step(np.array([story[place] for story in stories]), batch)
        for row in range(len(stories)):
            worst = max(worst, _difference(logits_BV[row], expected[row][place]))
    return worst


def _difference(ours: Logits, theirs: Logits) -> float:
    gap = np.abs(ours - theirs)
    return float(gap.max()) if np.isfinite(gap).all() else float("inf")
