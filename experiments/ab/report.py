"""What a test says so far: a rate with its interval for each arm, each arm against the first, and one verdict.

Two kinds of intervals stand in it. A rate's own (Wilson, 95 %) holds for one look and is there to be read; the
difference's holds at all looks together (`sequential`), and it alone decides.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from experiments.ab.ratio import Ratio, check_ratio
from experiments.ab.read import HIGHER_IS_BETTER, METRICS, Arm, Evidence, Metric, Stream
from experiments.ab.sequential import Comparison, block_sizes, compare
from experiments.ab.split import parse_split
from experiments.common.statistics import Estimate, wilson

Verdict = Literal["better", "worse", "undecided"]
EXIT_CODES: dict[Verdict, int] = {"better": 0, "worse": 1, "undecided": 3}


@dataclass(frozen=True, slots=True)
class Against:
    """One arm against the first, in one figure."""

    arm: str
    metric: Metric
    comparison: Comparison
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        found = self.comparison
        return {
            "arm": self.arm, "metric": self.metric, "verdict": self.verdict, "difference_low": found.low,
            "difference_high": found.high, "e": found.e, "p": found.p, "blocks": found.blocks,
            "used": list(found.used), "decided_at_block": found.decided,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """The whole of it."""

    evidence: Evidence
    metric: Metric
    """The one that decides."""
    alpha: float
    """Chance of a wrong decision, of all arms against the first together."""
    rates: dict[str, dict[Metric, Estimate | None]]
    comparisons: list[Against]
    ratio: Ratio
    verdict: Verdict
    why: str
    """One line for a reader."""
    made: str

    @property
    def exit_code(self) -> int:
        """0: an arm is better than the first. 1: all are worse. 3: undecided."""
        return EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`; no visitor and no text among them."""
        return {
            "test": self.evidence.test,
            "split": str(self.evidence.split),
            "made": self.made,
            "metric": self.metric,
            "alpha": self.alpha,
            "verdict": self.verdict,
            "why": self.why,
            "arms": [self._arm(arm) for arm in self.evidence.arms.values()],
            "comparisons": [each.as_dict() for each in self.comparisons],
            "sample_ratio": self.ratio.as_dict(),
            "left_out": self.evidence.left_out,
        }

    def _arm(self, arm: Arm) -> dict[str, Any]:
        rates = {
            name: None if found is None
            else {"value": found.value, "low": found.low, "high": found.high, "visitors": found.n}
            for name, found in self.rates[arm.name].items()
        }  # fmt: skip
        return {
            "arm": arm.name, "version": arm.version, "digest": arm.digest, "stories": arm.stories,
            "visitors": arm.visitors, "likes": arm.likes, "dislikes": arm.dislikes, "endings": arm.endings,
            "rates": rates, "median_tokens": middle(arm.tokens), "median_ttft": middle(arm.ttfts),
            "median_tokens_per_second": middle(arm.rates),
        }  # fmt: skip


def middle(values: list[float] | list[int]) -> float | None:
    """The median; None of nothing."""
    return float(statistics.median(values)) if values else None


def make_report(evidence: Evidence, *, metric: Metric = "like", alpha: float = 0.05) -> Report:
    """Work it all out. With several arms beside the first, each may be wrong with its part of `alpha`."""
    names = list(evidence.arms)
    first, others = evidence.arms[names[0]], [evidence.arms[name] for name in names[1:]]
    each = alpha / max(1, len(others))
    comparisons = [_against(first, arm, name, each) for arm in others for name in METRICS]
    ratio = check_ratio(
        [(parse_split(text, evidence.test).chances(), counts) for text, counts in evidence.first_seen]
    )
    verdict, why = _decide(first.name, [found for found in comparisons if found.metric == metric], ratio)
    return Report(
        evidence=evidence,
        metric=metric,
        alpha=alpha,
        rates={arm.name: {name: _rate(arm.streams[name]) for name in METRICS} for arm in (first, *others)},
        comparisons=comparisons,
        ratio=ratio,
        verdict=verdict,
        why=why,
        made=datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds"),
    )


def _rate(stream: Stream) -> Estimate | None:
    values = stream.values
    return wilson(sum(values), len(values)) if values else None


def _against(first: Arm, arm: Arm, metric: Metric, alpha: float) -> Against:
    a, b = first.streams[metric], arm.streams[metric]
    known: dict[str, tuple[int, int]] = {}
    for text in set(a.splits):
        parts = {share.arm: share.parts for share in parse_split(text, "any").shares}
        known[text] = block_sizes(parts.get(first.name, 0), parts.get(arm.name, 0))
    sizes = [known[text] for text in a.splits] or [(1, 1)]
    found = compare(a.values, b.values, sizes, alpha=alpha)
    verdict: Verdict = "undecided"
    if found.decided is not None:
        higher = found.low >= 0
        verdict = "better" if higher == HIGHER_IS_BETTER[metric] else "worse"
    return Against(arm.name, metric, found, verdict)


def _decide(first: str, found: list[Against], ratio: Ratio) -> tuple[Verdict, str]:
    if not found:
        return "undecided", f"only {first} has told stories: there is nothing to compare it with"
    if ratio.mismatch:
        return "undecided", (
            "the arms did not get the readers that the split promised, so no figure can be trusted until the reason "
            f"is found: {', '.join(f'{arm} {count}' for arm, count in ratio.found.items())}, promised were "
            + ", ".join(f"{arm} {count:.0f}" for arm, count in ratio.expected.items())
        )
    better = [each.arm for each in found if each.verdict == "better"]
    if better:
        return "better", f"{' and '.join(better)} {'is' if len(better) == 1 else 'are'} better than {first}"
    if all(each.verdict == "worse" for each in found):
        worse = [each.arm for each in found]
        return "worse", f"{' and '.join(worse)} {'is' if len(worse) == 1 else 'are'} worse than {first}"
    n = min(min(each.comparison.used) for each in found)
    return (
        "undecided",
        f"{n} visitors of the smaller arm are not enough to tell yet; looking again costs nothing",
    )
