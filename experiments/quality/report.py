"""Everything that one evaluation found, as one record, and as tables for the terminal.

Each figure is shown with its interval, and the n-gram baseline's beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from experiments.common.statistics import Estimate, ratio_of_sums
from experiments.common.tables import Table, shown, shown_interval
from experiments.quality.generation import FIGURES, StorySet, Written
from experiments.quality.held_out import Figures, HeldOut, PlaceLoss, RuntimeName
from experiments.quality.judge import Judgement
from experiments.quality.ngram import NgramBaseline

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class QualityReport:
    """Figures of one model on one set of stories."""

    model: str
    digest: str
    """Of the model folder."""
    data: tuple[str, ...]
    held_out: HeldOut
    runtimes: dict[RuntimeName, Figures]
    skipped: dict[RuntimeName, str]
    """Runtimes that could not be measured, and why."""
    not_measured: dict[str, str]
    """What else was left out (`written`, `memorisation`, `judge`), and why."""
    baseline: NgramBaseline | None = None
    places: tuple[PlaceLoss, ...] = ()
    """Loss by place in the story, of the served runtime."""
    written: Written | None = None
    """What the served model generates; None if it was not asked to."""
    baseline_written: Written | None = None
    """What the baseline generates from the same prompts, for the first seed."""
    rare_names: StorySet | None = None
    judgement: Judgement | None = None
    training_name: str | None = None
    """The stories that were searched for copies; None: none were given."""
    seen_in_training: int | None = None
    """Held-out stories that occur in them word for word."""

    @property
    def runtime(self) -> RuntimeName:
        """The first runtime measured, which is the one that serves."""
        return next(iter(self.runtimes))

    @property
    def served(self) -> Figures:
        return self.runtimes[self.runtime]

    @property
    def figures(self) -> dict[str, Figures]:
        """Of each runtime by its name, and of the `baseline`."""
        figures = {str(name): found for name, found in self.runtimes.items()}
        return figures | ({} if self.baseline is None else {"baseline": self.baseline.figures})

    @property
    def left_out(self) -> dict[str, str]:
        return {str(name): reason for name, reason in self.skipped.items()} | self.not_measured

    @property
    def stories(self) -> int:
        return len(self.held_out.texts)

    @property
    def bytes(self) -> int:
        return int(self.held_out.bytes.sum())

    @property
    def tokens(self) -> int:
        return sum(map(len, self.held_out.tokens))

    def intervals(self) -> dict[str, Estimate]:
        """`bits_per_byte` and `loss` of the served runtime, stories resampled."""
        nats, lengths = self.served.story_nats, [len(tokens) for tokens in self.held_out.tokens]
        return {
            "bits_per_byte": ratio_of_sums(nats / math.log(2), self.held_out.bytes),
            "loss": ratio_of_sums(nats, lengths),
        }

    def as_dict(self) -> dict[str, Any]:
        intervals = self.intervals().items()
        return {
            "model": self.model,
            "digest": self.digest,
            "data": list(self.data),
            **self.served.as_dict(),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "stories": self.stories,
            "runtimes": {name: figures.as_dict() for name, figures in self.runtimes.items()},
            "skipped": dict(self.skipped),
            "written": self.written.as_dict() if self.written else None,
            "data_digest": self.held_out.digest,
            "intervals": {name: [estimate.low, estimate.high] for name, estimate in intervals},
            "places": [asdict(place) for place in self.places],
            "baseline": self._baseline_dict(),
            "memorisation": self._memorisation(),
            "rare_names": self.rare_names.as_dict() if self.rare_names else None,
            "judge": self.judgement.as_dict() if self.judgement else None,
            "not_measured": dict(self.not_measured),
        }

    def _baseline_dict(self) -> dict[str, Any] | None:
        baseline = self.baseline
        if baseline is None:
            return None
        return baseline.figures.as_dict() | {
            "order": baseline.table.order,
            "source": baseline.source,
            "stories": baseline.stories,
            "tokens": baseline.tokens,
            "written": self.baseline_written.as_dict() if self.baseline_written else None,
        }

    def _memorisation(self) -> dict[str, Any] | None:
        if self.training_name is None:
            return None
        longest = self.written.longest_copy if self.written else None
        copy = {"words": longest.words, "text": longest.text, "story": longest.story} if longest else None
        return {"source": self.training_name, "held_out_seen": self.seen_in_training, "longest": copy}


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
