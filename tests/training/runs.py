"""Training runs small enough to be made by the dozen: a few thousand parameters, some tens of milliseconds a step.

Nothing is faked in them: real shards of our own stories, the real network, loop and files, only small. The
functions at the end are for processes of their own, which tests interrupt and kill.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.architecture.folder import ModelConfig
from model.architecture.network import load_network
from training.trainer.loop import Trainer
from training.trainer.observers import EvaluationReport, RunEnd, RunStart, StepReport
from training.trainer.parallel import Group
from training.trainer.recipe import OptimizerRecipe, Recipe

MODEL = ModelConfig(
    vocab_size=512, width=32, pattern="RA", mlp_width=48, heads=2, head_dim=16, key_dim=8, window=16, chunk=16
)
RECIPE = Recipe(
    name="smallest",
    model=MODEL,
    optimizer=OptimizerRecipe(warmup_steps=2),
    row_tokens=64,
    rows=4,
    micro_rows=2,
    steps=12,
    eval_every=4,
    eval_stories=3,
    save_every=3,
    precision="fp32",
    compile=False,
    samples=(),
)

REGULARISED = {"dropout": 0.2, "replace": 0.1, "average": 0.8}
"""What keeps a run from learning its corpus by heart, as changes to the smallest one."""


def smallest(**changes: Any) -> Recipe:
    """`RECIPE` with fields changed; those of the optimiser by `optimizer={…}`."""
    if isinstance(sizes := changes.get("model"), ModelConfig):
        changes["model"] = sizes.as_dict()
    base = RECIPE.as_dict()
    return Recipe.from_dict(base | changes | {"optimizer": base["optimizer"] | changes.get("optimizer", {})})


class Recorder:
    """An observer that keeps everything, and calls `then(step)` after each step."""

    def __init__(self, then: Callable[[int], None] | None = None) -> None:
        self.then = then
        self.starts: list[RunStart] = []
        self.steps: list[StepReport] = []
        self.evaluations: list[EvaluationReport] = []
        self.ends: list[RunEnd] = []

    def started(self, start: RunStart) -> None:
        self.starts.append(start)

    def stepped(self, report: StepReport) -> None:
        self.steps.append(report)
        if self.then:
            self.then(report.step)

    def evaluated(self, report: EvaluationReport) -> None:
        self.evaluations.append(report)

    def ended(self, end: RunEnd) -> None:
        self.ends.append(end)

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step; a step done again must have the same one."""
        losses: dict[int, float] = {}
        for report in self.steps:
            assert losses.setdefault(report.step, report.loss) == report.loss
        return losses


def train(recipe: Recipe, data: Path, out: Path, recorder: Recorder | None = None, *, resume: bool = False) -> Recorder:
    """One run in this process, recorded (behind what `recorder` holds already)."""
    recorder = recorder or Recorder()
    Trainer(recipe, data=data, out=out, observers=[recorder], resume=resume).run()
    return recorder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_network(folder).state_dict()


def same_weights(one: Path, other: Path) -> bool:
    """Bit for bit."""
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Journal(Recorder):
    """A recorder whose steps can be read from outside while it runs, a JSON line each."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def stepped(self, report: StepReport) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([report.step, report.loss]) + "\n")


def train_elsewhere(recipe: dict[str, Any], data: Path, out: Path, journal: Path, resume: bool) -> None:
    """The same run in a process of its own, which writes its steps to `journal`."""
    torch.set_num_threads(1)
    Trainer(
        Recipe.from_dict(recipe), data=data, out=out, observers=[Journal(journal)], group=Group(), resume=resume
    ).run()


def read_journal(path: Path) -> list[tuple[int, float]]:
    """Whole lines only: a kill may have cut the last one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [(int(step), loss) for step, loss in (json.loads(line) for line in lines if line.endswith("\n"))]
