"""`story sweep`: begin or continue a study by name, run its trials, and log it to MLflow.

A sweep is one MLflow run with its space, plan, trials, best recipe and pictures; each trial's run is a child of it. A
sweep that is continued resumes that run, as long as the store knows it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from pydantic import Field, field_validator

from experiments.common.evidence_runs import EvidenceRun
from experiments.sweep.plan import DEFAULT_SPACE, Budget, Plan, load_space
from experiments.sweep.remote import TrialLog, modal_runner, process_runner
from experiments.sweep.study import (
    EXPERIMENT,
    RUN,
    begin_study,
    best_of,
    draw,
    open_study,
    plan_of,
    requeue_stale_trials,
    rows,
    study_names,
    summary,
)
from experiments.sweep.trial import Objective, Runner, Say, TrialObserver, run_trial
from model.errors import InputError
from model.validation import Options
from training.tracking.observer import MlflowObserver
from training.tracking.provenance import Provenance, provenance, usable_cores
from training.tracking.runs import known_run, log_tables, now, set_tags, store_errors, table_text, without_folders
from training.tracking.store import LAST_SEEN, OWNER, mark_stale_runs, open_experiment, open_store, owner_of
from training.trainer.observers import Observer, ProgressObserver, stop_on_signals

if TYPE_CHECKING:
    import optuna
    from mlflow import MlflowClient

Place = Literal["here", "modal"]
FAILED, UNDECIDED, STOPPED = 1, 3, 130
"""Exit codes: a trial failed, no trial is complete, it was stopped by hand."""
STATUS = {0: "FINISHED", UNDECIDED: "FINISHED", STOPPED: "KILLED"}
OUTCOME = {"FINISHED": "finished", "KILLED": "stopped"}
DATA: dict[Place, str] = {"here": "data/tinystories", "modal": "tinystories"}
TRIALS = "trials.json"
"""Artifact: all trials, as MLflow shows tables."""
say_on_stderr: Say = partial(typer.echo, err=True)
"""Standard output belongs to `--json`."""
METRICS_AT_ONCE = 900
"""MLflow takes at most 1,000 in one request."""


class SweepOptions(Options):
    """A call of `story sweep`. None: what the sweep was begun with, else the default."""

    name: str
    storage: str
    trials: int = Field(default=20, ge=1)
    """Of the sweep in all; those of earlier calls count."""
    minutes: float | None = None
    steps: int | None = None
    space: Path | None = None
    data: str | None = None
    out: Path | None = None
    seed: int | None = None
    workers: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    place: Place | None = None
    tracking_uri: str | None = None
    """None: nothing is logged to MLflow."""

    @field_validator("name")
    @classmethod
    def _is_plain(cls, name: str) -> str:
        if not 1 <= len(name) <= 80 or set(name) & set('/\\\0\n"') or name.startswith("."):
            raise InputError("name", f"must be a plain name of at most 80 characters, got {name!r}")
        return name


def run_sweep(options: SweepOptions, say: Say = say_on_stderr) -> tuple[optuna.Study, int]:
    """Begin or continue a sweep until it has the trials asked for; return its study and an exit code.

    Raises:
        InputError: an option is not usable, or would make trials that cannot be compared with the earlier ones.
        SpaceError, DataError: the space or the shards are not usable.
    """
    uri = options.tracking_uri
    with stop_on_signals() as stop:
        study = _open_or_begin(options)
        for number in requeue_stale_trials(study):
            say(f"trial {number}: its process died; it is queued again")
        parent = None if uri is None else begin_run(uri, study)
        code = FAILED
        try:
            with _runner(options, plan_of(study), trial_log(uri, parent, options.name)) as train:
                code = run_trials(study, options, train, say, stop.is_set)
        finally:
            if parent is not None and uri is not None:
                end_run(uri, parent, study, STATUS.get(code, "FAILED"))
    return study, code


def run_trials(
    study: optuna.Study, options: SweepOptions, train: Runner, say: Say, stopping: Callable[[], bool]
) -> int:
    """Run trials of a study until it has those asked for; return an exit code."""
    out = options.out or Path("runs") / "sweeps" / options.name
    one_here = options.workers == 1 and plan_of(study).place == "here"  # it has a progress bar
    objective = Objective(study, out, train, say=say, stopping=stopping, lines=not one_here)
    objective.minimise(options.trials, options.workers)
    if objective.interrupted or stopping():
        return STOPPED
    return FAILED if objective.failures else UNDECIDED if best_of(study) is None else 0


def trial_log(uri: str | None, parent: str | None, sweep: str) -> TrialLog:
    """Return what logs a trial as a child of the sweep's MLflow run `parent`; None: nothing is logged."""

    def log(number: int, origin: Provenance | None) -> list[Observer]:
        if parent is None:
            return []
        tags = {"mlflow.parentRunId": parent, "sweep": sweep, "sweep.trial": str(number)}
        given: dict[str, Any] = {"experiment": EXPERIMENT, "tags": tags, "origin": origin}
        return [MlflowObserver(uri, system_seconds=None, keep_model=False, **given)]

    return log


