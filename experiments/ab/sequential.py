"""Anytime-valid tests: the report may look after every user, and stop as soon as the evidence is strong enough.

An ordinary p-value holds for one look at a sample size fixed in advance; looked at daily until it is below 5 %, it
gets there far too often. Here the evidence is an e-process: a product of factors whose expectation is at most 1 while
the null hypothesis is true. By Ville's inequality it ever reaches 1/alpha with probability at most alpha, however
often one looks.

**Two shares** (`compare`). Each factor belongs to a block of `n_a` observations of variant a and `n_b` of variant b,
and is that of Turner, Ly and Grünwald, "Generic E-Variables for Exact Sequential k-Sample Tests that Allow for
Optional Stopping" (arXiv:2106.02693, Theorem 1 and section 3). Its extension from "no difference" to "a difference of
delta", which gives intervals, is that of Turner and Grünwald, "Exact Anytime-Valid Confidence Intervals for
Contingency Tables and Beyond" (arXiv:2203.09785, section 3). Estimate both shares from the earlier blocks as p_a and
p_b, and project them onto the null hypothesis: the q_a, q_b = q_a + delta with the smallest n_a KL(p_a, q_a) + n_b
KL(p_b, q_b). The factor is the block's likelihood under p over that under q.

Its expectation is at most 1 under any true shares t_a, t_b = t_a + delta: that of one observation's factor in a is
A = 1 + (t_a - q_a)(p_a - q_a) / (q_a (1 - q_a)), B likewise, and so the block's is A^n_a B^n_b, which is at most
((n_a A + n_b B) / (n_a + n_b))^(n_a + n_b). As t_a - q_a = t_b - q_b, the numerator is n_a + n_b plus that difference
times the derivative that the projection has made 0. Nothing is asymptotic: it holds from the first user on, for any
shares, whichever variant has more users.

**Sample ratio** (`check_sample_ratio`). If the variants did not get the promised shares of users, something loses or
adds users of one variant (an engine that refuses them, a page that reloads, a robot), and no metric can be trusted.
The evidence is the Bayes factor of a Dirichlet mixture against the promised shares, a martingale under them (Lindon
and Malek, "Anytime-Valid Inference for Multinomial Count Data", NeurIPS 2022, section 3).

Legend: `J` blocks, `G` differences on the grid.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PRIOR = 0.18
"""Successes and failures that the estimate of a share starts with; the papers' choice."""
GRID = 20
"""Differences of the first grid in an interval of 1."""
TENTHS = 10
"""How many times finer each next grid near an interval's end is."""
FINEST = 0.0006
"""An interval is rounded outwards by less than that."""
DOUBLING = 2_000
"""Blocks after which they become twice as large: a million users are then 18,000 blocks, and computed in seconds."""
BISECTIONS = 44
MOST = 4_000_000
"""Numbers in one array: 32 MB."""
LARGEST_LOG = 700.0
"""Above it, `exp` overflows."""
SAMPLE_RATIO_ALPHA = 0.01
"""Probability that a test without a fault is ever reported as a sample ratio mismatch."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """Users that each variant should have had, and has had."""

    expected: dict[str, float]
    found: dict[str, int]
    e: float
    """Evidence against the promised shares; 1/`SAMPLE_RATIO_ALPHA` is a mismatch."""

    @property
    def mismatch(self) -> bool:
        """Whether the shares are not those promised."""
        return self.e >= 1 / SAMPLE_RATIO_ALPHA


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a comparison: successes of each variant, and the shares estimated before each block."""

    sizes_J2: Floats
    hits_J2: Floats
    estimate_J2: Floats
    used: tuple[int, int]
    """Observations that lie in a whole block, by variant; the rest waits for its block."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What can be said of variant b's share minus variant a's, at any time."""

    e: float
    """The largest value that the e-process against "no difference" has had; 1/alpha decides."""
    p: float
    """An always-valid p-value: 1/e, at most 1."""
    difference_low: float
    difference_high: float
    """Holds the difference at all looks together, with confidence 1 - alpha."""
    blocks: int
    used: tuple[int, int]
    """Observations of each variant that it stands on."""
    decided_at_block: int | None
    """The block at which 1/alpha was first reached."""


