"""The Optuna study of a sweep: its database, its plan, its retried trials, and how it is shown.

Studies are stored in SQLite beside the MLflow store, or in PostgreSQL, which many machines can share; there they get a
schema of their own, because Optuna's table names are also used by others (`alembic_version`).

A process that is killed leaves its trial `RUNNING`. On this machine the next command finds its owner dead; on another,
Optuna finds that its heartbeat stopped. Either way Optuna's own callback queues the trial again with its values, and
whoever runs it resumes from its last checkpoint where that can be reached.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments.common.tables import Table, save
from experiments.sweep.plan import FIXED, PARTS, Plan, as_overrides, distribution_of, value_of
from model.errors import InputError, MissingExtraError, one_line
from model.settings import Settings, without_password
from training.tracking.store import Owner, creation_lock, database_file

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

EXPERIMENT = "story-sweep"
"""In MLflow."""
PLAN, RUN = "plan", "mlflow.run"
"""User attributes of a study: its plan, and the MLflow run that stands for it."""
OWNER, REASON, RECIPE, BASE = "owner", "reason", "recipe", "base"
STEP, TOKENS = "step", "tokens"
"""User attributes of a trial: its process, how it ended, its whole recipe, whether it is the base recipe, and how far
it came."""
MAX_RETRIES = 2
"""Of a trial whose process dies: the trial may be what kills it."""
RANDOM_TRIALS = 8
"""Trials drawn at random before the sampler draws near the good ones."""
SCHEMA = "story_sweep"
HEARTBEAT, GRACE = 10, 120
"""Seconds between two heartbeats of a trial, and after the last one until the trial is given up."""
LOCK_TIMEOUT = 60
"""Seconds to wait for another process's lock on the SQLite file."""


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
    # Heartbeats, their retries and the sampler's `multivariate` count as experimental in Optuna, since 2021.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    full = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)
    if not full.startswith(("sqlite:///", "postgresql+psycopg://")):
        raise InputError("storage", "must begin with sqlite:/// or postgresql://")
    try:
        return _connect(full)
    except Exception as error:  # SQLAlchemy's, Optuna's, the driver's or the network's
        reason = one_line(error).replace(full, without_password(url))
        raise InputError("storage", f"{without_password(url)} cannot be used ({reason})") from None


def _connect(url: str) -> optuna.storages.RDBStorage:
    import optuna
    import sqlalchemy

    file = Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"connect_args": {"timeout": LOCK_TIMEOUT, "isolation_level": None}}
    else:
        engine = sqlalchemy.create_engine(url)
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        engine.dispose()
        # A trial trains for hours, in which a server may end idle connections: none is kept between two queries.
        search_path = {"options": f"-csearch_path={SCHEMA}"}
        options = {"poolclass": sqlalchemy.pool.NullPool, "connect_args": search_path}
    with creation_lock(file.parent) if file else contextlib.nullcontext():
        storage = optuna.storages.RDBStorage(
            url, options, heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=retry
        )
    if file:
        # SQLite has no `SELECT … FOR UPDATE`, by which Optuna keeps two from claiming one waiting trial.
        sqlalchemy.event.listen(
            storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
        )
    return storage


def open_study(storage: str, name: str) -> optuna.Study:
    """Load the study of that name. Raises `InputError` where there is none."""
    import optuna

    try:
        return optuna.load_study(study_name=name, storage=open_storage(storage))
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
    search = plan.space.search
    values = {name: value_of(plan.space.base, name) for name in search}
    distributions = {name: distribution_of(entry) for name, entry in search.items()}
    waiting = optuna.trial.TrialState.WAITING
    with contextlib.suppress(ValueError):  # a distribution does not contain its value
        study.add_trial(
            optuna.create_trial(state=waiting, params=values, distributions=distributions, user_attrs={BASE: True})
        )
    return study


def plan_of(study: optuna.Study) -> Plan:
    """Return what the trials of a study share. Raises `InputError` for a study of another program."""
    try:
        return Plan.model_validate(study.user_attrs[PLAN])
    except (KeyError, ValueError) as error:
        raise InputError(
            "name", f"{study.study_name} is a study that `story sweep` has not created ({one_line(error)})"
        ) from None


