"""`story train`: a recipe, its data and a folder, put together with whoever watches the run."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import InputError
from training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended, as `story train --json` prints it."""

    outcome: str
    reason: str
    step: int
    tokens: int
    best_bits_per_byte: float | None
    checkpoint: str | None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def train(
    recipe: Recipe, *, data: Path, out: Path, resume: bool = False, minutes: float | None = None, track: bool = True
) -> TrainResult:
    """Train (or resume) in this process; under `torchrun`, as one process of the group.

    Raises:
        StoryError: the recipe, the data or a checkpoint is not usable, or the loss stopped being finite.
    """
    import torch

    from training.loop import Trainer
    from training.parallel import Group
    from training.progress import ProgressObserver
    from training.report import Observer
    from training.tracking import MlflowObserver

    if minutes is not None:
        recipe = dataclasses.replace(recipe, minutes=minutes)
    group = Group()
    if group.size > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // group.size))
    observers: list[Observer] = [ProgressObserver()] if group.first else []
    if track and group.first:
        observers.append(MlflowObserver())
    try:
        end = Trainer(recipe, data=data, out=out, observers=observers, group=group, resume=resume).run()
    finally:
        group.close()
    return TrainResult(
        end.outcome, end.reason, end.step, end.tokens, end.best_bits_per_byte,
        str(end.checkpoint) if end.checkpoint else None,
    )  # fmt: skip


def relaunch(processes: int, arguments: list[str]) -> int:
    """Run this same `story` command under torchrun with `processes` processes; returns its exit status."""
    if processes < 1:
        raise InputError("processes", f"must be at least 1, got {processes}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.call([*launcher, "-m", "story", *arguments])
