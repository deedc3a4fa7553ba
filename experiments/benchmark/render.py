"""A benchmark report in the terminal and as Markdown: summary, timing, stress, comparison, thresholds with verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.benchmark.measures import Sample
from experiments.benchmark.report import Report
from experiments.common.tables import markdown_table, terminal_table

if TYPE_CHECKING:
    from rich.console import Console

Row = tuple[str, ...]
ABSENT = "-"
COLORS = {"PASS": "green", "FAIL": "red", "NOT MEASURED": "yellow"}
TIMES = {"avg": "Average", "median": "Median", "min": "Min", "max": "Max", "p95": "95 % within", "p99": "99 % within"}
LATENCIES = {"ttft": "Time to first token", "itl": "Between tokens", "tpot": "Mean a token"}
LOADS = ("phase", "load", "n", "success", "average", "TTFT p95", "ITL p95", "tokens/s", "at once")


@dataclass(frozen=True, slots=True)
class Section:
    """A titled table. The first column is text, the others are figures."""

    title: str
    columns: Row
    rows: list[Row]


def sections(report: Report) -> Iterator[Section]:
    """All tables of the report; empty ones are left out."""
    for make in (_summary, _timing, _loads, _compared, _validation):
        section = make(report)
        if section.rows:
            yield section


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
        lines += ["", f"## {section.title}", "", *markdown_table(section.columns, section.rows)]
    return "\n".join([*lines, "", f"**Overall validation: {verdict(report)}**"]) + "\n"


def print_report(report: Report, console: Console) -> None:
    """Print the report."""
    console.rule("MODEL BENCHMARK REPORT")
    for fact in _facts(report):
        console.print(fact, markup=False, highlight=False)
    for section in sections(report):
        console.print()
        console.print(terminal_table(section.columns, section.rows, title=section.title, styles=COLORS))
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


def _summary(report: Report) -> Section:
    figures = report.figures
    rows: list[Row] = []
    if "requests" in figures:
        total = round(figures["requests"].value)
        good = round(figures["success_rate"].value * total)
        rows += [("Total requests", str(total)), ("Successful", str(good)), ("Failed", str(total - good))]
        rows.append(("Success rate", _percent(figures["success_rate"].value)))
    for name, label, unit in (
        ("tokens_per_second", "One stream alone", "tokens/s"),
        ("total_tokens_per_second", f"{report.plan.concurrency} streams together", "tokens/s"),
        ("goodput", "Goodput", "requests/s"),
        ("peak_rss_mb", "Memory, at its peak", "MB"),
        ("memory_percent", "Share of this machine's memory", "%"),
    ):
        if name in figures:
            rows.append((label, f"{_number(figures[name].value)} {unit}"))
    if "goodput_share" in figures:
        limits = f"first token ≤ {report.plan.ttft_limit:g} s, {report.plan.itl_limit:g} s a token"
        rows.append((f"Within the limits ({limits})", _percent(figures["goodput_share"].value)))
    failures: Counter[str] = Counter()
    for part in report.phases:
        failures.update(part.failures)
    for kind, count in failures.items():
        rows.append((f"Failed: {kind}", str(count)))
    return Section("Performance summary", ("", "value"), rows)


def _timing(report: Report) -> Section:
    figures = report.figures
    rows: list[Row] = [
        (f"{label} generation time", _seconds(figures[f"{name}_generation_time"].value))
        for name, label in TIMES.items()
        if f"{name}_generation_time" in figures
    ]
    for name, label in LATENCIES.items():
        keys = [f"{name}_p{percent}" for percent in (50, 95, 99)]
        values = [_seconds(figures[key].value) for key in keys if key in figures]
        if values:
            rows.append((f"{label}, p50 / p95 / p99 ({report.latency_phase})", " / ".join(values)))
    if "cold_start_s" in figures:
        rows.append((f"Cold start ({report.cold_start_means})", _seconds(figures["cold_start_s"].value)))
    return Section("Timing metrics", ("", "value"), rows)


def _loads(report: Report) -> Section:
    rows: list[Row] = []
    for part in report.phases:
        if part.phase == "single":
            continue
        figures = part.figures
        level = f"{report.plan.rate:g}/s" if part.phase == "open" else str(part.level)
        latencies = [
            _seconds(figures[name].value) if name in figures else ABSENT
            for name in ("avg_generation_time", "ttft_p95", "itl_p95")
        ]
        throughput = figures.get("total_tokens_per_second")
        rows.append(
            (
                part.phase,
                level,
                str(round(figures["requests"].value)),
                _percent(figures["success_rate"].value),
                *latencies,
                ABSENT if throughput is None else _number(throughput.value),
                str(round(figures["streams_at_once"].value)),
            )
        )
    return Section("Stress test results", LOADS, rows)


def _compared(report: Report) -> Section:
    comparison = report.comparison
    if comparison is None:
        return Section("", (), [])
    rows: list[Row] = []
    for name, ratio in comparison.ratios.items():
        word = "differs" if ratio.excludes(1) else "no difference shown"
        rows.append((name, f"{ratio.value:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}", str(ratio.n), word))
    rates = f"{_percent(comparison.success_rate)} against {_percent(comparison.against_success_rate)}"
    rows.append(("success rate", rates, "", str(comparison.pairs), ""))
    title = f"Against {comparison.against}, in turn"
    return Section(title, ("ratio", "value", "95 % interval", "pairs", ""), rows)


def _validation(report: Report) -> Section:
    rows: list[Row] = []
    for check in report.checks:
        value = ABSENT if check.value is None else _number(check.value)
        rows.append((check.threshold.metric, value, str(check.threshold), check.verdict))
    return Section("Validation results", ("metric", "value", "threshold", "verdict"), rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _seconds(value: float) -> str:
    """`2.34 s`, `12.3 ms`."""
    return f"{value:.2f} s" if value >= 0.9995 else f"{value * 1e3:.3g} ms"


def _number(value: float) -> str:
    """Three figures or more, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.2g}"
