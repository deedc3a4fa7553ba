"""Trials: what Optuna minimises, and the training run behind it.

`SweepWorker` claims a trial, draws its recipe, has a `Runner` train it (`worker` in this process, `on_modal` in a
container) and reports the result to Optuna. `run_trial` is that training run: it asks at each eighth of its budget
whether to go on. It knows nothing of Optuna, so the same code runs on this machine and on Modal.
"""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.sweep import study as studies
from experiments.sweep.plan import PARTS, Plan, part_of
from model.errors import InputError, StoryError, TrainingError, one_line
from training.trainer.observers import EndRun, EvaluationReport, Observer, RunEnd, RunStart, StepReport
from training.trainer.recipe import Recipe

if TYPE_CHECKING:
    import optuna

MAX_FAILURES = 3
"""Trials that may fail in a row before a worker gives up: the fault is not theirs then."""

PruneCheck = Callable[[int, float], str | None]
"""(eighths of the budget used, bits per byte) → why the trial should end now, or None."""
Say = Callable[[str], None]
"""Reports what happens to a trial, in one line."""
How = Literal["finished", "pruned", "stopped", "diverged"]
"""`finished`: the budget is used. `pruned`: the check ended it. `stopped`: by hand. `diverged`: a loss that is not
finite."""


@dataclass(frozen=True, slots=True)
class TrialEnd:
    """How a trial ended."""

    how: How
    reason: str
    bits_per_byte: float | None
    """The best of its evaluations."""
    step: int
    tokens: int


@dataclass(frozen=True, slots=True)
class TrialJob:
    """A trial as a runner gets it."""

    trial: optuna.Trial
    """Its user attributes are the only memory that later attempts have."""
    recipe: Recipe
    folder: Path
    """For its checkpoints, on this machine."""
    prune_check: PruneCheck
    on_start: Callable[[RunStart], None]
    """Called with the run's start; refuses other data than the sweep's."""

    @property
    def number(self) -> int:
        return self.trial.number


Runner = Callable[[TrialJob], TrialEnd]
"""Trains a job's recipe until its budget, its prune check or a stop ends it."""


