"""What a benchmark leaves: the report in the terminal, as Markdown and as pictures, and a run in MLflow.

The run is logged completely, tied to the model's digest, and read back as evidence for the gate. Figures are computed
again from the raw rows when they are read back. Evidence whose figures do not follow from its rows, or whose rows are
gone, is an `EvidenceError`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from experiments.benchmark.load import Plan
from experiments.benchmark.measures import (
    COUNTED,
    Figure,
    Figures,
    Sample,
    groups,
    headline,
    latency_phase,
    phase_figures,
)
from experiments.benchmark.report import Comparison, Report
from experiments.common.evidence_runs import DIGEST, EvidenceStore, StoredEvidence
from experiments.common.tables import (
    ABSENT,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    Table,
    new_figure,
    rounded,
    save,
    shown,
)
from model.validation import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from mlflow.entities import Run
    from pandas import DataFrame
    from rich.console import Console

EXPERIMENT = "story-benchmark"
SAMPLES, REPORT, PAGE, FIGURES = "samples.parquet", "report.json", "report.md", "figures"
AGAINST, EVIDENCE = "against.digest", "evidence"
"""Tags: the digest of the other side of a comparison, and `benchmark` if the run is enough to judge by."""
MEMORY = ("peak_rss_mb", "memory_percent")
"""Figures that do not follow from the rows."""
CLOSE = 1e-9


class StoredReport(Record):
    """`report.json`, which has the figures at its top."""

    model_config = ConfigDict(extra="allow")

    digest: str
    plan: Plan
    n: dict[str, int]
    comparison: Comparison | None

    def figures(self) -> Figures:
        """The figures that it states."""
        stated = self.model_extra or {}
        return {name: Figure(stated[name], n) for name, n in self.n.items()}


class BenchmarkEvidence(StoredEvidence):
    """One run as the gate reads it."""

    experiment: ClassVar[str] = EXPERIMENT
    wanted: ClassVar[Mapping[str, str]] = {EVIDENCE: "benchmark"}

    figures: Figures
    """Computed again from `samples`; memory and ratios are those of the report."""
    samples: tuple[Sample, ...]
    report: StoredReport

    @classmethod
    def contents(cls, run: Run, artifact: Callable[[str], bytes]) -> dict[str, Any]:
        """See `StoredEvidence`."""
        samples = read_samples(artifact(SAMPLES))
        report = StoredReport.model_validate_json(artifact(REPORT))
        tagged = run.data.tags[DIGEST]
        if report.digest != tagged:
            raise ValueError(f"it is tagged for {tagged[:12]} and was of {report.digest[:12]}")
        return {"figures": _recomputed(report, samples), "samples": samples, "report": report}


def to_frame(samples: Sequence[Sample]) -> DataFrame:
    """One row a request, with `first` and `last` beside the times they are derived from."""
    from pandas import DataFrame

    rows = [{**dataclasses.asdict(row), "first": row.first, "last": row.last} for row in samples]
    names = [*(field.name for field in dataclasses.fields(Sample)), "first", "last"]
    return DataFrame(rows, columns=names).astype({"first": "float64", "last": "float64"})


def read_samples(content: bytes) -> list[Sample]:
    """The rows of a parquet file that `to_frame` was written to. Raises `ValueError` for anything else."""
    from pyarrow import BufferReader, parquet

    rows = parquet.read_table(BufferReader(content)).to_pylist()
    return TypeAdapter(list[Sample]).validate_python(rows)


def log_benchmark(report: Report, samples: Sequence[Sample], uri: str) -> str:
    """Log a run with all its artifacts to the store at `uri`; returns the run's id.

    Raises:
        InputError: the store cannot be used. `MissingExtraError`: MLflow is not installed.
    """
    name = f"{report.target} {report.digest[:8]}" if report.digest else report.target
    began = int(datetime.fromisoformat(report.began).timestamp() * 1000)
    with EvidenceStore(uri, EXPERIMENT).run(name, _tags(report), began=began) as run:
        plan = report.plan.as_dict() | {"phases": ",".join(report.plan.phases)}
        run.log_params({key: str(value) for key, value in plan.items()} | {"target": report.target})
        run.log_metrics({key: figure.value for key, figure in report.figures.items()})
        for part in report.phases:
            figures = {f"{part.phase}/{key}": figure.value for key, figure in part.figures.items()}
            run.log_metrics(figures, step=part.level)
        logged = dataclasses.replace(report, run_id=run.run_id)
        with run.artifacts() as folder:
            to_frame(samples).to_parquet(folder / SAMPLES, index=False)
            text = json.dumps(logged.as_dict(), ensure_ascii=False, indent=2)
            (folder / REPORT).write_text(text + "\n", encoding="utf-8")
            (folder / PAGE).write_text(markdown(logged), encoding="utf-8")
            draw_figures(samples, folder / FIGURES)
    return run.run_id


def _recomputed(report: StoredReport, samples: Sequence[Sample]) -> Figures:
    """The headline figures out of the rows. Raises `ValueError` if the report states anything else."""
    own = [sample for sample in samples if sample.target == "target"]
    stated, plan = report.figures(), report.plan
    ratios = report.comparison.ratios if report.comparison is not None else {}
    figures = headline(own, ttft_limit=plan.ttft_limit, itl_limit=plan.itl_limit)
    figures |= {name: figure for name, figure in stated.items() if name in MEMORY}
    figures |= {name: Figure(ratio.value, ratio.n) for name, ratio in ratios.items()}
    wrong = [
        name
        for name in sorted(figures.keys() | stated.keys())
        if name not in figures
        or name not in stated
        or stated[name].n != figures[name].n
        or not math.isclose(stated[name].value, figures[name].value, rel_tol=CLOSE)
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{', '.join(wrong[:5])}{more} do not follow from its rows")
    return figures


def _tags(report: Report) -> dict[str, str]:
    tags = {**report.origin.tags(), "thresholds.digest": report.thresholds_digest}
    tags["passed"] = str(report.passed).lower()
    for when, load in zip(("before", "after"), report.load, strict=True):
        tags[f"machine.load.{when}"] = f"{load:.2f}"
    if report.digest is not None:
        tags[DIGEST] = report.digest
        if set(report.plan.phases) & set(COUNTED):
            tags[EVIDENCE] = "benchmark"
        if report.comparison is not None and report.comparison.against_digest is not None:
            tags[AGAINST] = report.comparison.against_digest
    if report.comparison is not None:
        tags["against"] = report.comparison.against
    return tags


Row = tuple[str, ...]
COLORS = {"PASS": "green", "FAIL": "red", "NOT MEASURED": "yellow"}
TIMES = {"avg": "Average", "median": "Median", "min": "Min", "max": "Max", "p95": "95 % within", "p99": "99 % within"}
LATENCIES = {"ttft": "Time to first token", "itl": "Between tokens", "tpot": "Mean a token"}
REASONS = 3
"""Messages shown of each kind of failure."""
LOADS = ("phase", "load", "n", "success", "average", "TTFT p95", "ITL p95", "tokens/s", "at once")
SIZE = (7.0, 4.2)
BINS = 40
PHASE_COLORS = {"single": BLUE, "concurrent": ORANGE, "stress": PURPLE, "open": GREEN}
MOST_STREAMS = 120
"""Rows of the timeline; more are not distinguishable in a picture."""

Draw = Callable[["Axes", Sequence[Sample]], None]


def sections(report: Report) -> list[Table]:
    """All tables of the report; empty ones are left out."""
    makers = (_summary, _failures, _timing, _loads, _compared, _validation)
    return [section for section in (make(report) for make in makers) if section.rows]


def verdict(report: Report) -> str:
    """The overall verdict: `PASSED`, `FAILED (success_rate)`, `PASSED (2 not measured)`."""
    failed = [check.threshold.metric for check in report.checks if check.passed is False]
    missing = sum(check.passed is None for check in report.checks)
    more = failed or ([f"{missing} not measured"] if missing else [])
    return ("PASSED" if report.passed else "FAILED") + (f" ({', '.join(more)})" if more else "")


def markdown(report: Report) -> str:
    """The report as Markdown, for a job summary or a pull request."""
    lines = ["# Model benchmark report", "", *(f"- {fact}" for fact in _facts(report))]
    for section in sections(report):
        lines += ["", f"## {section.title}", "", *section.markdown()]
    return "\n".join([*lines, "", f"**Overall validation: {verdict(report)}**"]) + "\n"


def print_report(report: Report, console: Console) -> None:
    """Print the report."""
    console.rule("MODEL BENCHMARK REPORT")
    for fact in _facts(report):
        console.print(fact, markup=False, highlight=False)
    for section in sections(report):
        console.print()
        console.print(section)
    console.print()
    style = "bold green" if report.passed else "bold red"
    console.print(f"Overall validation: {verdict(report)}", style=style)


def progress_line(sample: Sample) -> str:
    """The progress bar's text after a request."""
    name = f"{sample.phase} at {sample.level}" if sample.level > 1 else sample.phase
    return name if sample.ok else f"{name}: {sample.error}"


