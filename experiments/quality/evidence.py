"""Everything that one evaluation found: as one record, as tables for the terminal, and as an evidence run in MLflow.

Each figure is shown with its interval, and the n-gram baseline's beside it.

Evidence belongs to one artifact: the tag `artifact.digest` is the digest of the model folder that was measured. A run
also keeps every held-out story's nats and every generated story: two models are compared on the same stories, pair by
pair, and figures must be verifiable. The gate reads it back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, FiniteFloat

from experiments.common.evidence_runs import DIGEST, EvidenceStore, StoredEvidence
from experiments.common.statistics import Estimate, ratio_of_sums
from experiments.common.tables import Table, shown, shown_interval
from experiments.quality.generation import FIGURES, MAX_TOKENS, StorySet, Written, prompts_digest
from experiments.quality.held_out import Figures, HeldOut, PlaceLoss, RuntimeName
from experiments.quality.judge import Judgement
from experiments.quality.ngram import NgramBaseline
from model.generation import SamplingParams
from model.validation import Record
from training.tracking.provenance import provenance
from training.tracking.runs import log_tables, table_rows, table_text, without_folders

if TYPE_CHECKING:
    from mlflow.entities import Run
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
    wishes: StorySet | None = None
    """None: not asked to write, or not trained to meet any."""
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
            "wishes": self.wishes.as_dict() if self.wishes else None,
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
    if report.wishes is not None:
        met = (f"{name} {shown_interval(found, '.0%')}" for name, found in report.wishes.estimates().items())
        yield f"wishes met: {', '.join(met)}"
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


EXPERIMENT = "story-evaluation"
LOSSES, STORIES, BASELINE = "held_out/losses.json", "written/stories.json", "written/baseline.json"
RARE_NAMES, WISHES = "rare_names/stories.json", "wishes/stories.json"
"""Tables in MLflow's own format, which its UI shows."""
REPORT = "report.json"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class StoryLoss(Record):
    """One model's loss on one held-out story."""

    id: str
    """First 12 hex digits of the SHA-1 of its text."""
    nats: FiniteFloat
    """Its end included."""
    tokens: int
    bytes: int

    @property
    def bits(self) -> float:
        return self.nats / math.log(2)


Losses = Annotated[tuple[StoryLoss, ...], Field(min_length=1)]


class QualityEvidence(StoredEvidence):
    """One finished evaluation as the store holds it."""

    experiment: ClassVar[str] = EXPERIMENT

    metrics: dict[str, float]
    losses: Losses
    """By the served runtime, in the order of the data."""
    stories: tuple[dict[str, Any], ...]
    """A row for each generated story: `number` and `seed` name it, the rest is its text and its figures. Empty: none
    were generated."""
    rare_names: tuple[dict[str, Any], ...] = ()
    """The same for the stories from prompts with rare names."""
    wishes: tuple[dict[str, Any], ...] = ()
    """The same for those from prompts with wishes."""

    @classmethod
    def contents(cls, run: Run, artifact: Callable[[str], bytes]) -> dict[str, Any]:
        """See `StoredEvidence`."""
        stories = table_rows(artifact(STORIES)) if "seeds" in run.data.params else ()
        rare_names = table_rows(artifact(RARE_NAMES)) if "rare_names/kept" in run.data.metrics else ()
        wishes = table_rows(artifact(WISHES)) if "wishes/words" in run.data.metrics else ()
        losses = table_rows(artifact(LOSSES))
        tables = {"losses": losses, "stories": stories, "rare_names": rare_names, "wishes": wishes}
        return {"metrics": run.data.metrics} | tables


