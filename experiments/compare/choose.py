"""What is compared: training runs and registered versions, each by any name that it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from experiments.benchmark.evidence import EXPERIMENT as BENCHMARKS
from experiments.gate.run import EXPERIMENT as GATES
from experiments.quality.evidence import EXPERIMENT as EVALUATIONS
from experiments.registry.versions import Version, versions
from model.errors import InputError
from model.serving.registry import NAME
from training.tracking.observer import EXPERIMENT as TRAININGS
from training.tracking.runs import store_errors
from training.tracking.store import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run, RunData

NO_TRAINING = {BENCHMARKS, EVALUATIONS, GATES}
"""Experiments whose runs measure a model and train none."""
NEWEST = 5
MOST_RUNS = 50_000
"""MLflow gives no more at once."""
SHORTEST_ID = 4
"""Digits of a run's id that are enough to name it."""
SHORTEST_DIGEST = 8
MOST_NAMED = 12
"""Names that an error lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One column of a comparison: a training run, and the registered version that came of it, if one did."""

    label: str
    """Unique."""
    run: Run | None
    """None: the version's run is gone from the store."""
    version: Version | None

    @property
    def run_id(self) -> str:
        return "" if self.run is None else str(self.run.info.run_id)

    @property
    def data(self) -> RunData:
        """Metrics, parameters and tags of the run."""
        from mlflow.entities import RunData

        return RunData() if self.run is None else self.run.data


def choose(uri: str, names: Sequence[str] = (), *, newest: int = NEWEST) -> list[Subject]:
    """The runs and versions called `names`, in that order; without names, the `newest` training runs.

    A name is a run's id or its first 4 digits or more, a run's name, a version's number or alias, 8 digits of its
    digest, or `models:/story-writer/2`, `models:/story-writer@champion`. What is named twice is taken once.

    Raises `InputError`: a name means nothing, or more than one thing; there is no training run; the store is unusable.
    """
    if newest < 1:
        raise InputError("newest", f"must be at least 1, got {newest}")
    client = open_store(uri)
    with store_errors(uri):
        every = versions(uri)
        runs = _training_runs(client)
        if names:
            found = [_named(name, client, runs, every) for name in names]
        else:
            own = {e.experiment_id for e in client.search_experiments() if e.name == TRAININGS}
            newer = [run for run in runs if run.info.experiment_id in own and "imported" not in run.data.tags]
            found = [_of_run(run, every) for run in newer[:newest]]
    if not found:
        raise InputError("run", "must be one of this store's, and it has no training run; `story train` makes one")
    return _with_unique_labels(found)


def _training_runs(client: MlflowClient) -> list[Run]:
    """All runs that may be trainings, newest first."""
    experiments = [e.experiment_id for e in client.search_experiments() if e.name not in NO_TRAINING]
    order = ["attributes.start_time DESC"]
    return list(client.search_runs(experiments, order_by=order, max_results=MOST_RUNS)) if experiments else []


def _of_run(run: Run, every: Iterable[Version]) -> Subject:
    """A run, with the newest version that was registered of it."""
    made = [version for version in every if version.run_id == run.info.run_id]
    newest = max(made, key=lambda version: version.number, default=None)
    return Subject(label=str(run.info.run_name), run=run, version=newest)


def _of_version(version: Version, client: MlflowClient) -> Subject:
    from mlflow.exceptions import MlflowException

    known = f" ({', '.join(version.aliases)})" if version.aliases else ""
    try:
        run = client.get_run(version.run_id) if version.run_id else None
    except MlflowException:
        run = None
    return Subject(label=f"version {version.number}{known}", run=run, version=version)


def _named(name: str, client: MlflowClient, runs: Sequence[Run], every: Sequence[Version]) -> Subject:
    """The one run or version called `name`. Raises `InputError` where there is none, or more than one."""
    uri = f"models:/{NAME}"
    asked = name.strip()
    is_version = asked.startswith((f"{uri}/", f"{uri}@"))
    asked = asked.removeprefix(uri)[1:] if is_version else asked
    found = (
        []
        if is_version
        else [
            run
            for run in runs
            if run.info.run_name == asked or (len(asked) >= SHORTEST_ID and run.info.run_id.startswith(asked))
        ]
    )
    found = [run for run in found if run.info.run_id == asked] or found
    fits = [
        version
        for version in every
        if asked in (str(version.number), *version.aliases)
        or (not is_version and len(asked) >= SHORTEST_DIGEST and version.digest.startswith(asked))
    ]
    if len(found) + len(fits) == 1:
        return _of_run(found[0], every) if found else _of_version(fits[0], client)
    if found or fits:
        meant = [f"run {run.info.run_id[:8]} ({run.info.run_name})" for run in found]
        meant += [f"version {version.number}" for version in fits]
        fault = f"{name!r} may mean {_listed(meant)}; name one by its id or as {uri}/NUMBER"
    else:
        known = [f"{run.info.run_name} ({run.info.run_id[:8]})" for run in runs if "imported" not in run.data.tags]
        numbers = [" = ".join((str(version.number), *version.aliases)) for version in every]
        there = f"runs: {_listed(known)}; versions: {_listed(numbers)}"
        fault = f"must be a run or a registered version, got {name!r}; {there}"
    raise InputError("run", fault)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED]) or 'none'}{more}"


def _with_unique_labels(subjects: Sequence[Subject]) -> list[Subject]:
    """Each subject once, under a unique label: runs of one name get their ids appended."""
    once: dict[tuple[str, int | None], Subject] = {}
    for subject in subjects:
        number = None if subject.version is None else subject.version.number
        once.setdefault((subject.run_id, number), subject)
    labels = [subject.label for subject in once.values()]
    return [
        subject if labels.count(subject.label) == 1 else replace(subject, label=f"{subject.label} {subject.run_id[:8]}")
        for subject in once.values()
    ]
