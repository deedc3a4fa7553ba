"""An evaluation as an evidence run in MLflow, and read back for whoever decides on it.

Evidence belongs to one artifact: the run's tag `artifact.digest` is the digest of the model folder that was measured.
Besides its means a run keeps every held-out story's nats and every written story, because two models are compared on
the same stories, pair by pair, and because a figure should be open to doubt.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from experiments.quality.facts import DIGEST, loss_rows, metrics_of, params_of, story_rows, tags_of
from experiments.quality.report import QualityReport
from model.errors import DataError, StoryError
from training.tracking.runs import flat, now, without_folders
from training.tracking.store import (
    LAST_SEEN,
    OWNER,
    mark_stale_runs,
    open_experiment,
    open_store,
    owner_of,
    unusable,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "story-evaluation"
LOSSES, STORIES, FLOOR_STORIES = "held_out/losses.json", "written/stories.json", "written/floor.json"
"""Tables in MLflow's own form, which its page shows."""
REPORT = "report.json"


@dataclass(frozen=True, slots=True)
class StoryLoss:
    """What one model made of one held-out story."""

    id: str
    """First 12 hex digits of the SHA-1 of its text."""
    nats: float
    """Its end included."""
    tokens: int
    bytes: int


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
    """A row for each written story: `number` and `seed` name it, the rest is its text and its figures. Empty: the
    model was not asked to write."""


class EvidenceStore:
    """The experiment that evaluations are logged to."""

    def __init__(self, client: MlflowClient, uri: str, experiment_id: str) -> None:
        self._client, self._uri, self._experiment_id = client, uri, experiment_id
        self._began = now()

    @classmethod
    def open(cls, uri: str) -> Self:
        """Open the store, before the measuring begins: that it is unusable is better known then than afterwards.

        Raises:
            InputError: it cannot be used. `MissingExtraError`: MLflow is not installed.
        """
        client = open_store(uri)
        try:
            experiment_id = open_experiment(client, uri, EXPERIMENT)
            mark_stale_runs(client, experiment_id)
        except StoryError:
            raise
        except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
            raise unusable(uri, error) from error
        return cls(client, uri, experiment_id)

    def log(self, report: QualityReport) -> str:
        """Log `report` as a run that began when this store was opened; returns the run's id.

        The run counts as finished once everything is there; one that broke off is marked as failed.

        Raises:
            InputError: the store failed meanwhile.
        """
        try:
            tags = tags_of(report) | {OWNER: owner_of().to_text(), LAST_SEEN: str(now())}
            name = f"quality {report.digest[:8]}"
            run = self._client.create_run(self._experiment_id, self._began, tags, name)
            run_id = str(run.info.run_id)
            try:
                self._fill(run_id, report)
            except BaseException:
                self._client.set_terminated(run_id, "FAILED")
                raise
            self._client.set_terminated(run_id, "FINISHED")
        except StoryError:
            raise
        except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
            raise unusable(self._uri, error) from error
        return run_id

    def _fill(self, run_id: str, report: QualityReport) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in flat(params_of(report)).items()]
        self._client.log_batch(run_id, metrics=metrics_of(report), params=params, synchronous=True)
        self._client.log_dict(run_id, without_folders(report.as_dict()), REPORT)
        tables = {LOSSES: loss_rows(report)}
        if report.written is not None:
            tables[STORIES] = story_rows(report)
        if report.floor_written is not None:
            tables[FLOOR_STORIES] = report.floor_written.rows()
        for path, rows in tables.items():
            self._client.log_text(run_id, table_text(rows), path)
        # With this tag MLflow's page lists the files among the run's tables.
        listed = json.dumps([{"path": path, "type": "table"} for path in tables])
        self._client.set_tag(run_id, "mlflow.loggedArtifacts", listed)


def load_quality_evidence(uri: str, digest: str, *, data_digest: str | None = None) -> QualityEvidence | None:
    """The newest finished evaluation of the model folder `digest`; None if there is none.

    Args:
        uri: the MLflow store.
        digest: of the model folder, whole.
        data_digest: only evaluations on the very stories of this digest (the parameter `data.digest`).

    Raises:
        InputError: the store cannot be used.
        DataError: the run's tables are missing or damaged, so that it is evidence of nothing.
    """
    client = open_store(uri)
    wanted = f"attributes.status = 'FINISHED' and tags.`{DIGEST}` = '{digest}'"
    if data_digest is not None:
        wanted += f" and tags.`data.digest` = '{data_digest}'"
    try:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return None
        runs = client.search_runs(
            [experiment.experiment_id], wanted, max_results=1, order_by=["attributes.end_time DESC"]
        )
    except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
        raise unusable(uri, error) from error
    return _read_back(client, runs[0], digest) if runs else None


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as the JSON that `mlflow.load_table` reads. MLflow's own `log_table` stumbles over pandas 3's texts."""
    columns = list(rows[0])
    data = [[row[column] for column in columns] for row in rows]
    return json.dumps({"columns": columns, "data": data}, ensure_ascii=False)


def _read_back(client: MlflowClient, run: Run, digest: str) -> QualityEvidence:
    run_id = str(run.info.run_id)
    try:
        losses = tuple(
            StoryLoss(str(row["id"]), float(row["nats"]), int(row["tokens"]), int(row["bytes"]))
            for row in _rows(client, run_id, LOSSES)
        )
        stories = tuple(_rows(client, run_id, STORIES)) if "seeds" in run.data.params else ()
        if not losses or not all(math.isfinite(loss.nats) for loss in losses):
            raise ValueError("it holds no losses, or some that are no numbers")
    except Exception as error:  # a file that is gone is told by whatever keeps the files
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"MLflow run {run_id} is no evidence: its tables cannot be read ({reason})"
        ) from error
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


def _rows(client: MlflowClient, run_id: str, path: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        table = json.loads(Path(client.download_artifacts(run_id, path, folder)).read_text("utf-8"))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
