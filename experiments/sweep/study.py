"""A sweep's study in Optuna: begun or taken up by name, its trials claimed one at a time, none lost with its worker.

A worker that is killed leaves its trial `RUNNING`. On this machine the trial's owner is looked up and found dead at
once; on another, its heartbeat stops. Either way the trial is marked as failed and put in line again, with the values
that it had, and whoever takes it goes on from its last checkpoint where that can be reached.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.sweep.plan import PARTS, Plan
from experiments.sweep.space import Dimension, Prune, Value
from experiments.sweep.storage import open_storage
from model.errors import InputError
from training.tracking.store import Owner, owner_of

if TYPE_CHECKING:
    import optuna

PLAN, RUN = "plan", "mlflow.run"
"""User attributes of a study: its plan, and the MLflow run that stands for it."""
OWNER, FIRST, TRIES, REASON, RECIPE, STEP, TOKENS = (
    "owner", "first", "tries", "reason", "recipe", "step", "tokens",
)  # fmt: skip
"""User attributes of a trial: whose it is, the number of its first try, how many there were, how it ended, the whole
recipe, and how far it came."""
MOST_TRIES = 3
"""A trial whose worker dies so often is not tried again: it may be what kills them."""
RANDOM_TRIALS = 8
"""Trials drawn evenly before the sampler draws near the good ones."""


def open_study(storage: str, name: str) -> optuna.Study:
    """The study of that name. Raises `InputError` where there is none."""
    import optuna

    try:
        return optuna.load_study(study_name=name, storage=open_storage(storage, retry), sampler=None)
    except KeyError:
        known = ", ".join(sorted(study_names(storage))) or "none yet"
        raise InputError("name", f"{name} is no sweep of this storage; there are: {known}") from None


def study_names(storage: str) -> list[str]:
    """The sweeps that a storage holds."""
    import optuna

    return list(optuna.get_all_study_names(open_storage(storage)))


def begin_study(storage: str, name: str, plan: Plan) -> optuna.Study:
    """A new study with this plan; the recipe as it stands is its first trial, if the space holds it."""
    import optuna

    study = optuna.create_study(study_name=name, storage=open_storage(storage, retry), direction="minimize")
    study.set_user_attr(PLAN, plan.as_dict())
    if (values := plan.space.base_values()) is not None:
        study.enqueue_trial(values, user_attrs={"base": True})
    return study


def plan_of(study: optuna.Study) -> Plan:
    """What the trials of a study share. Raises `InputError` for a study that `story sweep` has not made."""
    try:
        return Plan.from_dict(study.user_attrs[PLAN])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "name", f"{study.study_name} is a study that `story sweep` has not made ({error})"
        ) from None


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
    """Who ends trials early; their steps are eighths of the budget."""
    from optuna import pruners

    match prune.by:
        case "median":
            return pruners.MedianPruner(prune.after_trials, prune.after_eighths)
        case "hyperband":
            return pruners.HyperbandPruner(prune.after_eighths, PARTS, reduction_factor=2)
        case _:
            return pruners.NopPruner()


def sampler_of(seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Draws trial `number`: from the seed, the number and the trials so far, whoever runs it and after any pause."""
    import numpy as np
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import TPESampler

    drawn = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # `constant_liar` keeps workers from drawing beside trials that are running.
        return TPESampler(n_startup_trials=RANDOM_TRIALS, multivariate=True, constant_liar=True, seed=drawn)


def counted(study: optuna.Study) -> int:
    """Trials that use up the number asked for: those that ended by themselves or were pruned, and the running."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    return len(study.get_trials(deepcopy=False, states=states))


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While inside, no other worker on this machine claims a trial. The lock dies with whoever holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "claim.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def bury_dead(study: optuna.Study) -> list[int]:
    """Give up trials whose owner has died on this machine, and put them in line again; returns their numbers."""
    from optuna.trial import TrialState

    buried = []
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        owner = Owner.from_text(trial.user_attrs.get(OWNER, ""))
        if owner is not None and owner.state() == "dead":
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            retry(study, trial)
            buried.append(trial.number)
    return buried


def claim(trial: optuna.Trial) -> int:
    """Make a trial this process's; returns the number of its first try."""
    trial.set_user_attr(OWNER, owner_of().to_text())
    return int(trial.user_attrs.get(FIRST, trial.number))


def retry(study: optuna.Study, trial: optuna.trial.FrozenTrial, *, blame: bool = True) -> None:
    """Put a failed trial in line again, with its values; `blame`: it counts as one of its tries."""
    import optuna

    tries = int(trial.user_attrs.get(TRIES, 1)) + blame
    if tries > MOST_TRIES:
        return
    gone = (OWNER, REASON)
    attributes = {name: value for name, value in trial.user_attrs.items() if name not in gone}
    attributes |= {FIRST: int(trial.user_attrs.get(FIRST, trial.number)), TRIES: tries}
    study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.WAITING, params=trial.params, distributions=trial.distributions,
            user_attrs=attributes, system_attrs=trial.system_attrs,
            intermediate_values=trial.intermediate_values,
        )
    )  # fmt: skip


def refuse_another_plan(study: optuna.Study, asked: Plan) -> None:
    """Raise `InputError` where `asked` differs from the study's plan in what makes trials comparable."""
    ours = plan_of(study)
    both = {
        "space": (ours.space.as_dict(), asked.space.as_dict()),
        "budget": (str(ours.budget), str(asked.budget)),
        "data": (ours.digest or ours.data, asked.digest or asked.data),
        "on": (ours.place, asked.place),
        "seed": (ours.seed, asked.seed),
    }
    for what, (has, wants) in both.items():
        if has != wants:
            shown = "" if isinstance(has, dict) else f" ({_short(has)}, got {_short(wants)})"
            raise InputError(
                what,
                f"must stay what sweep {study.study_name} was begun with{shown}; another name begins another",
            )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