def _facts(report: Report) -> list[str]:
    machine = report.origin.machine
    facts = [
        f"target: {report.target}",
        f"model: {report.digest[:12] if report.digest else 'unknown'}",
        f"machine: {machine.get('cores')} cores, {machine.get('cpu', machine.get('architecture'))}, "
        f"load {report.load[0]:.1f} before and {report.load[1]:.1f} after",
        f"began {report.began}, took {report.seconds:.0f} s; seed {report.plan.seed}, "
        f"at most {report.plan.max_tokens} tokens a story",
    ]
    if report.origin.git_sha:
        changed = " with changes" if report.origin.git_dirty else ""
        facts.append(f"code: {report.origin.git_sha[:12]}{changed}")
    if report.run_id:
        facts.append(f"MLflow run: {report.run_id}")
    return facts + [f"note: {note}" for note in report.notes]


def _summary(report: Report) -> Table:
    figures, plan = report.figures, report.plan
    rows: list[Row] = []
    if "requests" in figures:
        total = round(figures["requests"].value)
        good = round(figures["success_rate"].value * total)
        rows += [("Total requests", str(total)), ("Successful", str(good)), ("Failed", str(total - good))]
    limits = f"first token ≤ {plan.ttft_limit:g} s, {plan.itl_limit:g} s a token"
    for name, label, unit in (
        ("success_rate", "Success rate", "share"),
        ("tokens_per_second", "One stream alone", "tokens/s"),
        ("total_tokens_per_second", f"{plan.concurrency} streams together", "tokens/s"),
        ("goodput", "Goodput", "requests/s"),
        ("peak_rss_mb", "Memory, at its peak", "MB"),
        ("memory_percent", "Share of this machine's memory", "%"),
        ("goodput_share", f"Within the limits ({limits})", "share"),
    ):
        if name in figures:
            value = figures[name].value
            rows.append((label, f"{100 * value:.1f} %" if unit == "share" else f"{rounded(value)} {unit}"))
    return Table(("", "value"), rows, title="Performance summary")


