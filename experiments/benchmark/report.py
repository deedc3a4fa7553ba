"""What a run found, as one record: figures, phases, failures, thresholds. Every output is made from it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from experiments.benchmark.load import Plan
from experiments.benchmark.measures import (
    Figure,
    Figures,
    Phase,
    Sample,
    failure_reasons,
    failures,
    groups,
    headline,
    latency_phase,
    phase_figures,
    wall_time,
)
from experiments.benchmark.targets import Target
from experiments.common.statistics import CONFIDENCE, Estimate, ratio_of_sums
from experiments.common.thresholds import Threshold, Thresholds
from training.tracking.provenance import Provenance

RATIO_RESAMPLES = 10_000
REPORTED: tuple[Phase, ...] = ("single", "concurrent", "stress", "open")


@dataclass(frozen=True, slots=True)
class Check:
    """One threshold compared with its figure."""

    threshold: Threshold
    value: float | None
    """None: the phase that measures it was not run, or none of its requests succeeded."""
    n: int

    @property
    def passed(self) -> bool | None:
        return None if self.value is None else self.threshold.holds(self.value)

    @property
    def verdict(self) -> str:
        """`PASS`, `FAIL` or `NOT MEASURED`."""
        return {True: "PASS", False: "FAIL", None: "NOT MEASURED"}[self.passed]

    def as_dict(self) -> dict[str, Any]:
        return self.threshold.as_dict() | {"value": self.value, "n": self.n, "passed": self.passed}


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """One phase, or one level of the stress phase."""

    phase: Phase
    level: int
    figures: Figures
    failures: dict[str, int]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run."""

    target: str
    digest: str | None
    began: str
    """UTC, ISO 8601."""
    seconds: float
    plan: Plan
    figures: Figures
    latency_phase: Phase | None
    """Where TTFT, ITL, TPOT and goodput come from."""
    cold_start_means: str
    reasons: dict[str, dict[str, int]]
    """Failed requests of all phases, warm-up and cold start included, by kind and message."""
    phases: tuple[PhaseReport, ...]
    checks: tuple[Check, ...]
    thresholds_digest: str
    comparison: Comparison | None
    origin: Provenance
    load: tuple[float, float]
    """The machine's one-minute load average before and after; NaN where there is none."""
    run_id: str | None = None
    """MLflow's, once it is logged."""
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not any(check.passed is False for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values; the headline figures at the top, under the names that MLflow and thresholds use."""
        same = ("target", "digest", "passed", "latency_phase", "cold_start_means", "reasons", "thresholds_digest")
        return {
            **{name: getattr(self, name) for name in (*same, "began", "seconds", "run_id")},
            **_values(self.figures),
            "n": {name: figure.n for name, figure in self.figures.items()},
            "phases": [
                {"phase": part.phase, "level": part.level, **_values(part.figures), "failures": part.failures}
                for part in self.phases
            ],
            "validation": [check.as_dict() for check in self.checks],
            "comparison": asdict(self.comparison) if self.comparison else None,
            "plan": self.plan.as_dict(),
            "provenance": self.origin.as_dict(),
            "load_average": list(self.load),
            "notes": list(self.notes),
        }


def make_report(
    samples: Sequence[Sample],
    *,
    plan: Plan,
    digest: str | None,
    memory: Figures,
    comparison: Comparison | None,
    thresholds: Thresholds,
    **facts: Any,
) -> Report:
    """Compute all figures of a run's rows and check the thresholds.

    `memory` has the figures of the processes that served, `facts` are the report's other fields.
    """
    limits = {"ttft_limit": plan.ttft_limit, "itl_limit": plan.itl_limit}
    own = [sample for sample in samples if sample.target == "target"]
    figures = headline(own, **limits) | memory | (comparison.figures() if comparison is not None else {})
    notes = []
    if digest is None:
        notes.append("the target does not state its model's digest: these figures are evidence for no version")
    if not memory:
        notes.append("the serving process is not on this machine or not visible: memory was not measured")
    return Report(
        plan=plan,
        digest=digest,
        figures=figures,
        latency_phase=latency_phase(own),
        reasons=failure_reasons(samples),
        phases=tuple(
            PhaseReport(phase, level, phase_figures(rows, **limits), failures(rows))
            for (phase, level), rows in groups(own, *REPORTED).items()
        ),
        checks=tuple(checks(figures, thresholds, compared=comparison is not None)),
        thresholds_digest=thresholds.digest,
        comparison=comparison,
        notes=tuple(notes),
        **facts,
    )


def checks(figures: Figures, thresholds: Thresholds, *, compared: bool) -> Iterable[Check]:
    """The benchmark's thresholds, and of a comparison those on its ratios."""
    for threshold in thresholds:
        ratio = threshold.scope == "compare" and threshold.unit == "ratio"
        if threshold.scope == "benchmark" or (compared and ratio):
            figure = figures.get(threshold.metric)
            yield Check(threshold, figure.value if figure else None, figure.n if figure else 0)


def _values(figures: Figures) -> dict[str, float]:
    return {name: figure.value for name, figure in figures.items()}


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
    """The ratios of a comparison's rows, by figure. A round in which either side failed counts in none.

    The interval is a paired bootstrap over rounds: both sides of a round are resampled together, so whatever slowed the
    machine in that round cancels out.
    """
    rounds: dict[tuple[int, bool], dict[str, list[Sample]]] = {}
    for row in samples:
        if row.phase == "compare":
            rounds.setdefault((row.number, row.level == 1), {}).setdefault(row.target, []).append(row)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for sides in rounds.values():
        if set(sides) == {"target", "against"} and all(row.ok for side in sides.values() for row in side):
            theirs = _round_figures(sides["against"])
            for name, value in _round_figures(sides["target"]).items():
                if value and (other := theirs[name]):
                    pairs.setdefault(f"{name}_ratio", []).append((value, other))
    return {
        name: ratio_of_sums(*zip(*values, strict=True), seed=seed, resamples=RATIO_RESAMPLES)
        for name, values in pairs.items()
    }


def _round_figures(rows: Sequence[Sample]) -> dict[str, float | None]:
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
