"""Two targets in one run, taking turns, so that a machine whose speed drifts slows them both alike.

Each round asks both the same: a story alone, then a few at once; who begins is drawn from the seed. What is told is
the ratio of the means, target over against, with a 95 % interval from a paired bootstrap over the rounds: rounds
are drawn again, both sides of one together, so what a round's moment did to both cancels out.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from experiments.benchmark.load.closed_loop import Done
from experiments.benchmark.load.one import Clock, ask
from experiments.benchmark.measures import Figure, Figures, wall_time
from experiments.benchmark.plan import Plan
from experiments.benchmark.sample import Sample
from experiments.benchmark.targets.base import Target
from experiments.common.statistics import CONFIDENCE, Estimate, ratio_of_sums

RESAMPLES = 10_000
TOGETHER = "total_tokens_per_second"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The target against another one."""

    against: str
    against_digest: str | None
    ratios: dict[str, Estimate]
    success_rate: float
    against_success_rate: float
    pairs: int
    """Stories asked of both sides."""

    def figures(self) -> Figures:
        """The ratios as thresholds name them."""
        return {f"{name}_ratio": Figure(ratio.value, ratio.n) for name, ratio in self.ratios.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **dataclasses.asdict(self),
            "ratios": {f"{name}_ratio": dataclasses.asdict(ratio) for name, ratio in self.ratios.items()},
            "confidence": CONFIDENCE,
        }


async def compare(
    target: Target, against: Target, plan: Plan, clock: Clock, *, done: Done = lambda sample: None
) -> list[Sample]:
    """Ask both in turn; rows of `level` 1 were alone, those of another level were asked together."""
    rng = np.random.default_rng([plan.seed, 0x7A12])
    until = None if plan.duration is None else clock.now() + plan.duration
    sides = {"target": target, "against": against}
    together = max(2, plan.concurrency)
    samples: list[Sample] = []
    number = 0
    while (plan.limit is None or number < plan.limit) and (until is None or clock.now() < until):
        order = list(sides) if rng.random() < 0.5 else list(reversed(sides))
        # A round of several is `together` times as much work, so only each fourth round has one.
        for level in (1, together) if number % 4 == 0 else (1,):
            for side in order:
                rows = await asyncio.gather(
                    *(
                        ask(
                            sides[side],
                            plan.request("compare", number * together + index, level),
                            clock,
                            phase="compare",
                            level=level,
                            number=number,
                            timeout=plan.timeout,
                        )
                        for index in range(level)
                    )
                )
                for row in rows:
                    row.target = side
                    samples.append(row)
                    done(row)
        number += 1
    return samples


def ratios_of(samples: Sequence[Sample], *, seed: int) -> dict[str, Estimate]:
    """The ratios of a comparison's rows, by figure. A round in which either side failed counts in none."""
    rows = [sample for sample in samples if sample.phase == "compare"]
    ratios = {}
    for name, measure in _ALONE.items():
        values = _paired([row for row in rows if row.level == 1], partial(_of_one, measure))
        if values:
            ratios[name] = _ratio(values, seed)
    values = _paired([row for row in rows if row.level > 1], _total_rate)
    if values:
        ratios[TOGETHER] = _ratio(values, seed)
    return ratios


def _ratio(pairs: Sequence[tuple[float, float]], seed: int) -> Estimate:
    """Mean of the target's values over mean of the other side's."""
    ours, theirs = zip(*pairs, strict=True)
    return ratio_of_sums(ours, theirs, seed=seed, resamples=RESAMPLES)


def summarise(samples: Sequence[Sample], against: Target, *, seed: int) -> Comparison:
    """A comparison's ratios and, failed rounds included, its success rates."""
    rows = [sample for sample in samples if sample.phase == "compare"]
    ours = [row for row in rows if row.target == "target"]
    theirs = [row for row in rows if row.target == "against"]
    return Comparison(
        against=against.name,
        against_digest=against.digest,
        ratios=ratios_of(samples, seed=seed),
        success_rate=_success(ours),
        against_success_rate=_success(theirs),
        pairs=min(len(ours), len(theirs)),
    )


def _mean_gap(sample: Sample) -> float | None:
    gaps = sample.gaps
    return sum(gaps) / len(gaps) if gaps else None


_ALONE: dict[str, Callable[[Sample], float | None]] = {
    "generation_time": lambda sample: sample.generation_time,
    "ttft": lambda sample: sample.ttft,
    "itl": _mean_gap,
    "tokens_per_second": lambda sample: 1 / sample.tpot if sample.tpot else None,
}


def _of_one(measure: Callable[[Sample], float | None], group: Sequence[Sample]) -> float | None:
    return measure(group[0])


def _total_rate(group: Sequence[Sample]) -> float | None:
    seconds = wall_time(group)
    return sum(sample.tokens for sample in group) / seconds if seconds > 0 else None


def _paired(
    rows: Sequence[Sample], measure: Callable[[list[Sample]], float | None]
) -> list[tuple[float, float]]:
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


def _success(rows: Sequence[Sample]) -> float:
    return sum(row.ok for row in rows) / len(rows) if rows else 0.0
