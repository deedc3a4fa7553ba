"""What the rows of a comparison say: the ratio of each figure, target over the other side.

The interval is a paired bootstrap over rounds: both sides of a round are resampled together, so whatever slowed the
machine in that round cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from experiments.benchmark.measures import Figure, Figures, Sample, wall_time
from experiments.benchmark.targets import Target
from experiments.common.statistics import CONFIDENCE, Estimate, ratio_of_sums

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Comparison:
    """The target against another one."""

    against: str
    against_digest: str | None
    ratios: dict[str, Estimate]
    """As thresholds name them: `ttft_ratio`."""
    success_rate: float
    against_success_rate: float
    pairs: int
    """Requests sent to both sides."""
    confidence: float = CONFIDENCE
    """Level of the ratios' intervals."""

    def figures(self) -> Figures:
        return {name: Figure(ratio.value, ratio.n) for name, ratio in self.ratios.items()}


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
    rounds: dict[tuple[int, bool], dict[str, list[Sample]]] = {}
    for row in samples:
        if row.phase == "compare":
            rounds.setdefault((row.number, row.level == 1), {}).setdefault(row.target, []).append(row)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for sides in rounds.values():
        if set(sides) == {"target", "against"} and all(row.ok for side in sides.values() for row in side):
            theirs = _figures(sides["against"])
            for name, value in _figures(sides["target"]).items():
                if value and (other := theirs[name]):
                    pairs.setdefault(f"{name}_ratio", []).append((value, other))
    return {
        name: ratio_of_sums(*zip(*values, strict=True), seed=seed, resamples=RESAMPLES)
        for name, values in pairs.items()
    }


def _figures(rows: Sequence[Sample]) -> dict[str, float | None]:
    """Of one side in one round: of a request alone, or of a batch."""
    row = rows[0]
    if row.level > 1:
        seconds = wall_time(rows)
        return {"total_tokens_per_second": sum(row.tokens for row in rows) / seconds if seconds else None}
    return {
        "generation_time": row.generation_time,
        "ttft": row.ttft,
        "itl": fmean(row.gaps) if row.gaps else None,
        "tokens_per_second": 1 / row.tpot if row.tpot else None,
    }
