"""Render a test's report for the terminal, and as Markdown for MLflow or a pull request."""

from __future__ import annotations

from rich.console import Console

from experiments.ab.evidence import HIGHER_IS_BETTER, METRICS
from experiments.ab.report import Report, Verdict, median
from experiments.common.statistics import Estimate
from experiments.common.tables import ABSENT, Table, markdown_text, shown

COLORS: dict[Verdict, str] = {"better": "green", "worse": "red", "undecided": "yellow"}
VARIANT_COLUMNS = (
    *("variant", "version", "digest", "users", "stories", "👍 / 👎"),
    *METRICS,
    *("tokens", "first token", "tokens/s"),
)
COMPARISON_COLUMNS = ("metric", "variant", "difference, all looks", "evidence (e)", "users used", "verdict")


def print_report(report: Report, console: Console) -> None:
    """Print both tables, the notes and the verdict."""
    console.print(f"Test {report.evidence.test}: {report.evidence.split}", markup=False, highlight=False)
    for table in tables(report):
        console.print(table)
    for note in notes(report):
        console.print(note, markup=False, highlight=False)
    console.print(f"[{COLORS[report.verdict]}]{report.verdict.upper()}[/]: ", end="")
    console.print(report.why, markup=False, highlight=False)


def markdown(report: Report) -> str:
    """Return the same as Markdown."""
    title = f"### Test {markdown_text(report.evidence.test)}: {report.verdict.upper()}"
    lines = [title, "", markdown_text(report.why)]
    for table in tables(report):
        lines += ["", *table.markdown()]
    return "\n".join([*lines, "", *(f"- {markdown_text(note)}" for note in notes(report))]) + "\n"


def notes(report: Report) -> list[str]:
    """Explain how to read the tables."""
    metrics = ", ".join(f"{name}: {text}" for name, text in METRICS.items())
    lines = [
        f"Each user counts once, with the first story or rating ({metrics}).",
        "A rate's interval is Wilson's, 95 %, for one look; the difference's holds at all looks together, with "
        f"{100 * (1 - report.alpha):g} %. {report.metric} decides.",
    ]
    if len(report.ratio.expected) > 1:
        state = "NOT as promised" if report.ratio.mismatch else "as promised"
        lines.append(f"Shares of users are {state}: sequential evidence against them {report.ratio.e:.3g}.")
    lines += [
        f"{count} stories of {name} are left out: another artifact served it then."
        for name, count in report.evidence.left_out.items()
    ]
    return lines


def tables(report: Report) -> list[Table]:
    """The variants, and each beside the first if there are others."""
    variants = [
        [
            *(variant.name, variant.version or ABSENT, variant.digest[:12] or ABSENT),
            *(str(variant.users), str(variant.stories), f"{variant.likes} / {variant.dislikes}"),
            *(_rate(variant.rate(name)) for name in METRICS),
            shown(median(variant.tokens), ",.0f"),
            shown(median([1000 * seconds for seconds in variant.ttfts]), ".0f", " ms"),
            shown(median(variant.rates), ",.0f"),
        ]
        for variant in report.evidence.variants.values()
    ]
    compared = [
        [
            f"{each.metric} ({'higher' if HIGHER_IS_BETTER[each.metric] else 'lower'} is better)",
            each.variant,
            f"{100 * each.difference_low:+.1f} … {100 * each.difference_high:+.1f}",
            f"{each.e:.3g}",
            f"{each.used[0]} + {each.used[1]}",
            each.verdict,
        ]
        for each in report.comparisons
    ]
    found = (Table(VARIANT_COLUMNS, variants), Table(COMPARISON_COLUMNS, compared))
    return [table for table in found if table.rows]


def _rate(found: Estimate | None) -> str:
    if found is None:
        return ABSENT
    return f"{100 * found.value:.1f} % ({100 * found.low:.0f} to {100 * found.high:.0f})"
