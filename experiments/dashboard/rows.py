"""Read the MLflow store: training runs with their curves and samples, evaluations, benchmarks, versions and the gate's
decisions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.benchmark.evidence import EXPERIMENT
from experiments.common.evidence_runs import DIGEST, finished_runs, read_artifact
from experiments.compare.frames import CURVE_COLUMNS, ORIGINS, TRAIN, VAL, curve
from experiments.compare.render import thinned
from experiments.dashboard.ages import keep
from experiments.dashboard.records import (
    AgeRow,
    BenchmarkRow,
    Curve,
    DecisionRow,
    EvaluationRow,
    Measure,
    Overview,
    RunRow,
    SampleSet,
    VersionRow,
)
from experiments.gate.run import EXPERIMENT as GATE
from experiments.quality.evidence import EXPERIMENT as EVALUATIONS
from experiments.registry.versions import versions_in
from training.tracking.observer import AGE_TABLE, AGES, STORIES
from training.tracking.runs import history, table_rows
from training.tracking.store import OWNER, Owner
from training.trainer.recipe import Recipe

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KEYS: dict[Measure, str] = {
    "held-out": VAL,
    "training": TRAIN,
    "rate": "train/learning_rate",
    "gradient": "train/grad_norm",
    "speed": "train/tokens_per_second",
    "processor": "system/cpu_utilization_percentage",
    "memory": "system/system_memory_usage_megabytes",
}
"""Where a measure is logged. Those of the machine have steps of their own: MLflow's monitor counts its samples."""
SETTINGS = {*(field.name for field in dataclasses.fields(Recipe)), "parameters", "world_size", "data", "init"}
"""Parameters that a training logs, by the part before the first point."""
MAX_SETTING = 200
"""Characters of a setting's value that are passed on."""
TRAINED = "metrics.elapsed_seconds > 0"
"""Only training runs log it, in whichever experiment they are; a sweep's trials are runs like others."""
TAGS = (*("model.recipe", "model.step", "model.tokens", "model.best_bits_per_byte"), *("promoted", "rolled_back"))
"""The tags of a version that are passed on."""
MAX_RUNS, MAX_POINTS, MAX_SAMPLE_SETS, MAX_CHARACTERS = 200, 300, 100, 4_000
"""What is passed on at most: runs, points of a curve, evaluations of a run, characters of a story."""
MAX_EVALUATIONS, MAX_BENCHMARKS, MAX_VERSIONS = 100, 100, 50

