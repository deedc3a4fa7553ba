"""Point estimates with intervals: percentile bootstrap (plain, clustered, stratified) and Wilson's score interval.

Every function takes the confidence `level` of its two-sided interval. With `level=ONE_SIDED` each end by itself is a
one-sided 95 % bound. All resampling is seeded, so equal input gives equal intervals.

Shapes: N observations, P prompts, S seeds, R resamples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
ONE_SIDED = 2 * CONFIDENCE - 1
"""Level of a two-sided interval of which each end is a one-sided bound of `CONFIDENCE`."""
RESAMPLES = 2_000
COSTLY_RESAMPLES = 200
"""Where all figures of a benchmark are computed for each."""
BATCH = 500_000
"""Values drawn at once; all resamples of a large data set together would take gigabytes."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, the interval around it, and the number of observations it stands on."""

    value: float
    low: float
    high: float
    n: int

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside the interval."""
        return not self.low <= value <= self.high


def exact(value: float, n: int) -> Estimate:
    """A value that was counted, not estimated: the interval has no width."""
    return Estimate(value, value, value, n)


def wilson(successes: int, n: int, *, level: float = CONFIDENCE) -> Estimate:
    """Wilson's score interval (1927) of a share of `n` independent trials.

    One-sided at 95 %, a share of at least 0.8 needs 11 of 11, 19 of 20 or 28 of 30. Computed here rather than by
    scipy, which an installation for serving does not have.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes must be between 0 and n, and n at least 1; got {successes} of {n}")
    share = successes / n
    z = NormalDist().inv_cdf((1 + level) / 2)
    scale = 1 + z * z / n
    center = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return _estimate(share, max(0.0, center - half), min(1.0, center + half), n)


def ratio_of_sums(
    above: npt.ArrayLike, below: npt.ArrayLike, *, level: float = CONFIDENCE, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Sum over sum with a paired bootstrap interval: bits over bytes, or one mean over another of the same pairs."""
    from scipy.stats import bootstrap

    pairs = np.asarray(above, np.float64), np.asarray(below, np.float64)
    n = len(pairs[0])
    value = float(pairs[0].sum() / pairs[1].sum())
    if n < 2 or not math.isfinite(value):  # nothing to resample, which scipy refuses
        return exact(value, n)
    interval = bootstrap(
        pairs,
        lambda top, bottom, axis: top.sum(axis) / bottom.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=level,
        n_resamples=resamples,
        batch=max(1, BATCH // n),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return _estimate(value, interval.low, interval.high, n)


def mean_over_prompts(values_PS: npt.ArrayLike, *, binary: bool = False, level: float = CONFIDENCE) -> Estimate | None:
    """Mean over prompts and seeds with a cluster bootstrap interval; NaN marks a value that is not defined.

    Stories of one prompt are alike, so prompts are resampled first and then each prompt's seeds; resampling single
    stories would make the interval too narrow. Where all values of a `binary` figure (0 or 1) are equal, resampling
    finds no variance: the interval is then Wilson's, with each prompt counted once.

    None if no value is defined.
    """
    values = np.asarray(values_PS, np.float64)
    defined = ~np.isnan(values)
    if not defined.any():
        return None
    prompts, seeds = values.shape
    mean, n = float(values[defined].mean()), int(defined.sum())
    if binary and mean in (0.0, 1.0):
        asked = int(defined.any(axis=1).sum())
        found = wilson(round(mean * asked), asked, level=level)
        return Estimate(mean, found.low, found.high, n)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, prompts, (RESAMPLES, prompts, 1))
    columns = rng.integers(0, seeds, (RESAMPLES, prompts, seeds))
    sums_R = np.where(defined, values, 0.0)[rows, columns].sum(axis=(1, 2))
    counts_R = defined[rows, columns].sum(axis=(1, 2))
    # A resample without any defined value says nothing about the mean.
    return _estimate(mean, *_middle(sums_R[counts_R > 0] / counts_R[counts_R > 0], level), n)


def stratified_bootstrap(
    groups: Mapping[Any, Sequence[Any]],
    figures: Callable[[list[Any]], Mapping[str, float]],
    *,
    level: float = CONFIDENCE,
) -> dict[str, tuple[float, float]]:
    """Interval of each figure that `figures` computes from rows; rows are resampled within each group."""
    rng = np.random.default_rng(0)
    seen: dict[str, list[float]] = {}
    for _ in range(COSTLY_RESAMPLES):
        rows = [group[index] for group in groups.values() for index in rng.integers(0, len(group), len(group))]
        for name, value in figures(rows).items():
            seen.setdefault(name, []).append(value)
    return {name: _middle(np.array(values), level) for name, values in seen.items()}


def _middle(values_R: Floats, level: float) -> tuple[float, float]:
    """The ends of the middle `level` of resampled values."""
    tail = (1 - level) / 2
    low, high = np.quantile(values_R, [tail, 1 - tail])
    return float(low), float(high)


def _estimate(value: float, low: float, high: float, n: int) -> Estimate:
    """Widen the interval to the value where rounding or resampling left it outside."""
    return Estimate(value, min(float(low), value), max(float(high), value), n)
