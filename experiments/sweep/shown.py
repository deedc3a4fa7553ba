"""A sweep as its reader sees it: a row for each trial, and the best recipe as `story train` takes it."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from experiments.sweep.plan import PARTS
from experiments.sweep.space import FIXED, as_overrides
from experiments.sweep.study import FIRST, REASON, RECIPE, STEP, TOKENS, plan_of

if TYPE_CHECKING:
    import optuna

ENOUGH = 5
"""Complete trials from which the shares of the fields in the differences are worth a look."""
COLORS = {"complete": "green", "pruned": "yellow", "failed": "red", "running": "cyan"}


def rows(study: optuna.Study) -> list[dict[str, Any]]:
    """All trials in the order of their numbers, as plain JSON values."""
    from optuna.trial import TrialState

    states = {TrialState.FAIL: "failed"}
    found = []
    for trial in study.get_trials(deepcopy=False):
        state = states.get(trial.state, trial.state.name.lower())
        attributes = trial.user_attrs
        reason = attributes.get(REASON)
        if state == "failed" and reason is None:
            reason = "its worker ended without a word"
        first = int(attributes.get(FIRST, trial.number))
        found.append(
            {
                "number": trial.number,
                "state": state,
                "value": trial.value if state in ("complete", "pruned") else None,
                "pruned_at": f"{trial.last_step or 0}/{PARTS}" if state == "pruned" else None,
                "params": dict(trial.params),
                "base": bool(attributes.get("base")),
                "again": None if first == trial.number else first,
                "reason": reason,
                "step": attributes.get(STEP),
                "tokens": attributes.get(TOKENS),
                "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
                "ended_ms": int(trial.datetime_complete.timestamp() * 1000)
                if trial.datetime_complete
                else None,
            }
        )
    return found


def best_of(study: optuna.Study) -> dict[str, Any] | None:
    """The best complete trial; None while there is none.

    `command` trains its recipe with any budget; `again` trains the trial itself once more.
    """
    complete = [row for row in rows(study) if row["state"] == "complete"]
    if not complete:
        return None
    best = min(complete, key=lambda row: row["value"])
    base = next((row["value"] for row in complete if row["base"]), None)
    plan = plan_of(study)
    recipe = study.get_trials(deepcopy=False)[best["number"]].user_attrs[RECIPE]
    searched = as_overrides(best["params"])
    budget = ("minutes", "steps", "eval_every", "patience")
    equal = as_overrides({name: recipe[name] for name in budget if recipe[name] is not None})
    # What is equal only to make trials short and alike is left out of a training that is meant.
    origin = [word for word in plan.space.origin if word.partition("=")[0] not in FIXED]
    return {
        "number": best["number"],
        "value": best["value"],
        "base_value": base,
        "params": best["params"],
        "recipe": recipe,
        "command": shlex.join(["story", "train", *origin, *searched]),
        "again": shlex.join(["story", "train", *plan.space.origin, *searched, *equal]),
    }


def importance(study: optuna.Study) -> dict[str, float]:
    """Share of each field in the differences between trials (fANOVA), largest first; {} where there are too few."""
    import optuna

    complete = [row["value"] for row in rows(study) if row["state"] == "complete"]
    if len(complete) < ENOUGH or len(set(complete)) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    except (RuntimeError, ValueError):  # where no field differs among these trials
        return {}


def summary(study: optuna.Study) -> dict[str, Any]:
    """What `story sweep --json` prints."""
    plan = plan_of(study)
    found = rows(study)
    return {
        "name": study.study_name,
        "budget": str(plan.budget),
        "data": {"folder": plan.data, "digest": plan.digest},
        "place": plan.place,
        "space": plan.space.as_dict()["search"],
        "trials": dict(Counter(row["state"] for row in found)),
        "best": best_of(study),
        "importance": importance(study),
        "rows": found,
    }


def print_sweep(study: optuna.Study, console: Console) -> None:
    """A table of all trials, and below it the best recipe."""
    plan = plan_of(study)
    best = best_of(study)
    names = list(plan.space.dimensions)
    short = _short_names(names)
    table = Table(box=SIMPLE, title=f"{study.study_name}: {plan.budget} each", padding=(0, 1, 0, 0))
    for column in ("", "trial", "state", "bits/byte", "pruned", *short):
        table.add_column(column, no_wrap=column not in short, overflow="fold")
    for row in rows(study):
        color = COLORS.get(row["state"], "dim")
        mark = "★" if best and row["number"] == best["number"] else "=" if row["base"] else ""
        again = f" ↻{row['again']}" if row["again"] is not None else ""
        params = (_figure(row["params"].get(name)) for name in names)
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        table.add_row(
            mark,
            f"{row['number']}{again}",
            f"[{color}]{row['state']}[/]",
            value,
            row["pruned_at"] or "",
            *params,
        )
    console.print(table)
    console.print(
        "★ the best, = the recipe as it stands, ↻ the same again after a stop", style="dim", highlight=False
    )
    for row in rows(study):
        if row["state"] == "failed":
            console.print(f"trial {row['number']} failed: {row['reason']}", markup=False, highlight=False)
    if best is None:
        console.print("No trial is complete yet, so there is no best recipe.")
        return
    if shares := importance(study):
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)
        console.print(f"share in the differences: {told}", highlight=False)
    against = ""
    if best["base_value"] is not None:
        change = best["value"] / best["base_value"] - 1
        against = (
            f", {change:+.2%} against the recipe as it stands"
            if change
            else ", which is the recipe as it stands"
        )
    console.print(f"best: trial {best['number']}, {best['value']:.4f} bits/byte{against}", highlight=False)
    console.print(best["command"], markup=False, highlight=False, soft_wrap=True)


def _short_names(names: list[str]) -> list[str]:
    """Without their table, where that leaves them apart."""
    last = [name.rpartition(".")[2] for name in names]
    return last if len(set(last)) == len(last) else names


def _figure(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else "" if value is None else str(value)