def _failures(report: Report) -> Table:
    rows: list[Row] = []
    for kind, reasons in report.reasons.items():
        shown_first = list(reasons.items())[:REASONS]
        rows += [(kind, str(count), message) for message, count in shown_first]
        if rest := sum(reasons.values()) - sum(count for _, count in shown_first):
            rows.append((kind, str(rest), "other reasons"))
    return Table(("kind", "failed", "reason"), rows, title="Failed requests", text={"reason"})


def _timing(report: Report) -> Table:
    timed = [(f"{label} generation time", [f"{name}_generation_time"]) for name, label in TIMES.items()]
    timed += [
        (f"{label}, p50 / p95 / p99 ({report.latency_phase})", [f"{name}_p{percent}" for percent in (50, 95, 99)])
        for name, label in LATENCIES.items()
    ]
    timed.append((f"Cold start ({report.cold_start_means})", ["cold_start_s"]))
    rows = [
        (label, " / ".join(_seconds(report.figures[name].value) for name in names))
        for label, names in timed
        if names[0] in report.figures
    ]
    return Table(("", "value"), rows, title="Timing metrics")


def _loads(report: Report) -> Table:
    rows: list[Row] = []
    for part in report.phases:
        if part.phase == "single":
            continue
        values = {name: figure.value for name, figure in part.figures.items()}
        total = values.get("total_tokens_per_second")
        rows.append(
            (
                part.phase,
                f"{report.plan.rate:g}/s" if part.phase == "open" else str(part.level),
                f"{values['requests']:.0f}",
                f"{100 * values['success_rate']:.1f} %",
                *(_seconds(values.get(name)) for name in ("avg_generation_time", "ttft_p95", "itl_p95")),
                ABSENT if total is None else rounded(total),
                f"{values['streams_at_once']:.0f}",
            )
        )
    return Table(LOADS, rows, title="Stress test results")


def _compared(report: Report) -> Table:
    found, rows = report.comparison, []
    if found is not None:
        for name, ratio in found.ratios.items():
            word = "differs" if ratio.excludes(1) else "no difference shown"
            interval = f"{ratio.low:.3f} to {ratio.high:.3f}"
            rows.append((name.removesuffix("_ratio"), f"{ratio.value:.3f}", interval, str(ratio.n), word))
        rates = f"{100 * found.success_rate:.1f} % against {100 * found.against_success_rate:.1f} %"
        rows.append(("success rate", rates, "", str(found.pairs), ""))
    title = None if found is None else f"Against {found.against}, in turn"
    return Table(("ratio", "value", "95 % interval", "pairs", ""), rows, title=title)


