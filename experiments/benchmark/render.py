"""A benchmark report in the terminal and as Markdown: summary, timing, stress, comparison, thresholds with verdicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.benchmark.measures import Sample
from experiments.benchmark.report import Report
from experiments.common.tables import ABSENT, Table, rounded, shown

if TYPE_CHECKING:
    from rich.console import Console

Row = tuple[str, ...]
COLORS = {"PASS": "green", "FAIL": "red", "NOT MEASURED": "yellow"}
TIMES = {"avg": "Average", "median": "Median", "min": "Min", "max": "Max", "p95": "95 % within", "p99": "99 % within"}
LATENCIES = {"ttft": "Time to first token", "itl": "Between tokens", "tpot": "Mean a token"}
REASONS = 3
"""Messages shown of each kind of failure."""
LOADS = ("phase", "load", "n", "success", "average", "TTFT p95", "ITL p95", "tokens/s", "at once")


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
