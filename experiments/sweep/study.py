"""The Optuna study of a sweep: its database, its plan, and the trials, claimed one at a time and retried.

Studies are stored in SQLite beside the MLflow store, or in PostgreSQL, which many machines can share; there they get a
schema of their own, because Optuna's table names are also used by others (`alembic_version`).

A worker that is killed leaves its trial `RUNNING`. On this machine the owner is found dead at once; on another, its
heartbeat stops. Either way the trial is marked as failed and queued again with its values, and the worker that claims
it resumes from its last checkpoint where that can be reached.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.sweep.plan import PARTS, Dimension, Plan, Prune, Value
from model.errors import InputError, MissingExtraError, one_line
from model.settings import Settings, without_password
from training.tracking.store import Owner, database_file, owner_of

if TYPE_CHECKING:
    import optuna

EXPERIMENT = "story-sweep"
"""In MLflow."""
PLAN, RUN = "plan", "mlflow.run"
"""User attributes of a study: its plan, and the MLflow run that stands for it."""
OWNER, FIRST, TRIES, REASON, RECIPE = "owner", "first", "tries", "reason", "recipe"
STEP, TOKENS, BASE = "step", "tokens", "base"
"""User attributes of a trial: its process, the number of its first attempt, the number of attempts, how it ended, its
whole recipe, how far it came, and whether it is the base recipe."""
MAX_TRIES = 3
"""Attempts at a trial whose worker dies: the trial may be what kills it."""
RANDOM_TRIALS = 8
"""Trials drawn at random before the sampler draws near the good ones."""
SCHEMA = "story_sweep"
HEARTBEAT, GRACE = 10, 120
"""Seconds between two heartbeats of a trial, and after the last one until the trial is given up."""
LOCK_TIMEOUT = 60
"""Seconds to wait for another worker's lock on the SQLite file."""
ATTEMPTS = 5
CREATED_MEANWHILE = ("already exists", "UNIQUE constraint failed", "duplicate key")
"""What a database reports where another process creates the same tables at this moment."""


def storage_url(given: str | None, settings: Settings) -> str:
    """Return `given`, else a PostgreSQL `DATABASE_URL`, else `sweeps.db` beside the MLflow database."""
    if given:
        return given
    if settings.database_url is not None:
        url = settings.database_url.get_secret_value()
        if url.startswith("postgres"):
            return url
    store = database_file(settings.mlflow_tracking_uri)
    folder = Path() if store is None else Path(os.path.relpath(store.parent))
    return f"sqlite:///{folder / 'sweeps.db'}"


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Connect, and create the tables where there are none. Trials whose heartbeat stopped are retried.

    Raises:
        InputError: the database cannot be used. MissingExtraError: Optuna is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise MissingExtraError("story sweep", "train") from error
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # this package reports trials itself
    full = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)
    if not full.startswith(("sqlite:///", "postgresql+psycopg://")):
        raise InputError("storage", "must begin with sqlite:/// or postgresql://")
    for left in reversed(range(ATTEMPTS)):
        try:
            return _connect(full)
        except Exception as error:  # SQLAlchemy's, Optuna's, the driver's or the network's
            if left and any(words in str(error) for words in CREATED_MEANWHILE):
                time.sleep(0.5)
                continue
            reason = one_line(error).replace(full, without_password(url))
            raise InputError("storage", f"{without_password(url)} cannot be used ({reason})") from None
    raise AssertionError("the last attempt returns or raises")


def _connect(url: str) -> optuna.storages.RDBStorage:
    import optuna
    import sqlalchemy

    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"connect_args": {"timeout": LOCK_TIMEOUT}}
    else:
        engine = sqlalchemy.create_engine(url)
        try:
            with engine.begin() as connection:
                connection.execute(sqlalchemy.text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        finally:
            engine.dispose()
        # A trial trains for hours, in which a server may end idle connections: none is kept between two queries.
        search_path = {"options": f"-csearch_path={SCHEMA}"}
        options = {"poolclass": sqlalchemy.pool.NullPool, "connect_args": search_path}
    with warnings.catch_warnings():
        # Heartbeats count as experimental in Optuna, since 2021.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.storages.RDBStorage(
            url, options, heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=retry
        )


def open_study(storage: str, name: str) -> optuna.Study:
    """Load the study of that name. Raises `InputError` where there is none."""
    import optuna

    try:
        return optuna.load_study(study_name=name, storage=open_storage(storage), sampler=None)
    except KeyError:
        known = ", ".join(sorted(study_names(storage))) or "none yet"
        raise InputError("name", f"{name} is no sweep of this storage; there are: {known}") from None


def study_names(storage: str) -> list[str]:
    """Return the sweeps of a storage."""
    import optuna

    return list(optuna.get_all_study_names(open_storage(storage)))


