"""Render a sweep: one row a trial, the best recipe as `story train` takes it, and pictures."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments.common.tables import Table, save
from experiments.sweep.plan import FIXED, PARTS, as_overrides
from experiments.sweep.study import BASE, REASON, RECIPE, STEP, TOKENS, first_attempt, plan_of

if TYPE_CHECKING:
    import optuna

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
