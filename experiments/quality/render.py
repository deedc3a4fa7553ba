"""An evaluation in the terminal: each figure with its interval, and the n-gram baseline's beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

from experiments.common.tables import Table, shown, shown_interval
from experiments.quality.generation import FIGURES
from experiments.quality.report import QualityReport


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
    parts: list[str | Table] = [
        f"{report.model} · digest {report.digest[:12]} · {', '.join(report.data)}",
        f"{report.stories:,} held-out stories, {report.tokens:,} targets, {report.bytes:,} bytes; "
        f"brackets hold 95 % intervals",
        _held_out(report),
        _places(report),
        *([_written(report)] if report.written is not None else []),
        *_remarks(report, evidence),
    ]
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)


def _held_out(report: QualityReport) -> Table:
    intervals = report.intervals()
    rows: list[tuple[str, ...]] = []
    for name, figures in report.figures.items():
        cells = (f"{figures.bits_per_byte:.4f}", f"{figures.loss:.4f}")
        if name == report.runtime:
            cells = (shown_interval(intervals["bits_per_byte"]), shown_interval(intervals["loss"]))
        rows.append((name, *cells))
    return Table(("", "bits per byte", "nats a token"), rows, title="Held-out stories")


def _places(report: QualityReport) -> Table:
    rows = []
    for place in report.places:
        name = f"{place.first} to {place.last}" if place.last is not None else f"{place.first} and on"
        theirs = place.baseline_loss
        cells = (shown(theirs, ".3f"), shown(theirs and place.loss / theirs, ".0%"))
        rows.append((name, f"{place.tokens:,}", f"{place.loss:.3f}", *cells))
    columns = ("", "targets", "nats a token", "baseline", "of the baseline")
    return Table(columns, rows, title="By place in the story")


def _written(report: QualityReport) -> Table:
    assert report.written is not None
    count, seeds = len(report.written.stories), len(report.written.seeds)
    ours = report.written.estimates()
    theirs = report.baseline_written.estimates() if report.baseline_written is not None else {}
    rows = []
    for name, estimate in ours.items():
        label, form, _ = FIGURES[name]
        baseline = shown(theirs[name].value if name in theirs else None, form)
        rows.append((label, shown_interval(estimate, form), baseline))
    title = f"{count} generated stories, {seeds} from each prompt"
    return Table(("", "mean", "baseline"), rows, title=title)


def _remarks(report: QualityReport, evidence: Mapping[str, str]) -> Iterator[str]:
    if (baseline := report.baseline) is not None:
        limited = ", the first of them" if baseline.limited else ""
        counted = f"{baseline.stories:,} stories, {baseline.tokens:,} tokens{limited}"
        yield f"baseline: {baseline.table.order}-gram table of {baseline.source} ({counted})"
    if report.training_name is not None:
        yield f"held-out stories that occur in {report.training_name}: {report.seen_in_training}"
    longest = report.written.longest_copy if report.written is not None else None
    if longest is not None and longest.words:
        yield f'longest copied run: {longest.words} words, of story {longest.story}: "{longest.text}"'
    if report.rare_names is not None:
        shares = {name: shown_interval(found, ".1%") for name, found in report.rare_names.estimates().items()}
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
