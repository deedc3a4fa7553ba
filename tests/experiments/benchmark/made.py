"""Rows made by hand, whose figures can be worked out by hand; a whole run of them, and the report on it."""

from __future__ import annotations

from typing import Any

from experiments.benchmark.load import Plan
from experiments.benchmark.measures import Figure, Figures, Phase, Sample
from experiments.benchmark.report import Comparison, Report, make_report
from experiments.common.statistics import Estimate
from experiments.common.thresholds import Thresholds, load_thresholds
from training.tracking.provenance import Provenance

DIGEST = "ab" * 32
OTHER = "cd" * 32
ORIGIN = Provenance(git_sha="f" * 40, git_dirty=False, packages={"numpy": "2"}, machine={"cores": 2, "cpu": "Z80"})
MEMORY = {"peak_rss_mb": Figure(150.0, 9), "memory_percent": Figure(0.6, 9)}


def row(
    phase: Phase = "single",
    *,
    due: float = 0.0,
    arrivals: tuple[float, ...] = (0.5, 1.0, 1.5),
    ended: float = 2.0,
    **options: Any,
) -> Sample:
    """A story of one token a message, sent when it was due."""
    values: dict[str, Any] = {
        "level": 1,
        "number": 0,
        "seed": 0,
        "started": due,
        "tokens": len(arrivals),
        "counts": [1] * len(arrivals),
        "finish": "stop",
        **options,
    }
    return Sample(phase=phase, scheduled=due, arrivals=list(arrivals), ended=ended, **values)


def failed(phase: Phase = "single", *, error: str = "busy", due: float = 0.0, **options: Any) -> Sample:
    """A request that brought nothing."""
    return row(phase, due=due, arrivals=(), ended=due + 0.1, error=error, finish="", **{"message": "no", **options})


def samples() -> list[Sample]:
    """Each phase with a few stories, one of the concurrent ones failed, and one pair of a comparison."""
    return [
        row("cold", arrivals=(1.25,), ended=1.25),
        row("warmup", ended=50.0),
        *(
            row("single", number=n, due=2.0 * n, arrivals=(2.0 * n + 0.5, 2.0 * n + 0.52), ended=2.0 * n + 1)
            for n in range(3)
        ),
        *(row("concurrent", level=4, number=n, due=10, arrivals=(10.2 + n / 10, 11.0), ended=12.0) for n in range(3)),
        failed("concurrent", level=4, number=3, due=10.0, error="busy"),
        *(
            row("stress", level=level, number=n, due=20.0, arrivals=(20.5, 21.0, 22.0), ended=22.5)
            for level in (1, 4)
            for n in range(level)
        ),
        *(
            row("open", level=0, number=n, due=30.0 + n, arrivals=(30.2 + n, 30.25 + n), ended=31.0 + n, tokens=2)
            for n in range(4)
        ),
        row("compare", due=40.0, arrivals=(40.5,), ended=41.0),
        row("compare", due=41.0, arrivals=(41.4,), ended=42.0, target="against"),
    ]


def comparison() -> Comparison:
    return Comparison(
        against="local (older)",
        against_digest=OTHER,
        ratios={"ttft_ratio": Estimate(1.1, 0.9, 1.3, 20), "tokens_per_second_ratio": Estimate(0.5, 0.45, 0.55, 20)},
        success_rate=1.0,
        against_success_rate=0.95,
        pairs=20,
    )


def report(
    rows: list[Sample] | None = None,
    *,
    digest: str | None = DIGEST,
    compared: Comparison | None = None,
    thresholds: Thresholds | None = None,
    memory: Figures = MEMORY,
    began: str = "2026-11-24T12:00:00.000+00:00",
    plan: Plan | None = None,
) -> Report:
    return make_report(
        samples() if rows is None else rows,
        target="local",
        digest=digest,
        began=began,
        seconds=61.5,
        plan=plan or Plan(concurrency=4),
        cold_start_means="a new process",
        memory=memory,
        comparison=compared,
        thresholds=thresholds or load_thresholds(),
        origin=ORIGIN,
        load=(0.5, 1.5),
    )