@contextlib.contextmanager
def _runner(options: SweepOptions, plan: Plan, log: TrialLog) -> Iterator[Runner]:
    data = options.data or plan.data
    threads = options.threads or max(1, usable_cores() // options.workers)
    if plan.place == "modal":
        with modal_runner(options.name, data, log) as train:
            yield train
    elif options.workers > 1:
        yield process_runner(Path(data), threads, log)
    else:
        import torch

        def train_here(trial: TrialObserver) -> None:
            observers: list[Observer] = [trial, ProgressObserver(), *log(trial.trial.number, None)]
            run_trial(trial.recipe, data=Path(data), out=trial.folder, observers=observers)

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield train_here
        finally:
            torch.set_num_threads(before)


def _open_or_begin(options: SweepOptions) -> optuna.Study:
    """Return the study of that name, new or existing. Raises `InputError` where an option would change its plan."""
    begun = options.name in study_names(options.storage)
    study = open_study(options.storage, options.name) if begun else None
    plan = plan_of(study) if study else None
    place = options.place or (plan.place if plan else "here")
    asked: dict[str, Any] = {"place": place}
    if plan is None or options.minutes is not None or options.steps is not None:
        asked["budget"] = Budget(minutes=options.minutes, steps=options.steps)
    if plan is None or options.space is not None:
        asked["space"] = load_space(options.space or DEFAULT_SPACE)
    if plan is None or options.seed is not None:
        asked["seed"] = options.seed or 0
    data = options.data or (plan.data if plan else DATA[place])
    if place == "here":
        asked["digest"] = _digest(Path(data), (plan.space if plan else asked["space"]).base.model.vocab_size)
    if plan is None or place == "modal":
        asked["data"] = data
    if study is None or plan is None:
        return begin_study(options.storage, options.name, Plan.model_validate({"digest": None, **asked}))
    for name, wanted in asked.items():
        if (has := getattr(plan, name)) != wanted:
            shown = "" if name == "space" else f" ({str(has)[:24]}, got {str(wanted)[:24]})"
            raise InputError(
                {"place": "on", "digest": "data"}.get(name, name),
                f"must stay what sweep {options.name} was begun with{shown}; another name begins another",
            )
    return study


def _digest(data: Path, vocab_size: int) -> str:
    from training.data.shards import read_meta

    meta = read_meta(data)
    if meta.get("vocab_size") != vocab_size:
        raise InputError(
            "data",
            f"{data} has {meta.get('vocab_size')} tokens where the space's recipe has model.vocab_size {vocab_size}",
        )
    return str(meta.get("digest"))


def begin_run(uri: str, study: optuna.Study) -> str:
    """Begin or resume the sweep's MLflow run; return its id.

    Raises:
        InputError: the store cannot be used.
    """
    plan = plan_of(study)
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
            | {f"search.{name}": json.dumps(entry) for name, entry in plan.space.search.items()}
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
            with contextlib.suppress(Exception):
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
        if best is not None:
            draw(study, folder)
