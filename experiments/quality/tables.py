"""An evaluation for a reader in the terminal: each figure with its interval, and the floor's beside it."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.common.statistics import Estimate
from experiments.quality.floor import Floor
from experiments.quality.report import QualityReport
from experiments.quality.written import FIGURES

MEANING = {
    "ended": "end by themselves",
    "mean_tokens": "tokens",
    "mean_words": "words",
    "distinct_1": "different words",
    "distinct_2": "different word pairs",
    "distinct_3": "different word triples",
    "repeated_4": "4-word runs said before",
    "looping": "go round in circles",
    "names_kept": "keep all names of the prompt",
    "opening_names_kept": "names of the opening kept",
    "names_confused": "somebody calls himself",
    "names_straight": "names kept, nobody confused",
    "copied_words": "longest copied run, words",
    "copied_share": "longest copied run of the story",
}
COUNTS = {"mean_tokens", "mean_words", "copied_words"}
"""Figures that are no shares."""
NONE = "-"


def print_report(report: QualityReport, evidence: Mapping[str, str], console: Console) -> None:
    """Print the tables; `evidence` says where the run was logged (`run`), or why it was not (`skipped`, `failed`)."""
    # Names of files and models are shown as they are: a bracket in one is no markup.
    console.print(
        Text(f"{report.model} · digest {report.digest[:12]} · {', '.join(report.data)}"), soft_wrap=True
    )
    console.print(
        Text(
            f"{report.stories:,} held-out stories, {report.tokens:,} targets, {report.bytes:,} bytes; "
            f"brackets hold 95 % intervals"
        ),
        soft_wrap=True,
    )
    console.print(_held_out(report))
    console.print(_places(report))
    if report.written is not None:
        console.print(_written(report))
    for line in _remarks(report, evidence):
        console.print(Text(line), soft_wrap=True)


def _held_out(report: QualityReport) -> Table:
    table = _table("Held-out stories", "bits per byte", "nats a token")
    intervals = report.intervals()
    for name, figures in report.runtimes.items():
        served = name == report.runtime
        table.add_row(
            name,
            _number(figures.bits_per_byte, intervals["bits_per_byte"] if served else None),
            _number(figures.loss, intervals["loss"] if served else None),
        )
    if report.floor is not None:
        table.add_row(
            "floor", _number(report.floor.figures.bits_per_byte), _number(report.floor.figures.loss)
        )
    return table


def _places(report: QualityReport) -> Table:
    table = _table("By place in the story", "targets", "nats a token", "floor", "of the floor")
    for place in report.places:
        name = f"{place.first} to {place.last}" if place.last is not None else f"{place.first} and on"
        below = place.floor_loss
        table.add_row(
            name,
            f"{place.tokens:,}",
            f"{place.loss:.3f}",
            NONE if below is None else f"{below:.3f}",
            NONE if below is None else f"{place.loss / below:.0%}",
        )
    return table


def _written(report: QualityReport) -> Table:
    assert report.written is not None
    count, seeds = len(report.written.stories), len(report.written.seeds)
    table = _table(f"{count} written stories, {seeds} from each prompt", "mean", "floor")
    estimates = report.written.estimates()
    below = report.floor_written.estimates() if report.floor_written is not None else {}
    for name in FIGURES:
        if name in estimates:
            estimate = estimates[name]
            mean = _count(estimate) if name in COUNTS else _share(estimate)
            floor = below.get(name)
            shown = (
                NONE if floor is None else f"{floor.value:.1f}" if name in COUNTS else f"{floor.value:.1%}"
            )
            table.add_row(MEANING[name], mean, shown)
    return table


def _remarks(report: QualityReport, evidence: Mapping[str, str]) -> list[str]:
    lines = [] if report.floor is None else [_floor_line(report.floor)]
    if report.training_name is not None:
        lines.append(f"held-out stories that stand in {report.training_name}: {report.seen_in_training}")
    longest = report.written.longest_copy if report.written is not None else None
    if longest is not None and longest.words:
        lines.append(f'longest copied run: {longest.words} words, of story {longest.story}: "{longest.text}"')
    if report.judgement is not None:
        figures = report.judgement.as_dict()
        lines.append(
            f"judge {figures['judge']}: perplexity {figures['perplexity']:.2f} of ours, "
            f"{figures['reference_perplexity']:.2f} of {figures['reference_stories']} held-out stories"
        )
    lines += [f"not measured: {name}: {reason}" for name, reason in report.left_out.items()]
    if "run" in evidence:
        lines.append(f"evidence: MLflow run {evidence['run']}")
    else:
        lines.append(f"no evidence: {evidence.get('failed') or evidence['skipped']}")
    return lines


def _floor_line(floor: Floor) -> str:
    cut = ", the first of them" if floor.tokens >= floor.max_tokens else ""
    return (
        f"floor: {floor.table.order}-gram table of {floor.source} "
        f"({floor.stories:,} stories, {floor.tokens:,} tokens{cut})"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _number(value: float, interval: Estimate | None = None) -> str:
    return f"{value:.4f}" if interval is None else f"{value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def _count(estimate: Estimate) -> str:
    return f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"
