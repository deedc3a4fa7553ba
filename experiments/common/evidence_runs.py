"""Evidence runs in MLflow: every verb that judges a model logs its run, and reads earlier ones, through this file."""

from __future__ import annotations

import math
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import AwareDatetime, ValidationError

from model.errors import InputError, StoryError, one_line
from model.serving import registry
from model.validation import Record, fault_of
from training.tracking.runs import flat, now, owned, store_errors
from training.tracking.store import mark_stale_runs, open_experiment, open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DIGEST = registry.DIGEST
"""Tag of a run and of a registered version: the digest of the model folder that was measured."""


class EvidenceError(StoryError):
    """A run's evidence is missing or damaged, so nothing can be decided by it."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class EvidenceRun:
    """A run that is being logged."""

    client: MlflowClient
    run_id: str

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log nested plain values as flat parameters."""
        from mlflow.entities import Param

        self.client.log_batch(self.run_id, params=[Param(key, text) for key, text in flat(dict(values)).items()])

    def log_metrics(self, figures: Mapping[str, float | None], *, step: int = 0) -> None:
        """Log the figures that are finite numbers."""
        from mlflow.entities import Metric

        timestamp = now()
        known = {name: float(value) for name, value in figures.items() if value is not None}
        metrics = [Metric(name, value, timestamp, step) for name, value in known.items() if math.isfinite(value)]
        self.client.log_batch(self.run_id, metrics=metrics)

    def log_texts(self, texts: Mapping[str, str]) -> None:
        """Log each text as the artifact of that name."""
        for path, text in texts.items():
            self.client.log_text(self.run_id, text, path)

    @contextmanager
    def artifacts(self) -> Iterator[Path]:
        """An empty folder; its files become the run's artifacts when the context ends."""
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            self.client.log_artifacts(self.run_id, folder)


class EvidenceStore:
    """An experiment to which evidence runs are logged."""

    def __init__(self, uri: str, experiment: str) -> None:
        """Open it, and mark the runs of dead processes.

        Raises:
            InputError: the store cannot be used. `MissingExtraError`: MLflow is not installed.
        """
        self._uri = uri
        self._opened = now()
        self._client = open_store(uri)
        with store_errors(uri):
            self._experiment_id = open_experiment(self._client, uri, experiment)
            mark_stale_runs(self._client, self._experiment_id)

    @contextmanager
    def run(self, name: str, tags: Mapping[str, str], *, began: int | None = None) -> Iterator[EvidenceRun]:
        """Create a run for the body of a `with`, and end it: `FINISHED`, or `FAILED` if the body raises.

        Only a finished run is evidence. `began` is in milliseconds since 1970; default: when the store was opened.

        Raises:
            InputError: the store failed meanwhile.
        """
        with store_errors(self._uri):
            started = self._opened if began is None else began
            run = self._client.create_run(self._experiment_id, started, {**tags, **owned()}, name)
            run_id = str(run.info.run_id)
            try:
                yield EvidenceRun(self._client, run_id)
            except BaseException:
                with suppress(Exception):
                    self._client.set_terminated(run_id, "FAILED")
                raise
            self._client.set_terminated(run_id, "FINISHED")


def finished_runs(client: MlflowClient, experiment: str, wanted: str = "", *, limit: int = 1) -> list[Run]:
    """The newest finished runs of an experiment that fit `wanted`, in MLflow's filter language."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    query = " and ".join(filter(None, [wanted, "attributes.status = 'FINISHED'"]))
    order = ["attributes.start_time DESC"]
    return list(client.search_runs([found.experiment_id], query, order_by=order, max_results=limit))


def read_artifact(client: MlflowClient, run_id: str, path: str) -> bytes:
    """The content of one artifact of a run."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, path, folder)).read_bytes()


class StoredEvidence(Record, ABC):
    """A finished run that measured a model, as the store holds it. A kind of evidence declares what it adds."""

    experiment: ClassVar[str]
    wanted: ClassVar[Mapping[str, str]] = {}
    """Tags of the runs that count, where a caller names no others."""

    run_id: str
    digest: str
    """Of the model folder that was measured."""
    began: AwareDatetime
    tags: dict[str, str]

    @classmethod
    @abstractmethod
    def contents(cls, run: Run, artifact: Callable[[str], bytes]) -> dict[str, Any]:
        """The fields that this kind adds. Whatever is raised while they are read makes the run no evidence."""

    @classmethod
    def newest(cls, uri: str, digest: str, tags: Mapping[str, str] | None = None) -> Self | None:
        """The newest finished run of the model folder `digest` that has these tags; None if there is none.

        Raises:
            InputError: a digest is not one, or the store cannot be used.
            EvidenceError: the run's artifacts are missing, damaged, or do not belong together.
        """
        wanted = {DIGEST: digest} | dict(cls.wanted if tags is None else tags)
        for name, value in wanted.items():
            if name.endswith("digest") and not re.fullmatch(r"[0-9a-f]{64}", value):
                raise InputError("digest", f"must be 64 hexadecimal digits, got {value!r}")
        client = open_store(uri)
        with store_errors(uri):
            query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in wanted.items())
            found = finished_runs(client, cls.experiment, query)
        if not found:
            return None
        run = found[0]
        run_id = str(run.info.run_id)
        try:
            return cls(
                run_id=run_id,
                digest=digest,
                began=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
                tags=run.data.tags,
                **cls.contents(run, partial(read_artifact, client, run_id)),
            )
        except Exception as error:  # the schema's, the file format's, or those of any artifact store for a missing file
            reason = ": ".join(fault_of(error)) if isinstance(error, ValidationError) else one_line(error)
            raise EvidenceError(f"MLflow run {run_id} is no evidence: {reason}") from None