def _validation(report: Report) -> Table:
    rows = []
    for check in report.checks:
        value = ABSENT if check.value is None else rounded(check.value)
        rows.append((check.threshold.metric, value, str(check.threshold), check.verdict))
    columns = ("metric", "value", "threshold", "verdict")
    return Table(columns, rows, title="Validation results", styles=COLORS)


def _seconds(value: float | None) -> str:
    """`2.34 s`, `12.3 ms`."""
    if value is None or value >= 0.9995:
        return shown(value, ".2f", " s")
    return shown(1e3 * value, ".3g", " ms")


def draw_figures(samples: Sequence[Sample], folder: Path) -> list[Path]:
    """Draw every picture for which there are rows; returns the files, PNG."""
    own = [sample for sample in samples if sample.target == "target" and sample.phase in PHASE_COLORS]
    phase = latency_phase(own)
    latency = [sample for sample in own if sample.phase == phase and sample.ok]
    pictures: dict[str, tuple[Draw, list[Sample]]] = {
        "latency_cdf": (_latency_cdf, [sample for sample in own if sample.phase != "stress" and sample.ok]),
        "ttft_histogram": (_ttft_histogram, [sample for sample in latency if sample.ttft is not None]),
        "itl_histogram": (_itl_histogram, [sample for sample in latency if sample.gaps]),
        "throughput": (_throughput, [sample for sample in own if sample.phase == "stress"]),
        "timeline": (_timeline, [sample for sample in own if sample.phase == phase != "single"]),
    }
    paths = []
    for name, (draw, rows) in pictures.items():
        if rows:
            figure, (axes,) = new_figure(*SIZE)
            draw(axes, rows)
            paths.append(save(figure, folder / f"{name}.png"))
    return paths


def _latency_cdf(axes: Axes, rows: Sequence[Sample]) -> None:
    for (phase, _), group in groups(rows, "single", "concurrent", "open").items():
        label = f"{phase} (n = {len(group)})"
        axes.ecdf([sample.generation_time for sample in group], label=label, color=PHASE_COLORS[phase])
    axes.set(title="Generation time", xlabel="seconds", ylabel="share of requests")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)


def _ttft_histogram(axes: Axes, rows: Sequence[Sample]) -> None:
    _histogram(axes, rows, "Time to first token", [sample.ttft for sample in rows if sample.ttft is not None])
    axes.set_ylabel("requests")


def _itl_histogram(axes: Axes, rows: Sequence[Sample]) -> None:
    _histogram(axes, rows, "Time between tokens", [gap for sample in rows for gap in sample.gaps])
    axes.set_yscale("log")
    axes.set_ylabel("gaps (log)")


def _histogram(axes: Axes, rows: Sequence[Sample], what: str, seconds: list[float]) -> None:
    axes.hist([1e3 * value for value in seconds], bins=BINS, color=PHASE_COLORS[rows[0].phase])
    axes.set(title=f"{what} ({rows[0].phase}, n = {len(seconds):,})", xlabel="milliseconds")


def _throughput(axes: Axes, rows: Sequence[Sample]) -> None:
    levels, rates = [], []
    for (_, level), group in groups(rows, "stress").items():
        figures = phase_figures(group, ttft_limit=1.0, itl_limit=1.0)
        if "total_tokens_per_second" in figures:
            levels.append(level)
            rates.append(figures["total_tokens_per_second"].value)
    axes.plot(levels, rates, marker="o", color=PHASE_COLORS["stress"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(levels, [str(level) for level in levels])
    axes.set_ylim(bottom=0)
    axes.set(title="Throughput against concurrency", xlabel="requests open at once", ylabel="tokens/s in total")


def _timeline(axes: Axes, rows: Sequence[Sample]) -> None:
    """One bar a request: grey while it waits, coloured while it streams, red where it failed."""
    begin = min(sample.scheduled for sample in rows)
    for place, sample in enumerate(rows[:MOST_STREAMS]):
        first = sample.ended if sample.first is None else sample.first
        axes.barh(place, first - sample.scheduled, left=sample.scheduled - begin, color=GREY)
        # A failed request without a token would have no length and not be visible.
        length = max(sample.ended - first, 0.0 if sample.ok else 0.01)
        axes.barh(place, length, left=first - begin, color=PHASE_COLORS[sample.phase] if sample.ok else RED)
    axes.invert_yaxis()
    axes.set(title=f"Streams ({rows[0].phase})", xlabel="seconds", ylabel="request")
