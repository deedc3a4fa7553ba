"""Search spaces of the smallest recipe, and sweeps whose trainings take no time where the training is not the point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.sweep.objective import Job, Work
from experiments.sweep.plan import Budget, Plan
from experiments.sweep.space import Dimension, Prune, Space
from experiments.sweep.study import begin_study, open_study
from experiments.sweep.trial import Ended
from tests.training.runs import smallest

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


def pretended_plan(prune: Prune | None = None, *, place: str = "here") -> Plan:
    """A plan over one field. Who pretends to train it takes the field's distance from 0.1 for the bits per byte."""
    space = Space(
        smallest(dropout=0.5),
        ("--preset", "tiny"),
        {"dropout": Dimension(low=0.0, high=0.9)},
        prune or Prune(by="none"),
    )
    return Plan(space, Budget(steps=STEPS), "shards", "0" * 64, place)


def pretend(job: Job) -> Ended:
    """A training that is over at once; nothing of Optuna, of the claims or of the rules for trials is pretended."""
    bits = 1 + abs(job.recipe.dropout - 0.1)
    for part in range(1, 9):
        if (verdict := job.judge(part, bits + (8 - part))) is not None:
            return Ended("judged", verdict, bits + (8 - part), part, part * 100)
    job.folder.mkdir(parents=True, exist_ok=True)
    return Ended("finished", "the budget is used", bits, 8, 800)


def pretended_work(
    folder: Path,
    runner: Callable[[Job], Ended] = pretend,
    *,
    trials: int,
    name: str = "p",
    plan: Plan | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[optuna.Study, Work, list[str]]:
    """A worker of the sweep `name` in `folder`, begun where it is new; with what it will tell."""
    from experiments.sweep.study import study_names

    storage = f"sqlite:///{folder}/sweeps.db"
    if name in study_names(storage):
        study = open_study(storage, name)
    else:
        study = begin_study(storage, name, plan or pretended_plan())
    lines: list[str] = []
    work = Work(study, folder / "out", runner, trials=trials, tell=lines.append, stopping=stopping)
    return study, work, lines
