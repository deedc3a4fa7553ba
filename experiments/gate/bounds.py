"""How sure is a number: one-sided 95 % bounds for shares, means over stories, differences and percentiles.

A gate says two things: "at least this good" and "worse than allowed". Each is one-sided, so each bound holds with
95 % by itself: `low` is a number that the true value exceeds, `high` one that it stays below. All dice are seeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
Z = 1.6448536269514722
"""Standard deviations that hold 95 % of a normal distribution on one side."""
RESAMPLES = 2000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bounds:
    """A value with its one-sided 95 % bounds, and the observations it stands on."""

    value: float
    low: float
    high: float
    n: int


def exactly(value: float, n: int) -> Bounds:
    """A value that was counted or read off, not estimated."""
    return Bounds(value, value, value, n)


def share(successes: int, n: int, *, z: float = Z) -> Bounds:
    """Wilson's score bounds (1927) of a share of `n` independent trials, `z` standard deviations wide.

    At 95 % on one side, at least 80 % success needs 11 of 11, 19 of 20 or 28 of 30; 10 of 10 is not enough.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes must be between 0 and n, and n at least 1; got {successes} of {n}")
    found = successes / n
    middle = (found + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(found * (1 - found) / n + z * z / (4 * n * n))
    # Rounding may put a bound a hair on the wrong side of the share itself.
    return Bounds(found, max(0.0, min(found, middle - half)), min(1.0, max(found, middle + half)), n)


def ratio_of_sums(above: npt.ArrayLike, below: npt.ArrayLike, *, seed: int = 0) -> Bounds:
    """Sum over sum, stories drawn again: nats by bytes, say."""
    pairs = np.array([above, below], np.float64)
    drawn = _resampled(pairs, lambda sums: sums[0] / sums[1], seed)
    return _bounds(float(pairs[0].sum() / pairs[1].sum()), drawn, pairs.shape[1])


def paired_difference(
    ours: npt.ArrayLike, theirs: npt.ArrayLike, weights: npt.ArrayLike, *, seed: int = 0
) -> Bounds:
    """(sum of ours - sum of theirs) / sum of weights, over the same stories.

    What makes one story harder than another is common to both sides and cancels, so a difference is seen that is far
    smaller than either side's own doubt.
    """
    rows = np.array([ours, theirs, weights], np.float64)
    drawn = _resampled(rows, lambda sums: (sums[0] - sums[1]) / sums[2], seed)
    total = rows.sum(axis=1)
    return _bounds(float((total[0] - total[1]) / total[2]), drawn, rows.shape[1])


def resampled_figures(
    groups: Mapping[Any, Sequence[Any]],
    figures: Callable[[list[Any]], Mapping[str, float]],
    *,
    seed: int = 0,
    resamples: int = 200,
) -> dict[str, tuple[float, float]]:
    """One-sided bounds of each figure that `figures` computes, rows drawn again within each group."""
    dice = np.random.default_rng([seed, 0x6A7E])
    seen: dict[str, list[float]] = {}
    for _ in range(resamples):
        rows = [
            group[index] for group in groups.values() for index in dice.integers(0, len(group), len(group))
        ]
        for name, value in figures(rows).items():
            seen.setdefault(name, []).append(value)
    tail = 100 * (1 - CONFIDENCE)
    return {
        name: (float(np.percentile(values, tail)), float(np.percentile(values, 100 - tail)))
        for name, values in seen.items()
    }


def _resampled(rows: Floats, figure: Callable[[Floats], Any], seed: int) -> Floats:
    dice = np.random.default_rng([seed, 0x6A7E])
    count = rows.shape[1]
    found = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        found[number] = figure(rows[:, dice.integers(0, count, count)].sum(axis=1))
    return found


def _bounds(value: float, drawn: Floats, n: int) -> Bounds:
    tail = 100 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Bounds(value, min(float(low), value), max(float(high), value), n)
