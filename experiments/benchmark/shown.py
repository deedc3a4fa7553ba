"""A report as people read it: the same sections as lines of a terminal and as Markdown.

The sections and their order are those of the documented report: performance summary, timing, stress, validation
with threshold and verdict a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.benchmark.report import Report
from experiments.benchmark.sample import Sample

if TYPE_CHECKING:
    from rich.console import Console

Row = tuple[str, ...]
ABSENT = "-"
LONGEST_FIGURE = 20


@dataclass(frozen=True, slots=True)
class Section:
    """A titled table. The first column is text, the others are figures."""

    title: str
    columns: Row
    rows: tuple[Row, ...]


def sections(report: Report) -> Iterator[Section]:
    """All tables of the report; empty ones are left out."""
    for section in (
        _summary(report),
        _timing(report),
        _loads(report),
        _compared(report),
        _validation(report),
    ):
        if section.rows:
            yield section


def verdict(report: Report) -> str:
    """The last word: `PASSED`, `FAILED (success_rate)`, `PASSED (2 not measured)`."""
    failed = [check.threshold.metric for check in report.checks if check.passed is False]
    missing = sum(check.passed is None for check in report.checks)
    more = failed or ([f"{missing} not measured"] if missing else [])
    return ("PASSED" if report.passed else "FAILED") + (f" ({', '.join(more)})" if more else "")


def markdown(report: Report) -> str:
    """The report as Markdown, for a job summary or a pull request."""
    lines = ["# Model benchmark report", "", *_facts(report)]
    for section in sections(report):
        aligned = ["---", *["---:"] * (len(section.columns) - 1)]
        lines += ["", f"## {section.title}", "", _table_row(section.columns), _table_row(aligned)]
        lines += [_table_row(row) for row in section.rows]
    lines += ["", f"**Overall validation: {verdict(report)}**"]
    return "\n".join(lines) + "\n"


def show(report: Report, console: Console) -> None:
    """Print the report."""
    from rich.table import Table
    from rich.text import Text

    colors = {"PASS": "green", "FAIL": "red", "NOT MEASURED": "yellow"}
    console.rule("MODEL BENCHMARK REPORT")
    for fact in _facts(report):
        console.print(fact.removeprefix("- "), markup=False, highlight=False)
    for section in sections(report):
        table = Table(title=section.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for number, column in enumerate(section.columns):
            width = max(_narrowest(cell) for cell in (column, *(row[number] for row in section.rows)))
            table.add_column(column, justify="right" if number else "left", min_width=width)
        for row in section.rows:
            table.add_row(*(Text(cell, style=colors.get(cell, "")) for cell in row))
        console.print()
        console.print(table)
    console.print()
    console.print(
        f"Overall validation: {verdict(report)}", style="bold green" if report.passed else "bold red"
    )


def progress_line(sample: Sample) -> str:
    """What a request that is done adds to the progress bar's text."""
    name = f"{sample.phase} at {sample.level}" if sample.level > 1 else sample.phase
    return name if sample.ok else f"{name}: {sample.error}"


def _facts(report: Report) -> list[str]:
    machine = report.origin.machine
    facts = [
        f"- target: {report.target}",
        f"- model: {report.digest[:12] if report.digest else 'unknown'}",
        f"- machine: {machine.get('cores')} cores, {machine.get('cpu', machine.get('architecture'))}, "
        f"load {report.load[0]:.1f} before and {report.load[1]:.1f} after",
        f"- began {report.began}, took {report.seconds:.0f} s; seed {report.plan.seed}, "
        f"at most {report.plan.max_tokens} tokens a story",
    ]
    if report.origin.git_sha:
        changed = " with changes" if report.origin.git_dirty else ""
        facts.append(f"- code: {report.origin.git_sha[:12]}{changed}")
    if report.run_id:
        facts.append(f"- MLflow run: {report.run_id}")
    return facts + [f"- note: {note}" for note in report.notes]


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
    for kind, count in _all_failures(report).items():
        rows.append((f"Failed: {kind}", str(count)))
    return Section("Performance summary", ("", "value"), tuple(rows))