_DECISIONS: dict[str, DecisionRow] = {}
_ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*:/{2,}[^\s'\"()<>]*", re.IGNORECASE)
_WINDOWS = re.compile(r"\b[a-z]:\\[^\s'\"()<>]*", re.IGNORECASE)
_FOLDER = re.compile(r"(?<![\w/.~])~?/(?:[^\s'\"()<>:/]+/)+[^\s'\"()<>:/]*")


def without_places(text: str) -> str:
    """Replace each address and each absolute path by `…`: they name machines and people. `tokens/s` stays."""
    for pattern in (_ADDRESS, _WINDOWS, _FOLDER):
        text = pattern.sub("…", text)
    return text


def target_name(target: str) -> str:
    """Return what a benchmark's target is, not where; a registered version by its alias or number."""
    if target.startswith("models:/"):
        return target.removeprefix("models:/")
    if target.startswith(("http://", "https://")):
        return "a server"
    return without_places(target)


def finite(value: Any) -> float | None:
    """Return `value` as a number that JSON knows, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def overview(client: MlflowClient) -> Overview:
    """Return all that the page shows before the user chooses anything."""
    runs, more = run_rows(client)
    return Overview(
        runs=tuple(runs),
        evaluations=tuple(evaluation_rows(client)),
        benchmarks=tuple(benchmark_rows(client)),
        versions=tuple(version_rows(client, _DECISIONS)),
        more=more,
    )


def run_rows(client: MlflowClient) -> tuple[list[RunRow], bool]:
    """Return the newest training runs, newest first, and whether older ones are left out."""
    ids = [each.experiment_id for each in client.search_experiments()]
    if not ids:
        return [], False
    order = ["attributes.start_time DESC"]
    found = client.search_runs(ids, TRAINED, max_results=MAX_RUNS + 1, order_by=order)
    return [run_row(run) for run in found[:MAX_RUNS]], len(found) > MAX_RUNS


def curves(client: MlflowClient, runs: Sequence[str], measure: Measure) -> list[Curve]:
    """Return a curve for each of `runs`, as far as it logged the measure, with at most `MAX_POINTS` points."""
    from pandas import DataFrame

    found = []
    for run in runs:
        logged = machine_curve if KEYS[measure].startswith("system/") else curve
        points = DataFrame(logged(client, run, KEYS[measure]), columns=list(CURVE_COLUMNS[3:]), dtype=float)
        points = thinned(points[np.isfinite(points).all(axis=1)], MAX_POINTS)
        drawn = [
            (round(step), round(tokens), round(minutes, 3), float(f"{value:.6g}"))
            for step, tokens, minutes, value in points[list(CURVE_COLUMNS[3:])].itertuples(index=False, name=None)
        ]
        found.append(Curve(run=run, points=tuple(drawn)))
    return found


def machine_curve(client: MlflowClient, run: str, key: str) -> list[tuple[float, float, float, float]]:
    """Return (step, tokens, minutes, value) of a figure of the machine, placed in the training by the time of day."""
    clock = sorted(
        (each.timestamp, each.step, each.value) for each in client.get_metric_history(run, "elapsed_seconds")
    )
    if not clock:
        return []
    tokens = history(client, run, "tokens") or {0: 0.0}
    counted = sorted(tokens)
    times, steps, seconds = (np.array(part, dtype=float) for part in zip(*clock, strict=True))
    points = []
    for each in client.get_metric_history(run, key):
        step = float(np.interp(each.timestamp, times, steps))
        seen = float(np.interp(step, counted, [tokens[number] for number in counted]))
        points.append((step, seen, float(np.interp(each.timestamp, times, seconds)) / 60, float(each.value)))
    return sorted(points)


def sample_sets(client: MlflowClient, run: str) -> list[SampleSet]:
    """Return the sample stories of a run, by step; none where it kept none."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    try:
        for row in table_rows(read_artifact(client, run, STORIES)):
            by_step.setdefault(int(row["step"]), []).append(row)
        steps = sorted(by_step)
        if (last := len(steps) - 1) >= MAX_SAMPLE_SETS:  # evenly spaced; the first and the last stay
            steps = [steps[round(place)] for place in np.linspace(0, last, MAX_SAMPLE_SETS)]
        return [
            SampleSet(
                step=step,
                tokens=int(by_step[step][0]["tokens"]),
                bits_per_byte=finite(by_step[step][0]["bits_per_byte"]),
                stories=tuple((str(row["prompt"]), str(row["continuation"])[:MAX_CHARACTERS]) for row in by_step[step]),
            )
            for step in steps
        ]
    except Exception:  # missing, damaged, or of another program: each artifact store raises its own errors
        return []


def age_rows(client: MlflowClient, run: str) -> list[AgeRow]:
    """Return the ages of a run, the youngest first; none where it kept none."""
    try:
        found = [AgeRow.model_validate(row) for row in table_rows(read_artifact(client, run, AGE_TABLE))]
    except Exception:  # missing, damaged, or of another program: each artifact store raises its own errors
        return []
    return sorted(found, key=lambda row: row.step)


def age_folder(client: MlflowClient, run: str, step: int) -> str:
    """Return the folder of an age of a run in the user's cache, and download it if it is not there.

    Raises whatever the artifact store raises where it cannot be read.
    """
    name = f"{AGES}/step-{step:06d}"
    return str(keep(run, step, lambda place: client.download_artifacts(run, name, str(place))))


def evaluation_rows(client: MlflowClient) -> list[EvaluationRow]:
    """Return the newest finished evaluations, newest first."""
    return [_evaluation_row(run) for run in finished_runs(client, EVALUATIONS, limit=MAX_EVALUATIONS)]


def benchmark_rows(client: MlflowClient) -> list[BenchmarkRow]:
    """Return the newest finished benchmarks, newest first."""
    return [_benchmark_row(run) for run in finished_runs(client, EXPERIMENT, limit=MAX_BENCHMARKS)]


def version_rows(client: MlflowClient, known: dict[str, DecisionRow]) -> list[VersionRow]:
    """Return the newest versions, newest first. `known` caches decisions, which never change, by their run."""
    rows = []
    for version in versions_in(client)[:MAX_VERSIONS]:
        wanted = f"tags.`{DIGEST}` = '{version.digest}' and tags.gate != ''"
        decision = None
        for run in finished_runs(client, GATE, wanted):
            run_id = str(run.info.run_id)
            if run_id not in known:
                known[run_id] = _decision_row(client, run)
            decision = known[run_id]
        rows.append(
            VersionRow(
                number=version.number,
                digest=version.digest,
                aliases=version.aliases,
                created=version.created,
                tags={name: without_places(version.tags[name]) for name in TAGS if name in version.tags},
                decision=decision,
                run=version.run_id,
            )
        )
    return rows


def run_row(run: Run) -> RunRow:
    """Return what the page shows of a training run."""
    metrics, params, tags = run.data.metrics, run.data.params, run.data.tags
    seconds, tokens = finite(metrics.get("elapsed_seconds")), finite(metrics.get("tokens"))
    parameters = params.get("parameters", "")
    return RunRow(
        id=str(run.info.run_id),
        name=without_places(str(run.info.run_name or "")),
        status=_status(run),
        preset=without_places(params.get("name", "")),
        started=int(run.info.start_time or 0),
        minutes=None if seconds is None else seconds / 60,
        tokens=None if tokens is None else int(tokens),
        bits_per_byte=finite(metrics.get("val/best_bits_per_byte")),
        parameters=int(parameters) if parameters.isdecimal() else None,
        data=without_places(params.get("data", "")),
        stories=STORIES in tags.get("mlflow.loggedArtifacts", ""),
        ages=int(ages) if (ages := tags.get(AGES, "")).isdecimal() else 0,
        experiment=str(run.info.experiment_id),
        settings=_settings(run),
        sweep=without_places(tags.get("sweep", "")),
    )


def _settings(run: Run) -> dict[str, str]:
    """The parameters that a training logs, and where it was made."""
    params, tags = run.data.params, run.data.tags
    known = {name: params[name] for name in sorted(params) if name.partition(".")[0] in SETTINGS}
    known |= {name: tags[name][:length] for name, length in ORIGINS.items() if name in tags}
    return {name: without_places(text)[:MAX_SETTING] for name, text in known.items()}


def _status(run: Run) -> str:
    """Return a run's status; MLflow calls a run that was stopped by hand killed."""
    status, outcome = str(run.info.status), run.data.tags.get("outcome", "")
    if status == "RUNNING":
        owner = Owner.from_text(run.data.tags.get(OWNER, ""))
        return "killed" if owner is not None and owner.state() == "dead" else "running"
    if status == "KILLED":
        return "stopped" if outcome == "stopped" else "killed"
    return status.lower()


def _evaluation_row(run: Run) -> EvaluationRow:
    figures = _figures(run)
    stories = figures.get("stories")
    return EvaluationRow(
        id=str(run.info.run_id),
        digest=run.data.tags.get(DIGEST, ""),
        data=without_places(run.data.params.get("data.files", "")),
        stories=None if stories is None else round(stories),
        started=int(run.info.start_time or 0),
        figures=figures,
    )


def _figures(run: Run) -> dict[str, float]:
    """The metrics that are finite numbers."""
    figures = {name: finite(value) for name, value in run.data.metrics.items()}
    return {name: value for name, value in figures.items() if value is not None}


def _benchmark_row(run: Run) -> BenchmarkRow:
    return BenchmarkRow(
        id=str(run.info.run_id),
        target=target_name(run.data.params.get("target", "")),
        digest=run.data.tags.get(DIGEST, ""),
        started=int(run.info.start_time or 0),
        passed={"true": True, "false": False}.get(run.data.tags.get("passed", "")),
        figures=_figures(run),
    )


def _decision_row(client: MlflowClient, run: Run) -> DecisionRow:
    """Read the run's `decision.json`; where it is missing, return the verdict alone, and a note."""
    try:
        plain = json.loads(read_artifact(client, run.info.run_id, "decision.json"))
        return DecisionRow(
            verdict=plain["verdict"],
            decided=round(datetime.fromisoformat(plain["decided"]).timestamp() * 1000),
            champion=plain["champion"] or "",
            checks=tuple(_in_words(check) for check in plain["checks"]),
            notes=tuple(without_places(str(note)) for note in plain["notes"]),
        )
    except Exception:  # each artifact store raises its own errors for a missing file
        return DecisionRow(
            verdict=run.data.tags.get("gate", ""),
            decided=int(run.info.start_time or 0),
            champion=run.data.tags.get("champion.digest", ""),
            checks=(),
            notes=("the checks of this decision cannot be read",),
        )


def _in_words(check: dict[str, Any]) -> dict[str, str]:
    value, margin, low, high = (finite(check[name]) for name in ("value", "margin", "low", "high"))
    sign = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}.get(check["bound"], check["bound"])
    return {
        "verdict": check["verdict"],
        "metric": check["metric"],
        "value": "" if value is None else f"{value:.4g}",
        "threshold": f"{sign} {check['threshold']:g} {check['unit']}",
        "margin": "" if margin is None else f"{margin:+.3g}",
        "bounds": "" if low is None or high is None or low == high else f"{low:.4g} … {high:.4g}",
        "n": f"{check['n']:,}",
        "why": "" if check["verdict"] == "pass" else without_places(check["why"]),
    }
