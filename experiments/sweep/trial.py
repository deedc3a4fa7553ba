"""One trial: a real training run that reports to a judge at each eighth of its budget, and ends when it is told to.

It knows nothing of Optuna, so the same code runs in a worker of this machine and in a container on Modal. A folder in
which an earlier try of the same recipe left a checkpoint is gone on with.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.sweep.plan import part_of
from model.errors import StoryError, TrainingError
from training.trainer.observers import EndRun, EvaluationReport, Observer, RunEnd, RunStart, StepReport
from training.trainer.recipe import Recipe

Judge = Callable[[int, float], str | None]
"""(part of the budget, bits per byte) → why the trial should end now, or None."""
How = Literal["finished", "judged", "stopped", "diverged"]
"""`finished`: the budget is used. `judged`: the judge ended it. `stopped`: by hand. `diverged`: a loss that is not
finite."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a trial went."""

    how: How
    reason: str
    bits_per_byte: float | None
    """The best of its evaluations."""
    step: int
    tokens: int


class Judged:
    """The observer that asks the judge. `begun` may look at how the run starts."""

    def __init__(
        self, recipe: Recipe, judge: Judge, begun: Callable[[RunStart], None] = lambda start: None
    ) -> None:
        self._recipe, self._judge, self._begun = recipe, judge, begun
        self._step = self._tokens = 0
        self.best: float | None = None
        self.verdict: str | None = None

    def started(self, start: RunStart) -> None:
        self._begun(start)

    def stepped(self, report: StepReport) -> None:
        self._step, self._tokens = report.step, report.tokens

    def evaluated(self, report: EvaluationReport) -> None:
        self._step, self._tokens = report.step, report.tokens
        if self.best is None or report.bits_per_byte < self.best:
            self.best = report.bits_per_byte
        part = part_of(self._recipe, report.step, report.elapsed)
        if part and (verdict := self._judge(part, report.bits_per_byte)) is not None:
            self.verdict = verdict
            raise EndRun(verdict)

    def ended(self, end: RunEnd) -> None:
        """Nothing is left to ask."""

    def as_diverged(self, reason: str) -> Ended:
        """The trial's end by a loss that was not finite."""
        return Ended("diverged", reason, self.best, self._step, self._tokens)


def run_trial(
    recipe: Recipe,
    *,
    data: Path,
    out: Path,
    judge: Judge,
    begun: Callable[[RunStart], None] = lambda start: None,
    observers: Sequence[Observer] = (),
) -> Ended:
    """Train `recipe` on `data` with its checkpoints in `out`.

    Raises:
        StoryError: data or recipe are not usable; a loss that is not finite is no error, but a bad trial.
    """
    import torch

    from training.run import train

    judged = Judged(recipe, judge, begun)
    try:
        result = train(
            recipe, data=data, out=out, resume=_is_begun(recipe, out), observers=[judged, *observers]
        )
    except TrainingError as error:
        return judged.as_diverged(str(error))
    finally:
        # What was compiled for this trial's network is of no use to the next one, and there is a limit to it.
        torch.compiler.reset()
        gc.collect()
    how: How = "finished" if result.outcome == "finished" else "judged" if judged.verdict else "stopped"
    return Ended(how, result.reason, result.best_bits_per_byte, result.step, result.tokens)


def _is_begun(recipe: Recipe, out: Path) -> bool:
    """Whether a checkpoint of this very recipe can be gone on with; the folder of any other run is cleared."""
    from training.run import resumed_recipe

    try:
        if resumed_recipe(out, []) == recipe:
            return True
    except StoryError:
        pass  # there is none, or it is damaged
    shutil.rmtree(out, ignore_errors=True)
    return False
