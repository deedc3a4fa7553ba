"""A comparison as pandas frames: curves over tokens and time, one row of figures a subject, what differs between them.

What is compared are training runs and registered versions, each by any name that it has. Figures of quality and speed
come from the newest finished evaluation and benchmark of the subject's own artifact, as they were logged: only the gate
computes them again. Where there is no such run, they are missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.benchmark.evidence import EXPERIMENT as BENCHMARKS
from experiments.common.evidence_runs import DIGEST, finished_runs
from experiments.gate.run import EXPERIMENT as GATES
from experiments.quality.evidence import EXPERIMENT as EVALUATIONS
from experiments.registry.versions import Version, versions
from model.errors import InputError
from model.serving.registry import NAME
from training.tracking.observer import EXPERIMENT as TRAININGS
from training.tracking.runs import history, store_errors
from training.tracking.store import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run, RunData
    from pandas import DataFrame

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


VAL, TRAIN = "val/bits_per_byte", "train/loss"
METRICS = (VAL, TRAIN)
CURVE_COLUMNS = ("name", "run", "metric", "step", "tokens", "minutes", "value")

COLUMNS: dict[str, tuple[str, str]] = {
    "run": ("training run", "s"),
    "version": ("registered version", "s"),
    "outcome": ("outcome", "s"),
    "best_bits_per_byte": ("best bits per byte, validation", ".4f"),
    "tokens": ("tokens trained on", ",.0f"),
    "minutes": ("minutes", ",.1f"),
    "train_tokens_per_second": ("tokens/s, the whole run", ",.0f"),
    "parameters": ("parameters", ",.0f"),
    "bits_per_byte": ("bits per byte, held out", ".4f"),
    "bits_per_byte_low": ("… 95 % from", ".4f"),
    "bits_per_byte_high": ("… to", ".4f"),
    "held_out": ("held-out stories", "s"),
    "written/ended": ("stories that end themselves", ".1%"),
    "written/looping": ("stories that loop", ".1%"),
    "written/names_straight": ("stories that keep their names", ".1%"),
    "tokens_per_second": ("tokens/s, one stream", ",.0f"),
    "total_tokens_per_second": ("tokens/s, many streams", ",.0f"),
    "ttft_p95": ("first token, 95th percentile (s)", ".4f"),
    "avg_generation_time": ("whole story, mean (s)", ".3f"),
}
"""Columns of `table`: the label of each, and the format of its values."""
QUALITY = (
    "bits_per_byte",
    "bits_per_byte_low",
    "bits_per_byte_high",
    "written/ended",
    "written/looping",
    "written/names_straight",
)
SPEED = ("tokens_per_second", "total_tokens_per_second", "ttft_p95", "avg_generation_time")
ORIGINS = {"data.digest": 12, "git.sha": 12, "machine.cpu": 80}
"""Tags that may differ too, with the number of characters that are shown."""


def curves(uri: str, subjects: Sequence[Subject], metrics: Sequence[str] = METRICS) -> DataFrame:
    """Every point of these metrics: `name`, `run`, `metric`, `step`, `tokens`, `minutes`, `value`.

    `tokens` are those trained on so far, `minutes` those of the run itself. A step that was repeated after a resume
    appears once, with its last value.

    Raises `InputError`: the store cannot be used.
    """
    from pandas import DataFrame

    client = open_store(uri)
    with store_errors(uri):
        rows = [
            (subject.label, subject.run_id, metric, *point)
            for subject in subjects
            for metric in metrics
            if subject.run is not None
            for point in curve(client, subject.run_id, metric)
        ]
    return DataFrame(rows, columns=list(CURVE_COLUMNS))


def curve(client: MlflowClient, run_id: str, metric: str) -> list[tuple[int, float, float, float]]:
    """Return (step, tokens, minutes, value) of each point by step; tokens or minutes are NaN where the run has none."""
    points = history(client, run_id, metric)
    steps = sorted(points)
    tokens, seconds = (_at(steps, history(client, run_id, key)) for key in ("tokens", "elapsed_seconds"))
    return [(step, seen, gone / 60, points[step]) for step, seen, gone in zip(steps, tokens, seconds, strict=True)]


def table(uri: str, subjects: Sequence[Subject]) -> DataFrame:
    """One row a subject, by its label: the columns of `COLUMNS`, NaN or None where nothing is known.

    Raises `InputError`: the store cannot be used.
    """
    from pandas import DataFrame

    client = open_store(uri)
    with store_errors(uri):
        rows = [_trained(subject) | _measured(client, subject.version) for subject in subjects]
    frame = DataFrame(rows, index=[subject.label for subject in subjects], columns=list(COLUMNS))
    frame.index.name = "name"
    numbers = {name: "float64" for name, (_, form) in COLUMNS.items() if form != "s"}
    return frame.astype(numbers)


def differences(subjects: Sequence[Subject]) -> DataFrame:
    """Parameters, data, code and processor where subjects differ: a row each, a column a subject; "" where not set."""
    from pandas import DataFrame

    columns = {}
    for subject in subjects:
        tags = subject.data.tags
        origins = {name: tags[name][:length] for name, length in ORIGINS.items() if name in tags}
        columns[subject.label] = subject.data.params | origins
    frame = DataFrame(columns, dtype="object").fillna("").sort_index()
    frame.index.name = "parameter"
    return frame[frame.nunique(axis=1) > 1]


def notes(figures: DataFrame, unlike: DataFrame) -> list[str]:
    """Warnings about figures that were not measured on the same thing."""
    found = []
    if "data.digest" in unlike.index:
        found.append("the runs were trained and validated on different data: their curves cannot be compared")
    if figures["held_out"].dropna().nunique() > 1:
        found.append("held-out figures are of different stories and cannot be compared")
    if "machine.cpu" in unlike.index:
        found.append("the runs were made on different machines: compare by tokens, not by minutes")
    return found


def _at(steps: Sequence[int], axis: dict[int, float]) -> list[float]:
    """An axis's values at `steps`, in between where there is none; NaN where the run has no such axis."""
    if not axis:
        return [float("nan")] * len(steps)
    axis = {0: 0.0} | axis  # an evaluation before the first step
    known = sorted(axis)
    return np.interp(steps, known, [axis[step] for step in known]).tolist()


