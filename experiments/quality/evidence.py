"""An evaluation as an evidence run in MLflow, and read back for the gate.

Evidence belongs to one artifact: the tag `artifact.digest` is the digest of the model folder that was measured. A run
also keeps every held-out story's nats and every generated story: two models are compared on the same stories, pair by
pair, and figures must be verifiable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.evidence_runs import (
    DIGEST,
    EvidenceError,
    EvidenceStore,
    finished_runs,
    read_artifact,
    store_errors,
)
from experiments.common.statistics import Estimate
from experiments.quality.generation import MAX_TOKENS, prompts_digest
from experiments.quality.report import QualityReport
from model.generation import SamplingParams
from training.tracking.provenance import provenance
from training.tracking.runs import log_tables, table_rows, table_text, without_folders
from training.tracking.store import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "story-evaluation"
LOSSES, STORIES, BASELINE = "held_out/losses.json", "written/stories.json", "written/baseline.json"
RARE_NAMES = "rare_names/stories.json"
"""Tables in MLflow's own format, which its UI shows."""
REPORT = "report.json"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class StoryLoss:
    """One model's loss on one held-out story."""

    id: str
    """First 12 hex digits of the SHA-1 of its text."""
    nats: float
    """Its end included."""
    tokens: int
    bytes: int

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> StoryLoss:
        """Read a row of a table. Raises `KeyError`, `TypeError` or `ValueError`."""
        return cls(str(row["id"]), float(row["nats"]), int(row["tokens"]), int(row["bytes"]))

    @property
    def bits(self) -> float:
        return self.nats / math.log(2)


@dataclass(frozen=True, slots=True)
class QualityEvidence:
    """One finished evaluation as the store holds it."""

    run_id: str
    digest: str
    """Of the model folder that was measured."""
    ended_at: int
    """Milliseconds since 1970."""
    metrics: dict[str, float]
    params: dict[str, str]
    tags: dict[str, str]
    losses: tuple[StoryLoss, ...]
    """By the served runtime, in the order of the data."""
    stories: tuple[dict[str, Any], ...]
    """A row for each generated story: `number` and `seed` name it, the rest is its text and its figures. Empty: none
    were generated."""


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
        tables = {LOSSES: _loss_rows(report)}
        if report.written is not None:
            tables[STORIES] = _story_rows(report)
        if report.baseline_written is not None:
            tables[BASELINE] = report.baseline_written.rows()
        if report.rare_names is not None:
            tables[RARE_NAMES] = report.rare_names.rows()
        log_tables(run.client, run.run_id, {path: table_text(rows) for path, rows in tables.items()})
    return run.run_id


def load_quality_evidence(uri: str, digest: str, *, data_digest: str | None = None) -> QualityEvidence | None:
    """The newest finished evaluation of the model folder `digest`; None if there is none.

    Args:
        uri: the MLflow store.
        digest: of the model folder, all of it.
        data_digest: only evaluations on the stories of this digest (the tag `data.digest`).

    Raises:
        InputError: the store cannot be used.
        EvidenceError: the run's tables are missing or damaged.
    """
    client = open_store(uri)
    wanted = f"tags.`{DIGEST}` = '{digest}'"
    if data_digest is not None:
        wanted += f" and tags.`data.digest` = '{data_digest}'"
    with store_errors(uri):
        runs = finished_runs(client, EXPERIMENT, wanted)
    return _read_back(client, runs[0], digest) if runs else None


def _read_back(client: MlflowClient, run: Run, digest: str) -> QualityEvidence:
    run_id = str(run.info.run_id)

    def rows(path: str) -> list[dict[str, Any]]:
        return table_rows(read_artifact(client, run_id, path))

    try:
        losses = tuple(map(StoryLoss.from_row, rows(LOSSES)))
        stories = tuple(rows(STORIES)) if "seeds" in run.data.params else ()
        if not losses or not all(math.isfinite(loss.nats) for loss in losses):
            raise ValueError("it holds no losses, or some that are no numbers")
    except Exception as error:  # the file store's errors for a missing file, or a damaged table
        reason = " ".join(str(error).split())[:200]
        raise EvidenceError(f"MLflow run {run_id} is no evidence: its tables cannot be read ({reason})") from error
    return QualityEvidence(
        run_id=run_id,
        digest=digest,
        ended_at=int(run.info.end_time or 0),
        metrics=dict(run.data.metrics),
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        losses=losses,
        stories=stories,
    )


def _loss_rows(report: QualityReport) -> list[dict[str, Any]]:
    """A row for each held-out story: nats of the served runtime, of each runtime by name, and of the baseline."""
    held_out = report.held_out
    columns = {"nats": report.served} | {f"nats_{name}": found for name, found in report.runtimes.items()}
    if report.baseline is not None:
        columns["nats_baseline"] = report.baseline.figures
    nats = {name: figures.story_nats for name, figures in columns.items()}
    sizes = zip(held_out.ids, held_out.tokens, held_out.bytes, strict=True)
    return [
        {"id": story, "tokens": len(tokens), "bytes": int(size)}
        | {name: float(values[index]) for name, values in nats.items()}
        for index, (story, tokens, size) in enumerate(sizes)
    ]


def _story_rows(report: QualityReport) -> list[dict[str, Any]]:
    """A row for each generated story, with the judge's score if there was one."""
    assert report.written is not None
    rows = report.written.rows()
    if report.judgement is not None:
        for row, judged in zip(rows, report.judgement.stories, strict=True):
            row |= {"judge_nats": judged.nats, "judge_tokens": judged.tokens, "judge_bytes": judged.bytes}
    return rows


def _tags(report: QualityReport) -> dict[str, str]:
    """Which artifact was measured, by what, and what was not measured."""
    tags = {DIGEST: report.digest, "data.digest": report.held_out.digest}
    return (
        provenance().tags("story evaluate")
        | tags
        | {f"skipped.{name}": reason for name, reason in report.left_out.items()}
    )


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
    figures: dict[str, float | None] = {
        "bits_per_byte": report.served.bits_per_byte,
        "loss": report.served.loss,
        "tokens": report.tokens,
        "bytes": report.bytes,
        "stories": report.stories,
        "held_out_seen": report.seen_in_training,
    }
    rows = [(str(name), found) for name, found in report.runtimes.items()]
    if report.baseline is not None:
        rows.append(("baseline", report.baseline.figures))
    for name, found in rows:
        figures |= {f"{name}/bits_per_byte": found.bits_per_byte, f"{name}/loss": found.loss}
    intervals: dict[str, Estimate] = report.intervals()
    for prefix, stories in (("written", report.written), ("rare_names", report.rare_names)):
        if stories is not None:
            estimates = {f"{prefix}/{name}": estimate for name, estimate in stories.estimates().items()}
            figures |= {name: estimate.value for name, estimate in estimates.items()}
            intervals |= estimates
    if report.written is not None:
        longest = report.written.longest_copy
        figures["written/copied_words_max"] = None if longest is None else longest.words
    for name, estimate in intervals.items():
        figures |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    if report.baseline_written is not None:
        for name, estimate in report.baseline_written.estimates().items():
            figures[f"baseline/written/{name}"] = estimate.value
    if report.judgement is not None:
        judged = report.judgement.as_dict()
        figures |= {f"judge/{name}": judged[name] for name in judged if name != "judge"}
    return figures