class TrialObserver:
    """Ends a training run when the prune check or `stopping` says so."""

    def __init__(
        self,
        recipe: Recipe,
        prune_check: PruneCheck,
        on_start: Callable[[RunStart], None] = lambda start: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._recipe, self._prune_check, self._on_start = recipe, prune_check, on_start
        self._stopping = stopping
        self.step = self.tokens = 0
        self.best: float | None = None
        self.pruned = False

    def started(self, start: RunStart) -> None:
        self._on_start(start)

    def stepped(self, report: StepReport) -> None:
        self.step, self.tokens = report.step, report.tokens
        if self._stopping():
            raise EndRun("interrupted by hand")

    def evaluated(self, report: EvaluationReport) -> None:
        self.step, self.tokens = report.step, report.tokens
        self.best = min(self.best or report.bits_per_byte, report.bits_per_byte)
        part = part_of(self._recipe, report.step, report.elapsed)
        if part and (reason := self._prune_check(part, report.bits_per_byte)) is not None:
            self.pruned = True
            raise EndRun(reason)

    def ended(self, end: RunEnd) -> None:
        """Nothing is left to do."""


def run_trial(
    recipe: Recipe,
    *,
    data: Path,
    out: Path,
    prune_check: PruneCheck = lambda part, bits: None,
    on_start: Callable[[RunStart], None] = lambda start: None,
    stopping: Callable[[], bool] = lambda: False,
    observers: Sequence[Observer] = (),
) -> TrialEnd:
    """Train `recipe` on `data` with its checkpoints in `out`, resuming an earlier attempt at the same recipe.

    Raises:
        StoryError: data or recipe are not usable; a loss that is not finite is no error, but a bad trial.
    """
    import torch

    from training.run import train

    own = TrialObserver(recipe, prune_check, on_start, stopping)
    try:
        result = train(recipe, data=data, out=out, resume=_can_resume(recipe, out), observers=[own, *observers])
    except TrainingError as error:
        return TrialEnd("diverged", str(error), own.best, own.step, own.tokens)
    finally:
        # What was compiled for this network is of no use to the next trial, and the cache is limited.
        torch.compiler.reset()
        gc.collect()
    how: How = "finished" if result.outcome == "finished" else "pruned" if own.pruned else "stopped"
    return TrialEnd(how, result.reason, result.best_bits_per_byte, result.step, result.tokens)


def _can_resume(recipe: Recipe, out: Path) -> bool:
    """Whether `out` holds a checkpoint of this very recipe; the folder of any other run is removed."""
    from training.run import resumed_recipe

    with contextlib.suppress(StoryError):  # there is none, or it is damaged
        if resumed_recipe(out, []) == recipe:
            return True
    shutil.rmtree(out, ignore_errors=True)
    return False


class _InterruptedError(Exception):
    """The trial was stopped by hand; its values are queued again."""


class SweepWorker:
    """Claims and runs trials until `trials` are counted, `stopping` says so, or too many fail in a row."""

    def __init__(
        self,
        study: optuna.Study,
        out: Path,
        runner: Runner,
        *,
        trials: int,
        say: Say,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.study, self.out, self.runner, self.trials = study, out, runner, trials
        self.plan: Plan = studies.plan_of(study)
        self.say, self.stopping = say, stopping
        self.failures: list[str] = []
        """What went wrong with failed trials, in a line each."""
        self.interrupted = False
        """Whether a trial was stopped by hand."""

    def run(self) -> None:
        self.study.pruner = studies.pruner_of(self.plan.space.prune)
        in_a_row = 0
        while not self.stopping() and not self.interrupted and in_a_row < MAX_FAILURES:
            before = len(self.failures)
            if not self._run_one():
                return
            in_a_row = in_a_row + 1 if len(self.failures) > before else 0

    def _run_one(self) -> bool:
        """Claim and run a trial; return False where none is left."""
        with contextlib.ExitStack() as claiming:
            claiming.enter_context(studies.claim_lock(self.out))
            for number in studies.requeue_stale_trials(self.study):
                self.say(f"trial {number}: its worker died; it is queued again")
            if studies.count_trials(self.study) >= self.trials:
                return False

            def objective(trial: optuna.Trial) -> float:
                first = studies.claim(trial)
                claiming.close()  # the next worker may claim
                return self._objective(trial, first)

            self.study.sampler = studies.sampler_of(self.plan.seed, len(self.study.get_trials(deepcopy=False)))
            # Optuna sends this trial's heartbeat meanwhile, and gives up trials whose heartbeat has stopped.
            self.study.optimize(objective, n_trials=1, catch=(Exception,))
        return True

    def _objective(self, trial: optuna.Trial, first: int) -> float:
        import optuna

        number = trial.number
        try:
            values = {name: studies.suggest(trial, name, one) for name, one in self.plan.space.search.items()}
            try:
                recipe = self.plan.recipe(values)
            except InputError as error:
                trial.set_user_attr(studies.REASON, f"no possible recipe: {error}")
                raise optuna.TrialPruned from None
            trial.set_user_attr(studies.RECIPE, recipe.as_dict())
            folder = self.plan.folder(self.out, first)
            end = self.runner(TrialJob(trial, recipe, folder, self._prune_check(trial), self._check_data))
        except optuna.TrialPruned:
            self.say(f"trial {number}: pruned, {trial.user_attrs[studies.REASON]}")
            raise
        except Exception as error:
            reason = one_line(error)
            trial.set_user_attr(studies.REASON, reason)
            self.failures.append(f"trial {number}: {reason}")
            self.say(f"trial {number}: failed: {reason}")
            raise
        return self._result(trial, end, folder)

    def _result(self, trial: optuna.Trial, end: TrialEnd, folder: Path) -> float:
        """Report a trial's end to Optuna, and keep its checkpoint only if no other is better."""
        import optuna

        for name, fact in ((studies.REASON, end.reason), (studies.STEP, end.step), (studies.TOKENS, end.tokens)):
            trial.set_user_attr(name, fact)
        best = "none yet" if end.bits_per_byte is None else f"{end.bits_per_byte:.4f} bits/byte"
        if end.how == "stopped":
            self.interrupted = True
            self.say(f"trial {trial.number}: stopped at step {end.step}; it is queued again")
            studies.retry(self.study, self.study.trials[trial.number], counts=False)
            raise _InterruptedError
        if end.how != "finished" or end.bits_per_byte is None:
            shutil.rmtree(folder, ignore_errors=True)
            self.say(f"trial {trial.number}: pruned, {end.reason} (best {best})")
            raise optuna.TrialPruned
        self.say(f"trial {trial.number}: {best}")
        self._keep_if_best(end.bits_per_byte, folder)
        return end.bits_per_byte

    def _keep_if_best(self, bits: float, folder: Path) -> None:
        """Remove all checkpoints but the best: one with its optimiser takes 60 MB."""
        from optuna.trial import TrialState

        others = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if min((other.value for other in others if other.value is not None), default=math.inf) <= bits:
            shutil.rmtree(folder, ignore_errors=True)
            return
        for other in others:
            first = int(other.user_attrs.get(studies.FIRST, other.number))
            shutil.rmtree(self.plan.folder(self.out, first), ignore_errors=True)

    def _prune_check(self, trial: optuna.Trial) -> PruneCheck:
        known = set(self.study.trials[trial.number].intermediate_values)

        def check(part: int, bits: float) -> str | None:
            if part not in known:  # an earlier attempt at this trial may have come this far
                known.add(part)
                trial.report(bits, part)
            if part < PARTS and trial.should_prune():
                return f"behind the others at {part}/{PARTS} of its budget with {bits:.4f} bits/byte"
            return None

        return check

    def _check_data(self, start: RunStart) -> None:
        """Refuse other data than the sweep's; on Modal the first trial says which data that is."""
        digest = str(start.data.get("digest"))
        plan: dict[str, Any] = self.study.user_attrs[studies.PLAN]
        if plan["digest"] is None:
            self.study.set_user_attr(studies.PLAN, plan | {"digest": digest})
        elif plan["digest"] != digest:
            raise InputError(
                "data", f"must be what the sweep was begun with (digest {plan['digest'][:12]}), got {digest[:12]}"
            )