def _timing(report: Report) -> Section:
    rows: list[Row] = [
        (f"{label} generation time", _seconds(report.figures[f"{name}_generation_time"].value))
        for name, label in (("avg", "Average"), ("median", "Median"), ("min", "Min"), ("max", "Max"),
                            ("p95", "95 % within"), ("p99", "99 % within"))
        if f"{name}_generation_time" in report.figures
    ]  # fmt: skip
    for name, label in (
        ("ttft", "Time to first token"),
        ("itl", "Between tokens"),
        ("tpot", "Mean a token"),
    ):
        values = [report.figures.get(f"{name}_p{percent}") for percent in (50, 95, 99)]
        told = [_seconds(value.value) for value in values if value is not None]
        if told:
            rows.append((f"{label}, p50 / p95 / p99 ({report.latency_phase})", " / ".join(told)))
    if "cold_start_s" in report.figures:
        value = _seconds(report.figures["cold_start_s"].value)
        rows.append((f"Cold start ({report.cold_start_means})", value))
    return Section("Timing metrics", ("", "value"), tuple(rows))


def _loads(report: Report) -> Section:
    rows = []
    for part in report.phases:
        if part.phase == "single":
            continue
        figures = part.figures
        level = f"{report.plan.rate:g}/s" if part.phase == "open" else str(part.level)
        rows.append((
            part.phase, level, str(round(figures["requests"].value)), _percent(figures["success_rate"].value),
            *(_seconds(figures[name].value) if name in figures else ABSENT
              for name in ("avg_generation_time", "ttft_p95", "itl_p95")),
            _number(figures["total_tokens_per_second"].value) if "total_tokens_per_second" in figures else ABSENT,
            str(round(figures["streams_at_once"].value)),
        ))  # fmt: skip
    columns = ("phase", "load", "n", "success", "average", "TTFT p95", "ITL p95", "tokens/s",
               "at once")  # fmt: skip
    return Section("Stress test results", columns, tuple(rows))


def _compared(report: Report) -> Section:
    comparison = report.comparison
    if comparison is None:
        return Section("", (), ())
    rows = [
        (
            name,
            f"{ratio.value:.3f}",
            f"{ratio.low:.3f} to {ratio.high:.3f}",
            str(ratio.n),
            "differs" if ratio.excludes(1) else "no difference shown",
        )
        for name, ratio in comparison.ratios.items()
    ]
    rates = f"{_percent(comparison.success_rate)} against {_percent(comparison.against_success_rate)}"
    rows.append(("success rate", rates, "", str(comparison.pairs), ""))
    title = f"Against {comparison.against}, in turn"
    return Section(title, ("ratio", "value", "95 % interval", "pairs", ""), tuple(rows))


def _validation(report: Report) -> Section:
    rows = tuple(
        (
            check.threshold.metric,
            ABSENT if check.value is None else _number(check.value),
            str(check.threshold),
            check.verdict,
        )
        for check in report.checks
    )
    return Section("Validation results", ("metric", "value", "threshold", "verdict"), rows)


def _all_failures(report: Report) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in report.phases:
        for kind, count in part.failures.items():
            total[kind] = total.get(kind, 0) + count
    return total


def _table_row(cells: Row | list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _narrowest(cell: str) -> int:
    """Characters that a cell must have in a narrow terminal: a figure stays in one line, a sentence may be broken."""
    return len(cell) if len(cell) <= LONGEST_FIGURE else max(map(len, cell.split()))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _seconds(value: float) -> str:
    """`2.34 s`, `12.3 ms`."""
    return f"{value:.2f} s" if value >= 0.9995 else f"{value * 1e3:.3g} ms"


def _number(value: float) -> str:
    """Three figures or more, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.2g}"
