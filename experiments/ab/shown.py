"""A test's report for whoever reads it: terminal, and Markdown for MLflow or a pull request."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.table import Table

from experiments.ab.read import HIGHER_IS_BETTER, METRICS, Metric
from experiments.ab.report import Against, Report, Verdict, middle
from experiments.common.statistics import Estimate

COLORS: dict[Verdict, str] = {"better": "green", "worse": "red", "undecided": "yellow"}
ARM_COLUMNS = (
    "arm", "version", "digest", "visitors", "stories", "👍 / 👎", *METRICS, "tokens", "first token", "tokens/s",
)  # fmt: skip
AGAINST_COLUMNS = ("figure", "arm", "difference, at all looks", "evidence (e)", "visitors used", "verdict")
Justify = Literal["left", "right"]


def print_report(report: Report, console: Console) -> None:
    """Both tables, what there is to note, and the verdict."""
    console.print(f"Test {report.evidence.test}: {report.evidence.split}", markup=False, highlight=False)
    console.print(_table(ARM_COLUMNS, _arm_rows(report)))
    if report.comparisons:
        console.print(_table(AGAINST_COLUMNS, _against_rows(report)))
    for note in notes(report):
        console.print(note, markup=False, highlight=False)
    console.print(f"[{COLORS[report.verdict]}]{report.verdict.upper()}[/]: ", end="")
    console.print(report.why, markup=False, highlight=False)


def markdown(report: Report) -> str:
    """The same as Markdown."""
    lines = [f"### Test {_plain(report.evidence.test)}: {report.verdict.upper()}", "", _plain(report.why), ""]
    lines += _markdown_table(ARM_COLUMNS, _arm_rows(report))
    if report.comparisons:
        lines += ["", *_markdown_table(AGAINST_COLUMNS, _against_rows(report))]
    return "\n".join([*lines, "", *(f"- {_plain(note)}" for note in notes(report))]) + "\n"


def notes(report: Report) -> list[str]:
    """What a reader of the tables must know."""
    figures = ", ".join(f"{name}: {text}" for name, text in METRICS.items())
    lines = [
        f"Each visitor counts once, with the first story or verdict ({figures}).",
        "A rate's interval is Wilson's, 95 %, for one look; the difference's holds at all looks together, with "
        f"{100 * (1 - report.alpha):g} %. {report.metric} decides.",
    ]
    ratio = report.ratio
    if ratio.degrees:
        state = "NOT as promised" if ratio.mismatch else "as promised"
        lines.append(
            f"Shares of visitors are {state}: chi-square {ratio.chi_square:.2f}, p = {ratio.p:.3g}; "
            f"sequential evidence against them {ratio.e:.3g}."
        )
    lines += [
        f"{count} stories of {arm} are left out: another artifact stood behind it."
        for arm, count in report.evidence.left_out.items()
    ]
    return lines


def _arm_rows(report: Report) -> list[list[str]]:
    rows = []
    for arm in report.evidence.arms.values():
        rates = report.rates[arm.name]
        first, speed = middle(arm.ttfts), middle(arm.rates)
        rows.append([
            arm.name, arm.version or "-", arm.digest[:12] or "-", str(arm.visitors), str(arm.stories),
            f"{arm.likes} / {arm.dislikes}", *(_rate(rates[name]) for name in METRICS),
            _number(middle(arm.tokens)), "-" if first is None else f"{first * 1000:.0f} ms", _number(speed),
        ])  # fmt: skip
    return rows


def _against_rows(report: Report) -> list[list[str]]:
    return [_against_row(each) for each in report.comparisons]


def _against_row(each: Against) -> list[str]:
    found = each.comparison
    wish = "higher" if HIGHER_IS_BETTER[each.metric] else "lower"
    return [
        f"{each.metric} ({wish} is better)", each.arm, f"{_points(found.low)} … {_points(found.high)}",
        f"{found.e:.3g}", f"{found.used[0]} + {found.used[1]}", each.verdict,
    ]  # fmt: skip


def _rate(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{100 * found.value:.1f} % ({100 * found.low:.0f} to {100 * found.high:.0f})"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _table(columns: tuple[str | Metric, ...], rows: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        side: Justify = "left" if number == 0 else "right"
        table.add_column(column, justify=side)
    for row in rows:
        table.add_row(*row)
    return table


def _markdown_table(columns: tuple[str | Metric, ...], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    return lines + ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]


def _plain(text: str) -> str:
    """Text that cannot leave its line or be read as markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
