"""Search spaces of the smallest recipe, and sweeps whose trainings take no time where the training is not the point."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.sweep.plan import Budget, Plan, Prune, Space
from experiments.sweep.study import begin_study, open_study
from experiments.sweep.trial import Objective, Runner, TrialObserver
from tests.training.runs import smallest
from training.trainer.observers import EndRun, EvaluationReport, Outcome, RunEnd

if TYPE_CHECKING:
    import optuna

STEPS = 8
SPACE = """
preset: tiny
set:
  model.pattern: RA
  model.mlp_width: 48
  model.window: 16
  row_tokens: 64
  micro_rows: 2
  eval_stories: 3
  samples: []
search:
  optimizer.matrix_lr: {choices: [0.02, 0.0]}
  optimizer.table_lr: {choices: [0.008, 0.0]}
prune: {after_trials: 1, after_eighths: 2}
"""
"""A rate of 0 cannot learn, so who draws two of them has to be ended early."""


def small_space(folder: Path) -> Path:
    """`SPACE` as a file."""
    path = folder / "space.yaml"
    path.write_text(SPACE, "utf-8")
    return path


def fake_plan(prune: Prune | None = None, *, place: Literal["here", "modal"] = "here") -> Plan:
    """A plan over one field. Who pretends to train it takes the field's distance from 0.1 for the bits per byte."""
    space = Space(
        base=smallest(dropout=0.5),
        origin=("--preset", "tiny"),
        search={"dropout": {"low": 0.0, "high": 0.9}},
        prune=prune or Prune(by="none"),
    )
    return Plan(space=space, budget=Budget(steps=STEPS), data="shards", digest="0" * 64, place=place)


def evaluation(step: int, bits: float) -> EvaluationReport:
    """What a training reports after an evaluation at `step` of `STEPS`."""
    return EvaluationReport(
        step=step, tokens=step * 100, loss=bits, bits_per_byte=bits, best=True, samples=(), elapsed=1.0
    )


def ended(outcome: Outcome, reason: str, bits: float | None, step: int = STEPS) -> RunEnd:
    """What a training reports at its end."""
    counts = {"step": step, "tokens": step * 100}
    return RunEnd(outcome=outcome, reason=reason, best_bits_per_byte=bits, checkpoint=None, **counts)


def pretend(trial: TrialObserver) -> None:
    """A training that is over at once; nothing of Optuna, of the retries or of the rules for trials is pretended."""
    bits = 1 + abs(trial.recipe.dropout - 0.1)
    for part in range(1, 9):
        try:
            trial.evaluated(evaluation(part, bits + (8 - part)))
        except EndRun as end:
            trial.ended(ended("stopped", str(end), bits + (8 - part), part))
            return
    trial.folder.mkdir(parents=True, exist_ok=True)
    trial.ended(ended("finished", "the budget is used", bits))


def fake_work(
    folder: Path, runner: Runner = pretend, *, trials: int, name: str = "p", plan: Plan | None = None
) -> tuple[optuna.Study, Objective, list[str]]:
    """Run trials of the sweep `name` in `folder`, begun where it is new; with what was said."""
    from experiments.sweep.study import study_names

    storage = f"sqlite:///{folder}/sweeps.db"
    if name in study_names(storage):
        study = open_study(storage, name)
    else:
        study = begin_study(storage, name, plan or fake_plan())
    lines: list[str] = []
    objective = Objective(study, folder / "out", runner, say=lines.append)
    objective.minimise(trials)
    return study, objective, lines
