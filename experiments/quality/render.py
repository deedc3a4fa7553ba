"""An evaluation in the terminal: each figure with its interval, and the n-gram baseline's beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

from experiments.common.statistics import Estimate
from experiments.common.tables import TerminalTable, terminal_table
from experiments.quality.generation import FIGURES
from experiments.quality.report import QualityReport

MEANING = {
    "ended": "end by themselves",
    "mean_tokens": "tokens",
    "mean_words": "words",
    "distinct_1": "different words",
    "distinct_2": "different word pairs",
    "distinct_3": "different word triples",
    "repeated_4": "4-word runs repeated",
    "looping": "loop",
    "names_kept": "keep all names of the prompt",
    "opening_names_kept": "names of the opening kept",
    "names_confused": "somebody addresses himself",
    "names_straight": "names kept and not confused",
    "copied_words": "longest copied run, words",
    "copied_share": "longest copied run of the story",
}
COUNTS = {"mean_tokens", "mean_words", "copied_words"}
"""Figures that are not shares."""
NONE = "-"


@contextmanager
def status(console: Console) -> Iterator[Callable[[str, int], None]]:
    """A status line for as long as the context is open; yields the function that reports progress to it."""
    done: Counter[str] = Counter()
    with console.status("reading") as line:

        def progress(name: str, stories: int) -> None:
            done[name] += stories
            line.update(f"{name}: {done[name]:,} stories")

        yield progress


def print_report(report: QualityReport, evidence: Mapping[str, str], console: Console) -> None:
    """Print the tables; `evidence` says where the run was logged (`run`), or why not (`skipped`, `failed`)."""
    head = (
        f"{report.model} · digest {report.digest[:12]} · {', '.join(report.data)}",
        f"{report.stories:,} held-out stories, {report.tokens:,} targets, {report.bytes:,} bytes; "
        f"brackets hold 95 % intervals",
    )
    tables = [_held_out(report), _places(report)]
    if report.written is not None:
        tables.append(_written(report))
    for text in head:
        console.print(text, soft_wrap=True, markup=False, highlight=False)
    for table in tables:
        console.print(table)
    for text in _remarks(report, evidence):
        console.print(text, soft_wrap=True, markup=False, highlight=False)


def _held_out(report: QualityReport) -> TerminalTable:
    intervals = report.intervals()
    rows: list[tuple[str, ...]] = []
    for name, figures in report.runtimes.items():
        bits, loss = f"{figures.bits_per_byte:.4f}", f"{figures.loss:.4f}"
        if name == report.runtime:
            bits, loss = (_number(intervals[key]) for key in ("bits_per_byte", "loss"))
        rows.append((name, bits, loss))
    if report.baseline is not None:
        figures = report.baseline.figures
        rows.append(("baseline", f"{figures.bits_per_byte:.4f}", f"{figures.loss:.4f}"))
    return terminal_table(("", "bits per byte", "nats a token"), rows, title="Held-out stories")


def _places(report: QualityReport) -> TerminalTable:
    rows = []
    for place in report.places:
        name = f"{place.first} to {place.last}" if place.last is not None else f"{place.first} and on"
        theirs = place.baseline_loss
        cells = (NONE, NONE) if theirs is None else (f"{theirs:.3f}", f"{place.loss / theirs:.0%}")
        rows.append((name, f"{place.tokens:,}", f"{place.loss:.3f}", *cells))
    columns = ("", "targets", "nats a token", "baseline", "of the baseline")
    return terminal_table(columns, rows, title="By place in the story")


def _written(report: QualityReport) -> TerminalTable:
    assert report.written is not None
    count, seeds = len(report.written.stories), len(report.written.seeds)
    ours = report.written.estimates()
    theirs = report.baseline_written.estimates() if report.baseline_written is not None else {}
    rows = []
    for name in FIGURES:
        if name in ours:
            form = ".1f" if name in COUNTS else ".1%"
            baseline = format(theirs[name].value, form) if name in theirs else NONE
            rows.append((MEANING[name], _number(ours[name], form), baseline))
    title = f"{count} generated stories, {seeds} from each prompt"
    return terminal_table(("", "mean", "baseline"), rows, title=title)


def _remarks(report: QualityReport, evidence: Mapping[str, str]) -> Iterator[str]:
    if (baseline := report.baseline) is not None:
        limited = ", the first of them" if baseline.tokens >= baseline.max_tokens else ""
        counted = f"{baseline.stories:,} stories, {baseline.tokens:,} tokens{limited}"
        yield f"baseline: {baseline.table.order}-gram table of {baseline.source} ({counted})"
    if report.training_name is not None:
        yield f"held-out stories that occur in {report.training_name}: {report.seen_in_training}"
    longest = report.written.longest_copy if report.written is not None else None
    if longest is not None and longest.words:
        yield f'longest copied run: {longest.words} words, of story {longest.story}: "{longest.text}"'
    if report.rare_names is not None:
        shares = {name: _number(found, ".1%") for name, found in report.rare_names.estimates().items()}
        yield (
            f"rare names: {shares['kept']} of {len(report.rare_names.stories)} stories keep all names of the prompt, "
            f"in {shares['mutated']} one of them is mutated"
        )
    if report.judgement is not None:
        figures = report.judgement.as_dict()
        yield (
            f"judge {figures['judge']}: perplexity {figures['perplexity']:.2f} of ours, "
            f"{figures['reference_perplexity']:.2f} of {figures['reference_stories']} held-out stories"
        )
    for name, reason in report.left_out.items():
        yield f"not measured: {name}: {reason}"
    if "run" in evidence:
        yield f"evidence: MLflow run {evidence['run']}"
    else:
        yield f"no evidence: {evidence.get('failed') or evidence['skipped']}"


def _number(estimate: Estimate, form: str = ".4f") -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
