"""The MLflow run that stands for a sweep: its space and plan, all trials, the best one, and pictures of both.

The trials' own runs hang below it. A sweep that is continued goes on in the same run, as long as the store knows it.
"""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.sweep.figures import draw_history, draw_importance
from experiments.sweep.plan import Plan
from experiments.sweep.shown import best_of, importance, rows, summary
from experiments.sweep.study import RUN
from training.tracking.provenance import provenance
from training.tracking.runs import now, set_tags, without_folders
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
    import optuna
    from mlflow import MlflowClient

EXPERIMENT = "story-sweep"
TRIALS = "trials.json"
"""Artifact: all trials, as MLflow shows tables."""


def begin_parent(uri: str, study: optuna.Study, plan: Plan) -> str:
    """The sweep's run, begun or gone on with; returns its id.

    Raises:
        InputError: the store cannot be used.
    """
    client = open_store(uri)
    experiment = open_experiment(client, uri, EXPERIMENT)
    try:
        mark_stale_runs(client, experiment)
        tags = {OWNER: owner_of().to_text(), LAST_SEEN: str(now()), "outcome": "running"}
        run_id = _known(client, study)
        if run_id is not None:
            set_tags(client, run_id, tags)
            client.update_run(run_id, status="RUNNING")
            return run_id
        tags |= provenance().tags() | {"sweep": study.study_name, "data.digest": plan.digest or "unknown"}
        tags |= {"mlflow.source.name": "story sweep", "mlflow.source.type": "LOCAL"}
        run_id = str(client.create_run(experiment, run_name=study.study_name, tags=tags).info.run_id)
        study.set_user_attr(RUN, run_id)
        _log_params(client, run_id, study, plan)
        client.log_dict(run_id, without_folders(plan.as_dict()), "plan.json")
    except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
        raise unusable(uri, error) from error
    return run_id


def end_parent(uri: str, run_id: str, study: optuna.Study, status: str) -> None:
    """Log how the trials went and close the run as `status` (FINISHED, KILLED or FAILED).

    Raises:
        InputError: the store cannot be used.
    """
    from mlflow.entities import Metric

    client = open_store(uri)
    plan_rows = rows(study)
    try:
        points = []
        so_far = math.inf
        for row in plan_rows:
            if row["state"] != "complete":
                continue
            so_far = min(so_far, row["value"])
            points.append(Metric("trial/bits_per_byte", row["value"], row["ended_ms"], row["number"]))
            points.append(Metric("best_bits_per_byte", so_far, row["ended_ms"], row["number"]))
        counts = summary(study)["trials"]
        points += [Metric(f"trials/{state}", count, now(), 0) for state, count in counts.items()]
        for first in range(0, len(points), 900):  # MLflow takes at most 1,000 at once
            client.log_batch(run_id, metrics=points[first : first + 900])
        if (best := best_of(study)) is not None:
            set_tags(
                client, run_id, {"best.trial": str(best["number"]), "best.command": best["command"][:5000]}
            )
            client.log_dict(run_id, best["recipe"], "best-recipe.json")
            client.log_text(run_id, best["command"] + "\n", "best.txt")
        _log_table(client, run_id, plan_rows)
        with tempfile.TemporaryDirectory() as place:
            draw_history(plan_rows, Path(place) / "history.png")
            if shares := importance(study):
                draw_importance(shares, Path(place) / "importance.png")
            client.log_artifacts(run_id, place)
        set_tags(
            client, run_id, {"outcome": {"FINISHED": "finished", "KILLED": "stopped"}.get(status, "failed")}
        )
        client.set_terminated(run_id, status)
    except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
        with suppress(Exception):
            client.set_terminated(run_id, "FAILED")
        raise unusable(uri, error) from error


def _known(client: MlflowClient, study: optuna.Study) -> str | None:
    from mlflow.exceptions import MlflowException

    run_id = study.user_attrs.get(RUN)
    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None  # another store than the one it was begun in
    return str(run_id) if run.info.lifecycle_stage == "active" else None


def _log_params(client: MlflowClient, run_id: str, study: optuna.Study, plan: Plan) -> None:
    from mlflow.entities import Param

    params = {
        "study": study.study_name,
        "budget": str(plan.budget),
        "data": Path(plan.data).name,
        "place": plan.place,
        "seed": str(plan.seed),
        "recipe.seed": str(plan.space.base.seed),
        "prune": plan.space.prune.by,
        "recipe": " ".join(without_folders(plan.space.origin)),
    }
    params |= {
        f"search.{name}": json.dumps(dimension.model_dump(mode="json", exclude_defaults=True))
        for name, dimension in plan.space.dimensions.items()
    }
    client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])


def _log_table(client: MlflowClient, run_id: str, found: list[dict[str, Any]]) -> None:
    """All trials as a table that MLflow's page shows."""
    fixed = ("number", "state", "value", "pruned_at", "seconds", "reason")
    names = sorted({name for row in found for name in row["params"]})
    data = [[*(row[key] for key in fixed), *(row["params"].get(name) for name in names)] for row in found]
    client.log_text(run_id, json.dumps({"columns": [*fixed, *names], "data": data}), TRIALS)
    client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([{"path": TRIALS, "type": "table"}]))
