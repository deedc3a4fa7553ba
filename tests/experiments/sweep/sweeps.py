"""Search spaces of the smallest recipe, and sweeps whose trainings take no time where the training is not the point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.sweep.plan import Budget, Dimension, Plan, Prune, Space
from experiments.sweep.study import begin_study, open_study
from experiments.sweep.trial import SweepWorker, TrialEnd, TrialJob
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


def fake_plan(prune: Prune | None = None, *, place: Literal["here", "modal"] = "here") -> Plan:
    """A plan over one field. Who pretends to train it takes the field's distance from 0.1 for the bits per byte."""
    space = Space(
        base=smallest(dropout=0.5),
        origin=("--preset", "tiny"),
        search={"dropout": Dimension(low=0.0, high=0.9)},
        prune=prune or Prune(by="none"),
    )
    return Plan(space=space, budget=Budget(steps=STEPS), data="shards", digest="0" * 64, place=place)


def pretend(job: TrialJob) -> TrialEnd:
    """A training that is over at once; nothing of Optuna, of the claims or of the rules for trials is pretended."""
    bits = 1 + abs(job.recipe.dropout - 0.1)
    for part in range(1, 9):
        if (verdict := job.prune_check(part, bits + (8 - part))) is not None:
            return TrialEnd("pruned", verdict, bits + (8 - part), part, part * 100)
    job.folder.mkdir(parents=True, exist_ok=True)
    return TrialEnd("finished", "the budget is used", bits, 8, 800)


def fake_work(
    folder: Path,
    runner: Callable[[TrialJob], TrialEnd] = pretend,
    *,
    trials: int,
    name: str = "p",
    plan: Plan | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> tuple[optuna.Study, SweepWorker, list[str]]:
    """A worker of the sweep `name` in `folder`, begun where it is new; with what it will say."""
    from experiments.sweep.study import study_names

    storage = f"sqlite:///{folder}/sweeps.db"
    if name in study_names(storage):
        study = open_study(storage, name)
    else:
        study = begin_study(storage, name, plan or fake_plan())
    lines: list[str] = []
    work = SweepWorker(study, folder / "out", runner, trials=trials, say=lines.append, stopping=stopping)
    return study, work, lines