def check_sample_ratio(rounds: Sequence[tuple[Mapping[str, float], Mapping[str, int]]]) -> SampleRatio:
    """Test counts against promised shares, over several rounds: each change of the split begins a new one.

    Args:
        rounds: for each, the promised shares by variant, which sum to 1, and the new users by variant.
    """
    expected: dict[str, float] = {}
    found: dict[str, int] = {}
    log_e = 0.0
    for shares, counts in rounds:
        total = sum(counts.values())
        promised = {name: share for name, share in shares.items() if share > 0}
        for name in {**shares, **counts}:
            expected[name] = expected.get(name, 0.0) + total * shares.get(name, 0.0)
            found[name] = found.get(name, 0) + counts.get(name, 0)
        if any(count for name, count in counts.items() if name not in promised):
            log_e = math.inf  # impossible under the promise: a variant of weight 0 has users
        elif total and len(promised) > 1:
            log_e += _log_bayes_factor(promised, counts)
    return SampleRatio(expected, found, math.exp(min(log_e, LARGEST_LOG)))


def block_sizes(weight_a: int, weight_b: int) -> tuple[int, int]:
    """Return the observations of each variant in a block: near the weights' ratio, and one of them 1.

    Small blocks learn early; blocks that fit the weights leave few observations waiting.
    """
    if weight_a < 1 or weight_b < 1:
        return 1, 1
    if weight_a >= weight_b:
        return max(1, round(weight_a / weight_b)), 1
    return 1, max(1, round(weight_b / weight_a))


def make_blocks(a: Sequence[bool], b: Sequence[bool], sizes: Sequence[tuple[int, int]] = ((1, 1),)) -> Blocks:
    """Cut two streams of observations, each in its order of arrival, into blocks.

    `sizes[i]` are those of a block that begins with observation `i` of variant a, the last of them hold from there on;
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
    estimate_J2 = (before_J2 + PRIOR) / (seen_J2 + 2 * PRIOR)
    return Blocks(sizes_J2, hits_J2, estimate_J2, (at_a, at_b))


def compare(
    a: Sequence[bool], b: Sequence[bool], sizes: Sequence[tuple[int, int]] = ((1, 1),), *, alpha: float = 0.05
) -> Comparison:
    """Compare the shares behind two streams of observations; see `make_blocks`."""
    blocks = make_blocks(a, b, sizes)
    count = len(blocks.sizes_J2)
    if count == 0:
        return Comparison(1.0, 1.0, -1.0, 1.0, 0, blocks.used, None)
    bar = math.log(1 / alpha)
    path_J = np.cumsum(log_factors(blocks, np.zeros(1))[0])
    best = max(0.0, float(path_J.max()))
    reached = np.flatnonzero(path_J >= bar)
    low, high = _interval(blocks, bar)
    return Comparison(
        e=math.exp(min(best, LARGEST_LOG)),
        p=math.exp(-best),
        difference_low=low,
        difference_high=high,
        blocks=count,
        used=blocks.used,
        decided_at_block=int(reached[0]) + 1 if len(reached) else None,
    )


def _interval(blocks: Blocks, bar: float) -> tuple[float, float]:
    """Return the smallest interval on the finest grid that holds every difference never refuted.

    The observed difference always counts as not refuted.
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
    """Return the largest logarithm that each difference's e-process has had, (G,)."""
    count = len(blocks.sizes_J2)
    at_once = max(1, MOST // count)
    differences_G = np.clip(differences_G, -1 + 1e-9, 1 - 1e-9)
    peaks = [
        np.cumsum(log_factors(blocks, differences_G[start : start + at_once]), axis=1).max(axis=1)
        for start in range(0, len(differences_G), at_once)
    ]
    return np.concatenate(peaks) if peaks else np.zeros(0)


def log_factors(blocks: Blocks, differences_G: Floats) -> Floats:
    """Return the logarithm of each block's factor against each difference, (G, J)."""
    n_a, n_b = blocks.sizes_J2.T
    p_a, p_b = blocks.estimate_J2.T
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
    """Return the q_a, (G, J), that minimises n_a KL(p_a, q_a) + n_b KL(p_b, q_a + shift), by bisection.

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


def _log_bayes_factor(shares: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """Return the log of the mixture's likelihood over the promised one; the mixture's mean is the promise."""
    prior = {name: share * len(shares) for name, share in shares.items()}
    mass = sum(prior.values())
    value = math.lgamma(mass) - math.lgamma(mass + sum(counts.get(name, 0) for name in shares))
    for name, weight in prior.items():
        count = counts.get(name, 0)
        value += math.lgamma(weight + count) - math.lgamma(weight) - count * math.log(shares[name])
    return value
