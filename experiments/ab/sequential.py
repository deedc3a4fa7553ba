"""A comparison of two shares that may be looked at after every single reader, and stopped whenever it convinces.

An ordinary p-value holds for one look at a number of readers fixed beforehand; looked at daily until it is below 5 %,
it is below 5 % far too often. Here the evidence is an e-process: a product of factors, one for each block of `n_a`
observations of arm a and `n_b` of arm b, whose expectation is at most 1 as long as the null hypothesis is true. By
Ville's inequality it then ever reaches 1/alpha with a chance of at most alpha, however often one looks.

The factor is that of Turner, Ly and Grünwald, "Generic E-Variables for Exact Sequential k-Sample Tests that Allow for
Optional Stopping" (arXiv:2106.02693, Theorem 1 and, for two shares, section 3), and its extension from "no difference"
to "a difference of delta", which gives intervals, that of Turner and Grünwald, "Exact Anytime-Valid Confidence
Intervals for Contingency Tables and Beyond" (arXiv:2203.09785, section 3). Guess both shares from the blocks before, as
p_a and p_b, and project the guess onto the null hypothesis: the q_a, q_b = q_a + delta with the smallest
n_a KL(p_a, q_a) + n_b KL(p_b, q_b). The factor is the block's likelihood under p over that under q.

Why its expectation is at most 1 under any true shares t_a, t_b = t_a + delta: that of one observation's factor in arm a
is A = 1 + (t_a - q_a)(p_a - q_a) / (q_a (1 - q_a)), B likewise, and so the block's is A^n_a B^n_b, which is at most
((n_a A + n_b B) / (n_a + n_b))^(n_a + n_b). As t_a - q_a = t_b - q_b, the numerator is n_a + n_b plus that difference
times the derivative that the projection has made 0. Nothing here is an approximation for many readers: it holds from
the first one on, for any shares, whichever arm rates more often.

Legend: `J` blocks, `G` differences on the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PRIOR = 0.18
"""Successes and failures that the guess of a share starts with; the papers' choice."""
GRID = 20
"""Differences of the first grid in an interval of 1."""
TENTHS = 10
"""How many times finer each next grid near an interval's end is."""
FINEST = 0.0006
"""An interval is rounded outwards by less than that."""
DOUBLING = 2_000
"""Blocks after which they become twice as large: a million readers are then 18,000 blocks, and computed in seconds."""
BISECTIONS = 44
MOST = 4_000_000
"""Numbers in one array: 32 MB."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a comparison: successes of each arm in each, and what was guessed before each."""

    sizes_J2: Floats
    hits_J2: Floats
    guess_J2: Floats
    used: tuple[int, int]
    """Observations that lie in a whole block, by arm; the rest waits for its block."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What can be said of arm b's share minus arm a's, at any time."""

    e: float
    """The largest value that the e-process against "no difference" has had; 1/alpha decides."""
    p: float
    """An always-valid p-value: 1/e, at most 1."""
    low: float
    high: float
    """Holds the difference at all looks together, with confidence 1 - alpha."""
    blocks: int
    used: tuple[int, int]
    """Observations of each arm that it stands on."""
    decided: int | None
    """The block at which 1/alpha was first reached."""


def block_sizes(parts_a: int, parts_b: int) -> tuple[int, int]:
    """Observations of each arm in a block, near the shares' ratio, at least one of them a single one.

    Small blocks learn early; blocks that fit the shares leave few observations waiting.
    """
    if parts_a < 1 or parts_b < 1:
        return 1, 1
    if parts_a >= parts_b:
        return max(1, round(parts_a / parts_b)), 1
    return 1, max(1, round(parts_b / parts_a))


