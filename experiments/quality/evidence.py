"""An evaluation as an evidence run in MLflow, and read back for the gate.

Evidence belongs to one artifact: the tag `artifact.digest` is the digest of the model folder that was measured. A run
also keeps every held-out story's nats and every generated story: two models are compared on the same stories, pair by
pair, and figures must be verifiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, FiniteFloat

from experiments.common.evidence_runs import DIGEST, EvidenceStore, StoredEvidence
from experiments.quality.generation import MAX_TOKENS, prompts_digest
from experiments.quality.report import QualityReport
from model.generation import SamplingParams
from model.validation import Record
from training.tracking.provenance import provenance
from training.tracking.runs import log_tables, table_rows, table_text, without_folders

if TYPE_CHECKING:
    from mlflow.entities import Run

EXPERIMENT = "story-evaluation"
LOSSES, STORIES, BASELINE = "held_out/losses.json", "written/stories.json", "written/baseline.json"
RARE_NAMES = "rare_names/stories.json"
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

    @classmethod
    def contents(cls, run: Run, artifact: Callable[[str], bytes]) -> dict[str, Any]:
        """See `StoredEvidence`."""
        stories = table_rows(artifact(STORIES)) if "seeds" in run.data.params else ()
        rare_names = table_rows(artifact(RARE_NAMES)) if "rare_names/kept" in run.data.metrics else ()
        losses = table_rows(artifact(LOSSES))
        return {"metrics": run.data.metrics, "losses": losses, "stories": stories, "rare_names": rare_names}


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
        sets = {STORIES: report.written, BASELINE: report.baseline_written, RARE_NAMES: report.rare_names}
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
    }
    for prefix, part in parts.items():
        if part is not None:
            for name, (low, high) in part["intervals"].items():
                figures |= {f"{prefix}{name}": part[name], f"{prefix}{name}_low": low, f"{prefix}{name}_high": high}
    if plain["written"] is not None:
        figures["written/copied_words_max"] = plain["written"]["copied_words_max"]
    return figures | {f"judge/{name}": value for name, value in (plain["judge"] or {}).items() if name != "judge"}