def _trained(subject: Subject) -> dict[str, Any]:
    """Figures of the run, else those that its version keeps."""
    version, metrics, tags = subject.version, subject.data.metrics, subject.data.tags
    kept = {} if version is None else version.tags
    stated = {
        "best_bits_per_byte": metrics.get("val/best_bits_per_byte"),
        "tokens": metrics.get("tokens"),
        "parameters": subject.data.params.get("parameters"),
    }
    known = {name: kept.get(f"model.{name}") if value is None else value for name, value in stated.items()}
    seconds = metrics.get("elapsed_seconds")
    return {name: float(value) for name, value in known.items() if value is not None} | {
        "run": subject.run_id[:8] or None,
        "version": None if version is None else ", ".join((str(version.number), *version.aliases)),
        "outcome": tags.get("outcome") or ("imported" if "imported" in tags else None),
        "minutes": seconds and seconds / 60,
        "train_tokens_per_second": seconds and known["tokens"] and float(known["tokens"]) / seconds,
    }


def _measured(client: MlflowClient, version: Version | None) -> dict[str, Any]:
    """Figures of the newest evaluation and benchmark of a version's artifact; none without a version."""
    figures: dict[str, Any] = {}
    if version is None:
        return figures
    if (run := _newest(client, EVALUATIONS, version.digest, QUALITY[:1])) is not None:
        stories, data = run.data.metrics.get("stories"), run.data.tags.get("data.digest", "")
        figures = {name: run.data.metrics.get(name) for name in QUALITY}
        figures["held_out"] = None if stories is None else f"{stories:,.0f} ({data[:8]})"
    if (run := _newest(client, BENCHMARKS, version.digest, SPEED)) is not None:
        figures |= {name: run.data.metrics.get(name) for name in SPEED}
    return figures


def _newest(client: MlflowClient, experiment: str, digest: str, figures: Sequence[str]) -> Run | None:
    """The newest finished run of `experiment` that measured this artifact and has one of the figures."""
    runs = finished_runs(client, experiment, f"tags.`{DIGEST}` = '{digest}'", limit=20)
    return next((run for run in runs if run.data.metrics.keys() & set(figures)), None)