def make_blocks(a: Sequence[bool], b: Sequence[bool], sizes: Sequence[tuple[int, int]] = ((1, 1),)) -> Blocks:
    """Cut two streams of observations, each in its order of arrival, into blocks.

    `sizes[i]` are those of a block that begins with observation `i` of arm a, the last of them hold from there on;
    later blocks are multiples of that. They must not depend on what was observed.
    """
    at_a = at_b = 0
    rows: list[tuple[int, int, int, int, int, int]] = []
    sum_a = np.concatenate([[0], np.cumsum(np.asarray(a, np.int64))])
    sum_b = np.concatenate([[0], np.cumsum(np.asarray(b, np.int64))])
    while True:
        larger = 2 ** (len(rows) // DOUBLING)
        n_a, n_b = (larger * size for size in sizes[min(at_a, len(sizes) - 1)])
        if at_a + n_a > len(a) or at_b + n_b > len(b):
            break
        hits = int(sum_a[at_a + n_a] - sum_a[at_a]), int(sum_b[at_b + n_b] - sum_b[at_b])
        rows.append((n_a, n_b, *hits, int(sum_a[at_a]), int(sum_b[at_b])))
        at_a, at_b = at_a + n_a, at_b + n_b
    table = np.array(rows, np.float64).reshape(-1, 6)
    sizes_J2, hits_J2, before_J2 = table[:, :2], table[:, 2:4], table[:, 4:]
    seen_J2 = np.cumsum(sizes_J2, axis=0) - sizes_J2
    guess_J2 = (before_J2 + PRIOR) / (seen_J2 + 2 * PRIOR)
    return Blocks(sizes_J2, hits_J2, guess_J2, (at_a, at_b))


def log_factors(blocks: Blocks, difference: float) -> Floats:
    """Logarithm of each block's factor against "b's share is a's plus `difference`", (J,)."""
    factors_J: Floats = _log_factors(blocks, np.array([difference]))[0]
    return factors_J


def compare(
    a: Sequence[bool],
    b: Sequence[bool],
    sizes: Sequence[tuple[int, int]] = ((1, 1),),
    *,
    alpha: float = 0.05,
) -> Comparison:
    """Compare the shares behind two streams of observations; see `make_blocks`."""
    blocks = make_blocks(a, b, sizes)
    count = len(blocks.sizes_J2)
    if count == 0:
        return Comparison(1.0, 1.0, -1.0, 1.0, 0, blocks.used, None)
    bar = math.log(1 / alpha)
    path_J = np.cumsum(log_factors(blocks, 0.0))
    best = max(0.0, float(path_J.max()))
    reached = np.flatnonzero(path_J >= bar)
    low, high = _interval(blocks, bar)
    return Comparison(
        e=math.exp(min(best, 700.0)),
        p=math.exp(-best),
        low=low,
        high=high,
        blocks=count,
        used=blocks.used,
        decided=int(reached[0]) + 1 if len(reached) else None,
    )


def _interval(blocks: Blocks, bar: float) -> tuple[float, float]:
    """The smallest interval on the finest grid that holds every difference which was never refuted.

    What is seen, the difference of the shares so far, always counts as not refuted.
    """
    shares = blocks.hits_J2.sum(axis=0) / blocks.sizes_J2.sum(axis=0)
    seen = float(shares[1] - shares[0])
    grid = np.arange(1 - GRID, GRID) / GRID
    kept = grid[_peaks(blocks, grid) < bar]
    first, last = min(seen, *kept, 1.0), max(seen, *kept, -1.0)
    step = 1 / GRID
    while step > FINEST:
        # The end lies within `step` outside of what was kept.
        further = np.arange(1, TENTHS) * step / TENTHS
        below, above = first - further, last + further
        first = min(first, *below[(below > -1) & (_peaks(blocks, below) < bar)], 1.0)
        last = max(last, *above[(above < 1) & (_peaks(blocks, above) < bar)], -1.0)
        step /= TENTHS
    low, high = max(-1.0, first - step), min(1.0, last + step)
    if _peaks(blocks, np.zeros(1))[0] >= bar:  # rounding outwards must not take back what is decided
        low, high = (max(low, 0.0), high) if seen > 0 else (low, min(high, 0.0))
    return float(low), float(high)


def _peaks(blocks: Blocks, differences_G: Floats) -> Floats:
    """For each difference, the largest logarithm that its e-process has had, (G,)."""
    count = len(blocks.sizes_J2)
    at_once = max(1, MOST // count)
    differences_G = np.clip(differences_G, -1 + 1e-9, 1 - 1e-9)
    peaks = [
        np.cumsum(_log_factors(blocks, differences_G[start : start + at_once]), axis=1).max(axis=1)
        for start in range(0, len(differences_G), at_once)
    ]
    return np.concatenate(peaks) if peaks else np.zeros(0)


def _log_factors(blocks: Blocks, differences_G: Floats) -> Floats:
    """(G, J)."""
    n_a, n_b = blocks.sizes_J2.T
    p_a, p_b = blocks.guess_J2.T
    hit_a, hit_b = blocks.hits_J2.T
    shift = differences_G[:, None]
    q_a = _projected(p_a, p_b, n_a, n_b, shift)
    q_b = q_a + shift
    factors_GJ: Floats = (
        hit_a * np.log(p_a / q_a)
        + (n_a - hit_a) * np.log((1 - p_a) / (1 - q_a))
        + hit_b * np.log(p_b / q_b)
        + (n_b - hit_b) * np.log((1 - p_b) / (1 - q_b))
    )
    return factors_GJ


def _projected(p_a: Floats, p_b: Floats, n_a: Floats, n_b: Floats, shift_G1: Floats) -> Floats:
    """The q_a for which n_a KL(p_a, q_a) + n_b KL(p_b, q_a + shift) is smallest, (G, J), by bisection.

    The derivative rises from minus to plus infinity between the ends, so it has one zero.
    """
    if not shift_G1.any():  # the mean has the same shares on both sides: no search is needed
        return (n_a * p_a + n_b * p_b) / (n_a + n_b) + np.zeros_like(shift_G1)
    low = np.maximum(0.0, -shift_G1) + np.zeros_like(p_a)
    high = np.minimum(1.0, 1.0 - shift_G1) + np.zeros_like(p_a)
    for _ in range(BISECTIONS):
        q_a = (low + high) / 2
        q_b = q_a + shift_G1
        # The derivative, times q_a (1 - q_a) q_b (1 - q_b), which is positive.
        slope = n_a * (q_a - p_a) * q_b * (1 - q_b) + n_b * (q_b - p_b) * q_a * (1 - q_a)
        rising = slope > 0
        high = np.where(rising, q_a, high)
        low = np.where(rising, low, q_a)
    return (low + high) / 2
