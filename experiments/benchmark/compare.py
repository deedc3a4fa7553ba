"""What the rows of a comparison say: the ratio of each figure, target over the other side.

The interval is a paired bootstrap over rounds: both sides of a round are resampled together, so whatever slowed the
machine in that round cancels out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.benchmark.measures import Figure, Figures, Sample, wall_time
from experiments.benchmark.targets import Target
from experiments.common.statistics import CONFIDENCE, Estimate, ratio_of_sums

RESAMPLES = 10_000
Measure = Callable[[Sequence[Sample]], float | None]
"""A figure of one side's rows in one round."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The target against another one."""

    against: str
    against_digest: str | None
    ratios: dict[str, Estimate]
    success_rate: float
    against_success_rate: float
    pairs: int
    """Requests sent to both sides."""

    def figures(self) -> Figures:
        """The ratios as thresholds name them."""
        return {f"{name}_ratio": Figure(ratio.value, ratio.n) for name, ratio in self.ratios.items()}

    def as_dict(self) -> dict[str, Any]:
        ratios = {f"{name}_ratio": dataclasses.asdict(ratio) for name, ratio in self.ratios.items()}
        return dataclasses.asdict(self) | {"ratios": ratios, "confidence": CONFIDENCE}


def summarise(samples: Sequence[Sample], against: Target, *, seed: int) -> Comparison:
    """A comparison's ratios and, failed rounds included, its success rates."""
    rows = [sample for sample in samples if sample.phase == "compare"]
    ours = [row.ok for row in rows if row.target == "target"]
    theirs = [row.ok for row in rows if row.target == "against"]
    return Comparison(
        against=against.name,
        against_digest=against.digest,
        ratios=ratios_of(samples, seed=seed),
        success_rate=sum(ours) / len(ours) if ours else 0.0,
        against_success_rate=sum(theirs) / len(theirs) if theirs else 0.0,
        pairs=min(len(ours), len(theirs)),
    )


def ratios_of(samples: Sequence[Sample], *, seed: int) -> dict[str, Estimate]:
    """The ratios of a comparison's rows, by figure. A round in which either side failed counts in none."""
    rows = [sample for sample in samples if sample.phase == "compare"]
    alone = [row for row in rows if row.level == 1]
    batches = [row for row in rows if row.level > 1]
    pairs = {name: _paired(alone, measure) for name, measure in _ALONE.items()}
    pairs["total_tokens_per_second"] = _paired(batches, _total_rate)
    return {
        name: ratio_of_sums(*zip(*values, strict=True), seed=seed, resamples=RESAMPLES)
        for name, values in pairs.items()
        if values
    }


def _mean_gap(rows: Sequence[Sample]) -> float | None:
    gaps = rows[0].gaps
    return sum(gaps) / len(gaps) if gaps else None


def _rate(rows: Sequence[Sample]) -> float | None:
    return 1 / rows[0].tpot if rows[0].tpot else None


def _total_rate(rows: Sequence[Sample]) -> float | None:
    seconds = wall_time(rows)
    return sum(sample.tokens for sample in rows) / seconds if seconds > 0 else None


_ALONE: dict[str, Measure] = {
    "generation_time": lambda rows: rows[0].generation_time,
    "ttft": lambda rows: rows[0].ttft,
    "itl": _mean_gap,
    "tokens_per_second": _rate,
}


def _paired(rows: Sequence[Sample], measure: Measure) -> list[tuple[float, float]]:
    """(ours, theirs) of each round in which both sides succeeded and have such a figure."""
    rounds: dict[int, dict[str, list[Sample]]] = {}
    for row in rows:
        rounds.setdefault(row.number, {}).setdefault(row.target, []).append(row)
    pairs = []
    for sides in rounds.values():
        if set(sides) == {"target", "against"} and all(row.ok for side in sides.values() for row in side):
            ours, theirs = measure(sides["target"]), measure(sides["against"])
            if ours and theirs:
                pairs.append((ours, theirs))
    return pairs
