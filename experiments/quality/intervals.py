"""How sure a mean is: 95 % intervals by bootstrap, from seeded dice.

Resampled is what was drawn at random. Held-out stories are drawn one by one, so a figure over them resamples stories.
Written stories of one prompt are alike, so a figure over them resamples prompts first, and then each prompt's seeds;
drawing stories singly would make the interval too narrow.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
LEVEL = 0.95
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with the interval that holds it with 95 % confidence."""

    mean: float
    low: float
    high: float
    n: int
    """Stories that the figure is defined for."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def ratio_of_sums(above: npt.ArrayLike, below: npt.ArrayLike, *, seed: int = 0) -> Estimate:
    """Sum of `above` over sum of `below`, story by story: nats over tokens, or bits over bytes."""
    top, bottom = np.asarray(above, np.float64), np.asarray(below, np.float64)
    dice = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = dice.integers(0, len(top), len(top))
        means[number] = top[drawn].sum() / bottom[drawn].sum()
    return Estimate(float(top.sum() / bottom.sum()), *_middle(means), len(top))


def mean_over_prompts(
    values_PS: npt.ArrayLike, *, yes_or_no: bool = False, seed: int = 0, level: float = LEVEL
) -> Estimate | None:
    """Mean of a figure of written stories, (prompts, seeds); NaN where the figure is not defined.

    Where all stories gave the same answer to a `yes_or_no` (0 or 1), resampling finds no doubt at all; the interval is
    then Wilson's (1927), with each prompt counted once. `level` is what the interval holds; of 0.90 each end is a
    one-sided bound of 95 %.

    None if the figure is defined nowhere.
    """
    values = np.asarray(values_PS, np.float64)
    defined = ~np.isnan(values)
    if not defined.any():
        return None
    prompts, seeds = values.shape
    mean, n = float(values[defined].mean()), int(defined.sum())
    if yes_or_no and mean in (0.0, 1.0):
        asked = int(defined.any(axis=1).sum())
        z = NormalDist().inv_cdf((1 + level) / 2)
        doubt = z * z / (asked + z * z)
        return Estimate(mean, max(0.0, mean - doubt), min(1.0, mean + doubt), n)
    dice = np.random.default_rng(seed)
    rows = dice.integers(0, prompts, (RESAMPLES, prompts, 1))
    columns = dice.integers(0, seeds, (RESAMPLES, prompts, seeds))
    sums = np.where(defined, values, 0.0)[rows, columns].sum(axis=(1, 2))
    counts = defined[rows, columns].sum(axis=(1, 2))
    # A resample may hold no story that the figure is defined for; it then says nothing about the mean.
    means = sums[counts > 0] / counts[counts > 0]
    return Estimate(mean, *_middle(means, level), n)


def _middle(means: Floats, level: float = LEVEL) -> tuple[float, float]:
    """The bounds of the middle `level` of the resampled means."""
    rest = (1 - level) / 2
    low, high = np.quantile(means, [rest, 1 - rest])
    return float(low), float(high)
