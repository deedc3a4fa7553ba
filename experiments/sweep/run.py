"""`story sweep`: begin or continue a study by name, run its workers, and log it to MLflow.

A sweep is one MLflow run with its space, plan, trials, best recipe and pictures; each trial's run is a child of it. A
sweep that is continued resumes that run, as long as the store knows it.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.common.evidence_runs import EvidenceRun, store_errors
from experiments.sweep.plan import DEFAULT_SPACE, Budget, Plan, load_space
from experiments.sweep.render import best_of, draw_history, draw_importance, importance, rows, summary
from experiments.sweep.study import (
    EXPERIMENT,
    RUN,
    begin_study,
    open_study,
    plan_of,
    refuse_another_plan,
    requeue_stale_trials,
    study_names,
)
from experiments.sweep.trial import Say
from experiments.sweep.worker import FAILED, STOPPED, WorkerConfig, run_workers, say, work
from model.errors import InputError
from training.interrupts import StopFlag, stop_on_signals
from training.tracking.provenance import provenance, usable_cores
from training.tracking.runs import known_run, log_tables, now, set_tags, table_text, without_folders
from training.tracking.store import LAST_SEEN, OWNER, mark_stale_runs, open_experiment, open_store, owner_of

if TYPE_CHECKING:
    import optuna
    from mlflow import MlflowClient

Place = Literal["here", "modal"]
UNDECIDED = 3
"""Exit code: no trial is complete, so nothing is known."""
STATUS = {0: "FINISHED", UNDECIDED: "FINISHED", STOPPED: "KILLED"}
OUTCOME = {"FINISHED": "finished", "KILLED": "stopped"}
DATA: dict[Place, str] = {"here": "data/tinystories", "modal": "tinystories"}
TRIALS = "trials.json"
"""Artifact: all trials, as MLflow shows tables."""
METRICS_AT_ONCE = 900
"""MLflow takes at most 1,000 in one request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """A call of `story sweep`. None: what the sweep was begun with, else the default."""

    name: str
    storage: str
    trials: int = 20
    """Of the sweep in all; those of earlier calls count."""
    minutes: float | None = None
    steps: int | None = None
    space: Path | None = None
    data: str | None = None
    out: Path | None = None
    seed: int | None = None
    workers: int = 1
    threads: int | None = None
    place: Place | None = None
    tracking_uri: str | None = None
    """None: nothing is logged to MLflow."""

    def __post_init__(self) -> None:
        for name in ("trials", "workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(name, f"must be at least 1, got {value}")
        if not 1 <= len(self.name) <= 80 or set(self.name) & set('/\\\0\n"') or self.name.startswith("."):
            raise InputError("name", f"must be a plain name of at most 80 characters, got {self.name!r}")


def run_sweep(options: SweepOptions, say: Say = say) -> tuple[optuna.Study, int]:
    """Begin or continue a sweep until it has the trials asked for; return its study and an exit code.

    Raises:
        InputError: an option is not usable, or would make trials that cannot be compared with the earlier ones.
        SpaceError, DataError: the space or the shards are not usable.
    """
    uri = options.tracking_uri
    with stop_on_signals() as stop:
        study = _open_or_begin(options)
        plan = plan_of(study)
        for number in requeue_stale_trials(study):
            say(f"trial {number}: its worker died; it is queued again")
        parent = None if uri is None else begin_run(uri, study, plan)
        config = WorkerConfig(
            storage=options.storage,
            name=options.name,
            out=str(options.out or Path("runs") / "sweeps" / options.name),
            data=options.data or plan.data,
            trials=options.trials,
            threads=options.threads or max(1, usable_cores() // options.workers),
            tracking_uri=uri,
            parent_run=parent,
        )
        code = FAILED
        try:
            code = _run_workers(config, plan, options.workers, say, stop)
            if code == 0 and best_of(study) is None:
                code = UNDECIDED
        finally:
            if parent is not None and uri is not None:
                end_run(uri, parent, study, STATUS.get(code, "FAILED"))
    return study, code


def _run_workers(config: WorkerConfig, plan: Plan, workers: int, say: Say, stop: StopFlag) -> int:
    if plan.place == "modal":
        from experiments.sweep.on_modal import run_on_modal

        return run_on_modal(config, plan, workers, say, stop.is_set)
    if workers == 1:
        return work(config, say, stop.is_set, bar=True)
    return run_workers(config, workers, say, stop.is_set)


def _open_or_begin(options: SweepOptions) -> optuna.Study:
    """Return the study of that name, new or existing, with the plan asked for."""
    if options.name in study_names(options.storage):
        study = open_study(options.storage, options.name)
        refuse_another_plan(study, _continued_plan(options, plan_of(study)))
        return study
    place = options.place or "here"
    budget = Budget(minutes=options.minutes, steps=options.steps)
    space = load_space(options.space or DEFAULT_SPACE)
    data = options.data or DATA[place]
    digest = None if place == "modal" else _digest(Path(data), space.base.model.vocab_size)
    plan = Plan(space=space, budget=budget, data=data, digest=digest, place=place, seed=options.seed or 0)
    return begin_study(options.storage, options.name, plan)


def _continued_plan(options: SweepOptions, plan: Plan) -> Plan:
    """Return the plan with the options given anew: where that differs, the call is refused."""
    changes: dict[str, Any] = {}
    if options.minutes is not None or options.steps is not None:
        changes["budget"] = Budget(minutes=options.minutes, steps=options.steps)
    if options.space is not None:
        changes["space"] = load_space(options.space)
    if options.seed is not None:
        changes["seed"] = options.seed
    if options.place is not None:
        changes["place"] = options.place
    if plan.place == "here":
        changes["digest"] = _digest(Path(options.data or plan.data), plan.space.base.model.vocab_size)
    elif options.data is not None and options.data != plan.data:
        changes |= {"data": options.data, "digest": None}
    return plan.model_copy(update=changes)


def _digest(data: Path, vocab_size: int) -> str:
    from training.data.shards import read_meta

    meta = read_meta(data)
    if meta.get("vocab_size") != vocab_size:
        raise InputError(
            "data",
            f"{data} has {meta.get('vocab_size')} tokens where the space's recipe has model.vocab_size {vocab_size}",
        )
    return str(meta.get("digest"))


def begin_run(uri: str, study: optuna.Study, plan: Plan) -> str:
    """Begin or resume the sweep's MLflow run; return its id.

    Raises:
        InputError: the store cannot be used.
    """
    client = open_store(uri)
    experiment = open_experiment(client, uri, EXPERIMENT)
    with store_errors(uri):
        mark_stale_runs(client, experiment)
        tags = {OWNER: owner_of().to_text(), LAST_SEEN: str(now()), "outcome": "running"}
        if (known := known_run(client, study.user_attrs.get(RUN))) is not None:
            set_tags(client, known.info.run_id, tags)
            client.update_run(known.info.run_id, status="RUNNING")
            return str(known.info.run_id)
        tags |= provenance().tags("story sweep")
        tags |= {"sweep": study.study_name, "data.digest": plan.digest or "unknown"}
        run_id = str(client.create_run(experiment, run_name=study.study_name, tags=tags).info.run_id)
        study.set_user_attr(RUN, run_id)
        EvidenceRun(client, run_id).log_params(
            {
                "study": study.study_name,
                "budget": str(plan.budget),
                "data": Path(plan.data).name,
                "place": plan.place,
                "seed": plan.seed,
                "recipe.seed": plan.space.base.seed,
                "prune": plan.space.prune.by,
                "recipe": " ".join(without_folders(plan.space.origin)),
            }
            | {f"search.{name}": json.dumps(one) for name, one in summary(study)["space"].items()}
        )
        client.log_dict(run_id, without_folders(plan.model_dump(mode="json")), "plan.json")
    return run_id


def end_run(uri: str, run_id: str, study: optuna.Study, status: str) -> None:
    """Log how the trials went, and end the run as `status` (FINISHED, KILLED or FAILED).

    Raises:
        InputError: the store cannot be used.
    """
    client = open_store(uri)
    with store_errors(uri):
        try:
            _log_trials(client, run_id, study)
            set_tags(client, run_id, {"outcome": OUTCOME.get(status, "failed")})
            client.set_terminated(run_id, status)
        except Exception:
            with suppress(Exception):
                client.set_terminated(run_id, "FAILED")
            raise


def _log_trials(client: MlflowClient, run_id: str, study: optuna.Study) -> None:
    from mlflow.entities import Metric

    found = rows(study)
    points = []
    so_far = math.inf
    for row in found:
        if row["state"] == "complete":
            so_far = min(so_far, row["value"])
            points.append(Metric("trial/bits_per_byte", row["value"], row["ended_ms"], row["number"]))
            points.append(Metric("best_bits_per_byte", so_far, row["ended_ms"], row["number"]))
    points += [Metric(f"trials/{state}", count, now(), 0) for state, count in summary(study)["trials"].items()]
    for first in range(0, len(points), METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=points[first : first + METRICS_AT_ONCE])
    if (best := best_of(study)) is not None:
        tags = {"best.trial": str(best["number"]), "best.command": best["command"][:5000]}
        set_tags(client, run_id, tags)
        client.log_dict(run_id, best["recipe"], "best-recipe.json")
        client.log_text(run_id, best["command"] + "\n", "best.txt")
    fixed = ("number", "state", "value", "pruned_at", "seconds", "reason")
    names = sorted({name for row in found for name in row["params"]})
    table = [{key: row[key] for key in fixed} | {name: row["params"].get(name) for name in names} for row in found]
    log_tables(client, run_id, {TRIALS: table_text(table, (*fixed, *names))})
    with EvidenceRun(client, run_id).artifacts() as folder:
        draw_history(found, folder / "history.png")
        if shares := importance(study):
            draw_importance(shares, folder / "importance.png")