def sampler_of(seed: int) -> optuna.samplers.BaseSampler:
    """Return a sampler whose draws depend on seed, number of the trial, name and earlier trials only.

    It has no state, so trials that run in parallel, also in several processes, are drawn differently.
    """
    import numpy as np
    from optuna.samplers import BaseSampler, TPESampler

    def numbered(trial: FrozenTrial, name: str = "") -> TPESampler:
        drawn = int(np.random.SeedSequence([seed, trial.number, *name.encode()]).generate_state(1)[0])
        # `constant_liar` keeps parallel trials from being drawn beside those that are running.
        return TPESampler(n_startup_trials=RANDOM_TRIALS, multivariate=True, constant_liar=True, seed=drawn)

    class Sampler(BaseSampler):
        def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
            return numbered(trial).infer_relative_search_space(study, trial)

        def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> Any:
            return numbered(trial).sample_relative(study, trial, search_space)

        def sample_independent(
            self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
        ) -> Any:
            return numbered(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    return Sampler()


def retry(study: optuna.Study, trial: FrozenTrial, max_retry: int | None = MAX_RETRIES) -> None:
    """Queue a failed trial again with its values, by Optuna's own callback; None: however often it was retried."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    RetryHeartbeatStaleTrialCallback(max_retry, inherit_intermediate_values=True)(study, trial)


def first_attempt(trial: FrozenTrial) -> int:
    """Return the number of a trial's first attempt: of itself, where it is no retry."""
    return int(trial.system_attrs.get("failed_trial", trial.number))


def requeue_stale_trials(study: optuna.Study) -> list[int]:
    """Mark trials whose process has died on this machine as failed, and queue them again; return their numbers."""
    from optuna.trial import TrialState

    stale = []
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        owner = Owner.from_text(trial.user_attrs.get(OWNER, ""))
        if owner is not None and owner.state() == "dead":
            retry(study, study.tell(trial.number, state=TrialState.FAIL))
            stale.append(trial.number)
    return stale


ENOUGH = 5
"""Complete trials needed to estimate the importance of fields."""
STYLES = {"complete": "green", "pruned": "yellow", "failed": "red", "running": "cyan", "waiting": "dim"}


def rows(study: optuna.Study) -> list[dict[str, Any]]:
    """Return all trials in the order of their numbers, as plain JSON values."""
    from optuna.trial import TrialState

    found = []
    for trial in study.get_trials(deepcopy=False):
        state = "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()
        attributes = trial.user_attrs
        reason = attributes.get(REASON)
        if state == "failed" and reason is None:
            reason = "its process ended without a result"
        first = first_attempt(trial)
        ended = trial.datetime_complete
        found.append(
            {
                "number": trial.number,
                "state": state,
                "value": trial.value if state in ("complete", "pruned") else None,
                "pruned_at": f"{trial.last_step or 0}/{PARTS}" if state == "pruned" else None,
                "params": dict(trial.params),
                "base": bool(attributes.get(BASE)),
                "retry_of": None if first == trial.number else first,
                "reason": reason,
                "step": attributes.get(STEP),
                "tokens": attributes.get(TOKENS),
                "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
                "ended_ms": int(ended.timestamp() * 1000) if ended else None,
            }
        )
    return found


def best_of(study: optuna.Study) -> dict[str, Any] | None:
    """Return the best complete trial; None while there is none.

    `command` trains its recipe with any budget; `exact_command` repeats the trial itself.
    """
    complete = [row for row in rows(study) if row["state"] == "complete"]
    if not complete:
        return None
    best = min(complete, key=lambda row: row["value"])
    plan = plan_of(study)
    recipe = study.get_trials(deepcopy=False)[best["number"]].user_attrs[RECIPE]
    searched = as_overrides(best["params"])
    budget = ("minutes", "steps", "eval_every", "patience")
    equal = as_overrides({name: recipe[name] for name in budget if recipe[name] is not None})
    # A real training leaves out the fields that only keep trials short and comparable.
    origin = [word for word in plan.space.origin if word.partition("=")[0] not in FIXED]
    return {
        "number": best["number"],
        "value": best["value"],
        "base_value": next((row["value"] for row in complete if row["base"]), None),
        "params": best["params"],
        "recipe": recipe,
        "command": shlex.join(["story", "train", *origin, *searched]),
        "exact_command": shlex.join(["story", "train", *plan.space.origin, *searched, *equal]),
    }


def importance(study: optuna.Study) -> dict[str, float]:
    """Return each field's share in the differences between trials (fANOVA), largest first; {} of too few trials."""
    import optuna

    complete = [row["value"] for row in rows(study) if row["state"] == "complete"]
    if len(complete) < ENOUGH or len(set(complete)) < 2:
        return {}
    try:
        return dict(optuna.importance.get_param_importances(study, evaluator=_evaluator()))
    except (RuntimeError, ValueError):  # no field differs among these trials
        return {}


def _evaluator() -> optuna.importance.FanovaImportanceEvaluator:
    import optuna

    return optuna.importance.FanovaImportanceEvaluator(seed=0)


def summary(study: optuna.Study) -> dict[str, Any]:
    """Return what `story sweep --json` prints."""
    plan = plan_of(study)
    found = rows(study)
    return {
        "name": study.study_name,
        "budget": str(plan.budget),
        "data": {"folder": plan.data, "digest": plan.digest},
        "place": plan.place,
        "space": plan.space.search,
        "trials": dict(Counter(row["state"] for row in found)),
        "best": best_of(study),
        "importance": importance(study),
        "rows": found,
    }


def print_sweep(study: optuna.Study, console: Console) -> None:
    """Print a table of all trials, and the best recipe."""
    plan = plan_of(study)
    best = best_of(study)
    names = list(plan.space.search)
    short = [name.rpartition(".")[2] for name in names]
    columns = ("", "trial", "state", "bits/byte", "pruned", *(short if len(set(short)) == len(short) else names))
    found = rows(study)
    table = [
        [
            "★" if best and row["number"] == best["number"] else "=" if row["base"] else "",
            f"{row['number']}" + (f" ↻{row['retry_of']}" if row["retry_of"] is not None else ""),
            row["state"],
            "" if row["value"] is None else f"{row['value']:.4f}",
            row["pruned_at"] or "",
            *(_figure(row["params"].get(name)) for name in names),
        ]
        for row in found
    ]
    title = f"{study.study_name}: {plan.budget} each"
    console.print(Table(columns, table, title=title, text=("state",), styles=STYLES, key=2))
    console.print("★ the best, = the base recipe, ↻ a retry after a stop", style="dim", highlight=False)
    for row in found:
        if row["state"] == "failed":
            console.print(f"trial {row['number']} failed: {row['reason']}", markup=False, highlight=False)
    if best is None:
        console.print("No trial is complete yet, so there is no best recipe.")
        return
    if shares := importance(study):
        listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)
        console.print(f"share in the differences: {listed}", highlight=False)
    against = ""
    if best["base_value"] is not None:
        change = best["value"] / best["base_value"] - 1
        against = f", {change:+.2%} against the base recipe" if change else ", which is the base recipe"
    console.print(f"best: trial {best['number']}, {best['value']:.4f} bits/byte{against}", highlight=False)
    console.print(best["command"], markup=False, highlight=False, soft_wrap=True)


def draw(study: optuna.Study, folder: Path) -> None:
    """Write `history.png`, values over trials, and if it is known `importance.png`, each field's share."""
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as plots

    with plt.rc_context({"backend": "agg"}):  # Optuna draws by pyplot, in its own style
        drawn = {"history": plots.plot_optimization_history(study, target_name="validation bits per byte")}
        if importance(study):
            drawn["importance"] = plots.plot_param_importances(study, evaluator=_evaluator())
        for name, axes in drawn.items():
            figure = axes.get_figure(root=True)
            assert figure is not None
            save(figure, folder / f"{name}.png")
            plt.close(figure)


def _figure(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else "" if value is None else str(value)
