"""Did each arm get the readers that it was promised? If not, nothing else that is measured can be trusted.

Something then loses or adds readers of one arm: an engine that turns them away, a page that reloads, a robot. The
chi-square test of the counts is the usual check and is told, but it holds for one look. What decides is a test that may
be looked at always: the Bayes factor of a Dirichlet mixture against the promised shares, a martingale under them
(Lindon and Malek, "Anytime-Valid Inference for Multinomial Count Data", NeurIPS 2022, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ALPHA = 0.01
"""Chance that a test without fault is ever accused."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Visitors that each arm should have had, and has had."""

    expected: dict[str, float]
    found: dict[str, int]
    chi_square: float
    degrees: int
    p: float
    """Of the chi-square test, as if this were the only look."""
    e: float
    """Of the sequential one: 1/ALPHA accuses."""

    @property
    def mismatch(self) -> bool:
        """Whether the shares are not those promised."""
        return self.e >= 1 / ALPHA

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "mismatch": self.mismatch}


def check_ratio(rounds: Sequence[tuple[Mapping[str, float], Mapping[str, int]]]) -> Ratio:
    """Hold counts to shares, over one or several rounds: each time the split was changed, a new one begins.

    Args:
        rounds: for each, the promised shares by arm, which sum to 1, and the new visitors by arm.
    """
    expected: dict[str, float] = {}
    found: dict[str, int] = {}
    chi_square, degrees, log_e = 0.0, 0, 0.0
    for shares, counts in rounds:
        total = sum(counts.values())
        promised = {arm: share for arm, share in shares.items() if share > 0}
        for arm in {**shares, **counts}:
            expected[arm] = expected.get(arm, 0.0) + total * shares.get(arm, 0.0)
            found[arm] = found.get(arm, 0) + counts.get(arm, 0)
        if any(counts[arm] for arm in counts if arm not in promised):
            log_e = math.inf  # an arm without a share has readers: no chance is small enough for that
            continue
        if total == 0 or len(promised) < 2:
            continue
        chi_square += sum((counts.get(arm, 0) - total * p) ** 2 / (total * p) for arm, p in promised.items())
        degrees += len(promised) - 1
        log_e += _log_factor(promised, counts)
    p = 0.0 if math.isinf(log_e) else chi_square_tail(chi_square, degrees)
    return Ratio(expected, found, chi_square, degrees, p, math.exp(min(log_e, 700.0)))


def chi_square_tail(value: float, degrees: int) -> float:
    """P(X >= value) of a chi-square variable, by its recursion over degrees of freedom; 1 for none."""
    if degrees < 1:
        return 1.0
    half = value / 2
    if degrees % 2:
        tail, k = math.erfc(math.sqrt(half)), 1
    else:
        tail, k = math.exp(-half), 2
    while k < degrees:
        if half > 0:
            tail += math.exp(k / 2 * math.log(half) - half - math.lgamma(k / 2 + 1))
        k += 2
    return min(1.0, tail)


def _log_factor(shares: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """Log of the mixture's likelihood over the promised one, the mixture's mean being what was promised."""
    weights = {arm: share * len(shares) for arm, share in shares.items()}
    total = sum(counts.get(arm, 0) for arm in shares)
    mass = sum(weights.values())
    value = math.lgamma(mass) - math.lgamma(mass + total)
    for arm, weight in weights.items():
        count = counts.get(arm, 0)
        value += math.lgamma(weight + count) - math.lgamma(weight) - count * math.log(shares[arm])
    return value
