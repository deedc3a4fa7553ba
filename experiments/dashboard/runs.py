"""Training runs of a store: one row each, their curves, and what they wrote while they learned."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.dashboard.private import without_places
from experiments.dashboard.records import Curve, Moment, RunRow
from training.tracking.observer import STORIES
from training.tracking.store import OWNER, Owner

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

Measure = Literal["held-out", "training"]
KEYS: dict[Measure, str] = {"held-out": "val/bits_per_byte", "training": "train/loss"}
"""Where a measure is logged: bits per byte on held-out stories, nats a token of the batches."""

TRAINED = "metrics.elapsed_seconds > 0"
"""What only a training run has logged, in whichever experiment it lies; a sweep's trials are runs like others."""

MOST_RUNS, MOST_POINTS, MOST_MOMENTS, MOST_CHARS = 200, 300, 100, 4_000
"""What is handed on at most: rows, points of a curve, evaluations of a run, characters of a story."""


def run_rows(client: MlflowClient) -> tuple[list[RunRow], bool]:
    """The newest training runs, newest first, and whether older ones are left out."""
    ids = [each.experiment_id for each in client.search_experiments()]
    if not ids:
        return [], False
    order = ["attributes.start_time DESC"]
    found = client.search_runs(ids, TRAINED, max_results=MOST_RUNS + 1, order_by=order)
    return [_row(run) for run in found[:MOST_RUNS]], len(found) > MOST_RUNS


def curves(client: MlflowClient, runs: Sequence[str], measure: Measure) -> list[Curve]:
    """A curve for each of `runs`, as far as it logged the measure, thinned to `MOST_POINTS`."""
    made = []
    for run in runs:
        values = _by_step(client.get_metric_history(run, KEYS[measure]))
        tokens = _by_step(client.get_metric_history(run, "tokens"))
        seconds = _by_step(client.get_metric_history(run, "elapsed_seconds"))
        tokens[0] = 0.0  # the look before the first step
        seconds.setdefault(0, 0.0)
        points = [
            (int(tokens[step]), seconds[step] / 60, value)
            for step, value in sorted(values.items())
            if step in tokens and step in seconds
        ]
        made.append(Curve(run=run, points=tuple(thinned(points, MOST_POINTS))))
    return made


def thinned(points: Sequence[tuple[int, float, float]], most: int) -> list[tuple[int, float, float]]:
    """At most `most` points: the means of neighbours, so that noise is smoothed and nothing is left out."""
    if len(points) <= most:
        return list(points)
    made = []
    for number in range(most):
        part = points[number * len(points) // most : (number + 1) * len(points) // most]
        tokens, minutes, value = (sum(each) / len(part) for each in zip(*part, strict=True))
        made.append((round(tokens), minutes, value))
    return made


def moments(client: MlflowClient, run: str) -> list[Moment]:
    """The sample stories of a run, by step; none where it kept none."""
    with tempfile.TemporaryDirectory(prefix="story-overview-") as folder:
        try:
            path = Path(client.download_artifacts(run, STORIES, folder))
            table = json.loads(path.read_text("utf-8"))
            rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
            return _moments(rows)
        except (
            Exception
        ):  # gone, damaged, or of another program: whatever keeps the files tells it in its own way
            return []


def _moments(rows: Iterable[dict[str, Any]]) -> list[Moment]:
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_step.setdefault(int(row["step"]), []).append(row)
    steps = sorted(by_step)
    if len(steps) > MOST_MOMENTS:  # the first and the last stay
        places = (round(number * (len(steps) - 1) / (MOST_MOMENTS - 1)) for number in range(MOST_MOMENTS))
        steps = [steps[place] for place in places]
    return [
        Moment(
            step=step,
            tokens=int(by_step[step][0]["tokens"]),
            bits_per_byte=finite(by_step[step][0]["bits_per_byte"]),
            stories=tuple(
                (str(row["prompt"]), str(row["continuation"])[:MOST_CHARS]) for row in by_step[step]
            ),
        )
        for step in steps
    ]


def finite(value: Any) -> float | None:
    """`value` as a number that JSON knows, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _row(run: Run) -> RunRow:
    metrics, params, tags = run.data.metrics, run.data.params, run.data.tags
    seconds, best = finite(metrics.get("elapsed_seconds")), metrics.get("val/best_bits_per_byte")
    tokens = finite(metrics.get("tokens"))
    counted = params.get("parameters", "")
    return RunRow(
        id=str(run.info.run_id),
        name=without_places(str(run.info.run_name or "")),
        status=_status(run),
        preset=without_places(params.get("name", "")),
        started=int(run.info.start_time or 0),
        minutes=None if seconds is None else seconds / 60,
        tokens=None if tokens is None else int(tokens),
        bits_per_byte=finite(best),
        parameters=int(counted) if counted.isdecimal() else None,
        data=without_places(params.get("data", "")),
        stories=STORIES in tags.get("mlflow.loggedArtifacts", ""),
    )


def _status(run: Run) -> str:
    """As a reader would say it. MLflow calls a run that was stopped by hand killed."""
    status, outcome = str(run.info.status), run.data.tags.get("outcome", "")
    if status == "RUNNING":
        owner = Owner.from_text(run.data.tags.get(OWNER, ""))
        return "killed" if owner is not None and owner.state() == "dead" else "running"
    if status == "KILLED":
        return "stopped" if outcome == "stopped" else "killed"
    return status.lower()


def _by_step(history: Iterable[Metric]) -> dict[int, float]:
    """The value of each step; of a step that a resume did again, the later one."""
    found: dict[int, float] = {}
    for metric in sorted(history, key=lambda each: int(each.timestamp)):
        if math.isfinite(metric.value):
            found[int(metric.step)] = float(metric.value)
    return found