def log_evaluation(report: QualityReport, store: EvidenceStore) -> str:
    """Log `report` as a run that began when the store was opened; returns the run's id.

    Raises:
        InputError: the store failed meanwhile.
    """
    with store.run(f"quality {report.digest[:8]}", _tags(report)) as run:
        run.log_params(_params(report))
        run.log_metrics(_metrics(report))
        for place in report.places:  # a curve in MLflow's UI: its step is the first place of the bucket
            curve = {"loss_by_place": place.loss, "baseline/loss_by_place": place.baseline_loss}
            run.log_metrics(curve, step=place.first)
        run.client.log_dict(run.run_id, without_folders(report.as_dict()), REPORT)
        sets: dict[str, StorySet | None] = {STORIES: report.written, BASELINE: report.baseline_written}
        sets |= {RARE_NAMES: report.rare_names, WISHES: report.wishes}
        tables = {LOSSES: _loss_rows(report)} | {path: found.rows() for path, found in sets.items() if found}
        if report.judgement is not None:
            for row, judged in zip(tables[STORIES], report.judgement.stories, strict=True):
                row |= {"judge_nats": judged.nats, "judge_tokens": judged.tokens, "judge_bytes": judged.bytes}
        log_tables(run.client, run.run_id, {path: table_text(rows) for path, rows in tables.items()})
    return run.run_id


def _loss_rows(report: QualityReport) -> list[dict[str, Any]]:
    """A row for each held-out story: nats of the served runtime, of each runtime by name, and of the baseline."""
    held_out = report.held_out
    columns = {"nats": report.served} | {f"nats_{name}": found for name, found in report.figures.items()}
    nats = {name: figures.story_nats for name, figures in columns.items()}
    sizes = zip(held_out.ids, held_out.tokens, held_out.bytes, strict=True)
    return [
        {"id": story, "tokens": len(tokens), "bytes": int(size)}
        | {name: float(values[index]) for name, values in nats.items()}
        for index, (story, tokens, size) in enumerate(sizes)
    ]


def _tags(report: QualityReport) -> dict[str, str]:
    """Which artifact was measured, by what, and what was not measured."""
    tags = provenance().tags("story evaluate") | {DIGEST: report.digest, "data.digest": report.held_out.digest}
    return tags | {f"skipped.{name}": reason for name, reason in report.left_out.items()}


def _params(report: QualityReport) -> dict[str, Any]:
    """What the figures depend on."""
    params: dict[str, Any] = {
        "model": report.model,
        "runtime": report.runtime,
        "git.sha": provenance().git_sha or "unknown",
        "data": {
            "files": ", ".join(Path(name).name for name in report.data),
            "digest": report.held_out.digest,
            "stories": report.stories,
        },
    }
    if (baseline := report.baseline) is not None:
        params["baseline"] = {"order": baseline.table.order, "source": baseline.source, "tokens": baseline.tokens}
    if report.written is not None:
        sampling, first = SamplingParams(), report.written.seeds[0]
        asked = [story.prompt for story in report.written.stories if story.seed == first]
        params["seeds"] = report.written.seeds
        params["prompts.digest"] = prompts_digest(asked)
        params["sampling"] = {name: getattr(sampling, name) for name in SAMPLING} | {"max_tokens": MAX_TOKENS}
    if report.training_name is not None:
        params["train_data"] = report.training_name
    return params


def _metrics(report: QualityReport) -> dict[str, float | None]:
    """All means with their intervals; None where nothing was measured."""
    plain = report.as_dict()
    figures: dict[str, float | None] = {
        name: plain[name] for name in ("bits_per_byte", "loss", "tokens", "bytes", "stories")
    }
    figures["held_out_seen"] = report.seen_in_training
    for name, found in report.figures.items():
        figures |= {f"{name}/{key}": value for key, value in found.as_dict().items()}
    parts: dict[str, dict[str, Any] | None] = {
        "": plain,
        "written/": plain["written"],
        "baseline/written/": (plain["baseline"] or {}).get("written"),
        "rare_names/": plain["rare_names"],
        "wishes/": plain["wishes"],
    }
    for prefix, part in parts.items():
        if part is not None:
            for name, (low, high) in part["intervals"].items():
                figures |= {f"{prefix}{name}": part[name], f"{prefix}{name}_low": low, f"{prefix}{name}_high": high}
    if plain["written"] is not None:
        figures["written/copied_words_max"] = plain["written"]["copied_words_max"]
    return figures | {f"judge/{name}": value for name, value in (plain["judge"] or {}).items() if name != "judge"}
