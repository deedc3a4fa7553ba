"""`story sweep`: a study by name, begun or continued, its workers, and the MLflow run above them."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.sweep.plan import Budget, Plan
from experiments.sweep.space import DEFAULT_SPACE, load_space
from experiments.sweep.study import (
    begin_study,
    bury_dead,
    open_study,
    plan_of,
    refuse_another_plan,
    study_names,
)
from experiments.sweep.worker import FAILED, STOPPED, Order, say, stop_signals, work
from experiments.sweep.workers import run_workers
from model.errors import InputError

if TYPE_CHECKING:
    import optuna

Place = Literal["here", "modal"]
UNDECIDED = 3
"""Exit code: no trial came to its end, so nothing is known."""
STATUS = {0: "FINISHED", UNDECIDED: "FINISHED", STOPPED: "KILLED"}
DATA: dict[Place, str] = {"here": "data/tinystories", "modal": "tinystories"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
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
        for name, value in (("trials", self.trials), ("workers", self.workers), ("threads", self.threads)):
            if value is not None and value < 1:
                raise InputError(name, f"must be at least 1, got {value}")
        if (
            not self.name
            or len(self.name) > 80
            or set(self.name) & set('/\\\0\n"')
            or self.name.startswith(".")
        ):
            raise InputError("name", f"must be a plain name of at most 80 characters, got {self.name!r}")


def run_sweep(asked: Asked, tell: Callable[[str], None] = say) -> tuple[optuna.Study, int]:
    """Begin or continue a sweep until it has the trials asked for; returns its study and an exit code.

    Raises:
        InputError: an option is not usable, or would make trials that cannot be compared with the earlier ones.
        SpaceError, DataError: the space or the shards are not usable.
    """
    from experiments.sweep.parent import begin_parent, end_parent

    with stop_signals() as stop:
        study = _study(asked)
        plan = plan_of(study)
        out = asked.out or Path("runs") / "sweeps" / asked.name
        for number in bury_dead(study):
            tell(f"trial {number}: its worker died; it is in line again")
        parent = None if asked.tracking_uri is None else begin_parent(asked.tracking_uri, study, plan)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        order = Order(
            storage=asked.storage, name=asked.name, out=str(out), data=asked.data or plan.data, trials=asked.trials,
            threads=asked.threads or max(1, cores // asked.workers), tracking_uri=asked.tracking_uri,
            parent_run=parent,
        )  # fmt: skip
        code = FAILED
        try:
            code = _work(order, plan, asked.workers, tell, stop)
            if code == 0 and not _any_complete(study):
                code = UNDECIDED
        finally:
            if parent is not None and asked.tracking_uri is not None:
                end_parent(asked.tracking_uri, parent, study, STATUS.get(code, "FAILED"))
    return study, code


def _work(order: Order, plan: Plan, workers: int, tell: Callable[[str], None], stop: threading.Event) -> int:
    if plan.place == "modal":
        from experiments.sweep.on_modal import run_on_modal

        return run_on_modal(order, plan, workers, tell, stop.is_set)
    if workers == 1:
        return work(order, tell, stop.is_set, bar=True)
    return run_workers(order, workers, tell, stop.is_set)


def _study(asked: Asked) -> optuna.Study:
    """The study by that name with the plan asked for, new or as it was."""
    if asked.name in study_names(asked.storage):
        study = open_study(asked.storage, asked.name)
        refuse_another_plan(study, _continued(asked, plan_of(study)))
        return study
    return begin_study(asked.storage, asked.name, _new(asked))


def _new(asked: Asked) -> Plan:
    place = asked.place or "here"
    budget = Budget(asked.minutes, asked.steps)
    space = load_space(asked.space or DEFAULT_SPACE)
    data = asked.data or DATA[place]
    digest = None if place == "modal" else _digest(Path(data), space.base.model.vocab_size)
    return Plan(space, budget, data, digest, place, asked.seed or 0)


def _continued(asked: Asked, plan: Plan) -> Plan:
    """The plan with what was given anew: where that differs, the call is refused."""
    changes: dict[str, object] = {}
    if asked.minutes is not None or asked.steps is not None:
        changes["budget"] = Budget(asked.minutes, asked.steps)
    if asked.space is not None:
        changes["space"] = load_space(asked.space)
    if asked.seed is not None:
        changes["seed"] = asked.seed
    if asked.place is not None:
        changes["place"] = asked.place
    if plan.place == "here":
        folder = Path(asked.data or plan.data)
        changes["digest"] = _digest(folder, plan.space.base.model.vocab_size)
    elif asked.data is not None and asked.data != plan.data:
        changes |= {"data": asked.data, "digest": None}
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


def _digest(data: Path, vocab_size: int) -> str:
    from training.data.shards import read_meta

    meta = read_meta(data)
    if meta.get("vocab_size") != vocab_size:
        theirs = meta.get("vocab_size")
        raise InputError(
            "data", f"{data} has {theirs} pieces where the space's recipe has model.vocab_size {vocab_size}"
        )
    return str(meta.get("digest"))


def _any_complete(study: optuna.Study) -> bool:
    from optuna.trial import TrialState

    return bool(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