def begin_study(storage: str, name: str, plan: Plan) -> optuna.Study:
    """Create a study with this plan; its first trial is the base recipe, if the space contains it."""
    import optuna

    study = optuna.create_study(study_name=name, storage=open_storage(storage), direction="minimize")
    study.set_user_attr(PLAN, plan.model_dump(mode="json"))
    if (values := plan.space.base_values()) is not None:
        study.enqueue_trial(values, user_attrs={BASE: True})
    return study


def plan_of(study: optuna.Study) -> Plan:
    """Return what the trials of a study share. Raises `InputError` for a study of another program."""
    try:
        return Plan.model_validate(study.user_attrs[PLAN])
    except (KeyError, ValueError) as error:
        raise InputError(
            "name", f"{study.study_name} is a study that `story sweep` has not created ({one_line(error)})"
        ) from None


def refuse_another_plan(study: optuna.Study, wanted: Plan) -> None:
    """Raise `InputError` where `wanted` differs from the study's plan in what makes trials comparable."""
    ours = plan_of(study)
    pairs: dict[str, tuple[Any, Any]] = {
        "space": (ours.space, wanted.space),
        "budget": (ours.budget, wanted.budget),
        "data": (ours.digest or ours.data, wanted.digest or wanted.data),
        "on": (ours.place, wanted.place),
        "seed": (ours.seed, wanted.seed),
    }
    for name, (has, wants) in pairs.items():
        if has != wants:
            shown = "" if name == "space" else f" ({_shortened(has)}, got {_shortened(wants)})"
            raise InputError(
                name, f"must stay what sweep {study.study_name} was begun with{shown}; another name begins another"
            )


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def suggest(trial: optuna.Trial, name: str, dimension: Dimension) -> Value:
    """Draw a value, or take the one that the trial was given."""
    if dimension.choices is not None:
        chosen = trial.suggest_categorical(name, dimension.choices)
        assert chosen is not None  # no choice is
        return chosen
    low, high = dimension.low or 0, dimension.high or 0
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, step=int(dimension.step or 1), log=dimension.log)
    return trial.suggest_float(name, low, high, step=dimension.step, log=dimension.log)


def pruner_of(prune: Prune) -> optuna.pruners.BasePruner:
    """Return the pruner of a plan; its steps are eighths of the budget."""
    from optuna import pruners

    match prune.by:
        case "median":
            return pruners.MedianPruner(prune.after_trials, prune.after_eighths)
        case "hyperband":
            return pruners.HyperbandPruner(prune.after_eighths, PARTS, reduction_factor=2)
        case _:
            return pruners.NopPruner()


def sampler_of(seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of trial `number`, which depends on seed, number and earlier trials only."""
    import numpy as np
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import TPESampler

    drawn = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # `constant_liar` keeps workers from drawing beside trials that are running.
        return TPESampler(n_startup_trials=RANDOM_TRIALS, multivariate=True, constant_liar=True, seed=drawn)


def count_trials(study: optuna.Study) -> int:
    """Count the trials that use up the number asked for: complete, pruned and running ones."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    return len(study.get_trials(deepcopy=False, states=states))


@contextlib.contextmanager
def claim_lock(folder: Path) -> Iterator[None]:
    """Keep other workers on this machine from claiming a trial; the lock dies with its holder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "claim.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def requeue_stale_trials(study: optuna.Study) -> list[int]:
    """Mark trials whose worker has died on this machine as failed, and queue them again; return their numbers."""
    from optuna.trial import TrialState

    stale = []
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        owner = Owner.from_text(trial.user_attrs.get(OWNER, ""))
        if owner is not None and owner.state() == "dead":
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            retry(study, trial)
            stale.append(trial.number)
    return stale


def claim(trial: optuna.Trial) -> int:
    """Make a trial this process's; return the number of its first attempt."""
    trial.set_user_attr(OWNER, owner_of().to_text())
    return int(trial.user_attrs.get(FIRST, trial.number))


def retry(study: optuna.Study, trial: optuna.trial.FrozenTrial, *, counts: bool = True) -> None:
    """Queue a failed trial again, with its values; `counts`: as one of its `MAX_TRIES` attempts."""
    import optuna

    tries = int(trial.user_attrs.get(TRIES, 1)) + counts
    if tries > MAX_TRIES:
        return
    attributes = {name: value for name, value in trial.user_attrs.items() if name not in (OWNER, REASON)}
    attributes |= {FIRST: int(trial.user_attrs.get(FIRST, trial.number)), TRIES: tries}
    study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=attributes,
            system_attrs=trial.system_attrs,
            intermediate_values=trial.intermediate_values,
        )
    )
