"""Pass, fail or undecided: what one threshold says of bounded evidence, and what all of them say together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from experiments.common.statistics import CONFIDENCE, Estimate
from experiments.common.thresholds import Threshold

Verdict = Literal["pass", "fail", "undecided"]
EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 1, "undecided": 3}


@dataclass(frozen=True, slots=True)
class Check:
    """One threshold's verdict, with all that it stands on."""

    threshold: Threshold
    verdict: Verdict
    why: str
    """One line for a reader."""
    bounds: Estimate | None = None
    """None: there is no evidence."""

    @property
    def margin(self) -> float | None:
        """How far the value is inside the threshold, in its unit; negative: outside."""
        return None if self.bounds is None else self.threshold.margin(self.bounds.value)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        bounds = self.bounds
        return {
            "metric": self.threshold.metric,
            "scope": self.threshold.scope,
            "verdict": self.verdict,
            "value": bounds.value if bounds else None,
            "unit": self.threshold.unit,
            "bound": self.threshold.bound,
            "threshold": self.threshold.limit,
            "margin": self.margin,
            "low": bounds.low if bounds else None,
            "high": bounds.high if bounds else None,
            "confidence": CONFIDENCE,
            "n": bounds.n if bounds else 0,
            "why": self.why,
            "reason": self.threshold.reason,
        }


def judge(threshold: Threshold, found: Estimate) -> Check:
    """What `threshold` says of a value with its bounds.

    Passed is what holds even at the pessimistic bound, failed what is broken even at the optimistic one; between
    them, and below the threshold's own `min_n`, the evidence does not decide.
    """
    if threshold.min_n is not None and found.n < threshold.min_n:
        why = f"{found.n} observations are too few to decide by; at least {threshold.min_n} are needed"
        return Check(threshold, "undecided", why, found)
    pessimist, optimist = (found.low, found.high) if threshold.higher_is_better else (found.high, found.low)
    if threshold.holds(pessimist):
        return Check(threshold, "pass", f"{threshold} holds", found)
    if not threshold.holds(optimist):
        return Check(threshold, "fail", f"{threshold} does not hold", found)
    between = f"it lies between {found.low:.4g} and {found.high:.4g} with 95 % on either side"
    return Check(threshold, "undecided", f"the evidence does not decide {threshold}: {between}", found)


def without(threshold: Threshold, why: str) -> Check:
    """A threshold that nothing was measured for: undecided, never passed."""
    return Check(threshold, "undecided", why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The verdict on one version."""

    digest: str
    """Of the version's model folder."""
    version: int | None
    champion: str | None
    """The champion's digest; None: there is none to compare with."""
    checks: tuple[Check, ...]
    thresholds_digest: str
    evidence: dict[str, str] = field(default_factory=dict)
    """MLflow runs (or files) that the checks stand on, by what they are."""
    notes: tuple[str, ...] = ()
    decided: str = ""
    """UTC, ISO 8601."""
    run_id: str | None = None
    """MLflow's, once it is logged."""

    @property
    def verdict(self) -> Verdict:
        """Failed if one check failed, else undecided if one is, and passed only if every one passed."""
        return overall(check.verdict for check in self.checks)

    @property
    def exit_code(self) -> int:
        """0, 1 or 3."""
        return EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "verdict": self.verdict,
            "digest": self.digest,
            "version": self.version,
            "champion": self.champion,
            "thresholds_digest": self.thresholds_digest,
            "evidence": self.evidence,
            "checks": [check.as_dict() for check in self.checks],
            "notes": list(self.notes),
            "decided": self.decided,
            "run_id": self.run_id,
        }


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """All verdicts in one; of no verdict at all nothing can be said."""
    found = set(verdicts)
    if "fail" in found:
        return "fail"
    return "pass" if found == {"pass"} else "undecided"
