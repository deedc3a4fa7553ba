"""What Optuna minimises: draws a recipe, has it trained somewhere, and passes on how it went.

Where it trains is a `Runner`'s business: in this process (`experiments.sweep.worker`), or in a container on Modal
(`experiments.sweep.on_modal`). The rules are the same for both: they stand here.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.sweep.plan import PARTS, Plan
from experiments.sweep.study import (
    FIRST,
    PLAN,
    REASON,
    RECIPE,
    STEP,
    TOKENS,
    alone,
    bury_dead,
    claim,
    counted,
    plan_of,
    pruner_of,
    retry,
    sampler_of,
    suggest,
)
from experiments.sweep.trial import Ended, Judge
from model.errors import InputError, one_line
from training.trainer.observers import RunStart
from training.trainer.recipe import Recipe

if TYPE_CHECKING:
    import optuna

FAILURES = 3
"""Trials that may fail one after the other before a worker gives up: the fault is not theirs then."""


@dataclass(frozen=True, slots=True)
class Job:
    """A trial as a runner gets it."""

    number: int
    recipe: Recipe
    folder: Path
    """For its checkpoints, on this machine."""
    judge: Judge
    begun: Callable[[RunStart], None]
    """Is told how the run starts, and refuses other data than the sweep's."""
    note: Callable[[str, str], None]
    """Writes a fact down with the trial, for a later try of it."""
    noted: Mapping[str, str]
    """What earlier tries wrote down."""


Runner = Callable[[Job], Ended]
"""Trains a job's recipe to its end, or until its judge or a stop ends it."""
Tell = Callable[[str], None]
"""Says what happens to a trial, in a line."""


class _InterruptedError(Exception):
    """The trial was stopped by hand; its values go back in line."""


class Work:
    """One worker's share of a sweep: it claims trials until `trials` are counted, `stopping` says so or all is lost."""

    def __init__(
        self,
        study: optuna.Study,
        out: Path,
        runner: Runner,
        *,
        trials: int,
        tell: Tell,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.study, self.out, self.runner, self.trials = study, out, runner, trials
        self.plan: Plan = plan_of(study)
        self.tell, self.stopping = tell, stopping
        self.failures: list[str] = []
        """What went wrong with trials that failed, in a line each."""
        self.interrupted = False
        """Whether a trial was stopped by hand."""

    def run(self) -> None:
        """Trial after trial."""
        self.study.pruner = pruner_of(self.plan.space.prune)
        in_a_row = 0
        while not self.stopping() and not self.interrupted and in_a_row < FAILURES:
            before = len(self.failures)
            if not self._one():
                return
            in_a_row = in_a_row + 1 if len(self.failures) > before else 0

    def _one(self) -> bool:
        """Claim and run a trial; False where none is left."""
        with contextlib.ExitStack() as claiming:
            claiming.enter_context(alone(self.out))
            for number in bury_dead(self.study):
                self.tell(f"trial {number}: its worker died; it is in line again")
            if counted(self.study) >= self.trials:
                return False

            def objective(trial: optuna.Trial) -> float:
                first = claim(trial)
                claiming.close()  # the next worker may claim
                return self._objective(trial, first)

            self.study.sampler = sampler_of(self.plan.seed, len(self.study.get_trials(deepcopy=False)))
            # Optuna beats this trial's heart meanwhile, and gives up those whose heart has stopped.
            self.study.optimize(objective, n_trials=1, catch=(Exception,))
        return True

    def _objective(self, trial: optuna.Trial, first: int) -> float:
        import optuna

        number = trial.number
        try:
            values = {name: suggest(trial, name, one) for name, one in self.plan.space.dimensions.items()}
            try:
                recipe = self.plan.recipe(values)
            except InputError as error:
                trial.set_user_attr(REASON, f"no possible recipe: {error}")
                raise optuna.TrialPruned from None
            trial.set_user_attr(RECIPE, recipe.as_dict())
            noted = {name: fact for name, fact in trial.user_attrs.items() if isinstance(fact, str)}
            folder = self.plan.folder(self.out, first)
            ended = self.runner(
                Job(number, recipe, folder, self._judge(trial), self._begun, trial.set_user_attr, noted)
            )
        except optuna.TrialPruned:
            self.tell(f"trial {number}: pruned, {trial.user_attrs[REASON]}")
            raise
        except Exception as error:
            reason = one_line(error)
            trial.set_user_attr(REASON, reason)
            self.failures.append(f"trial {number}: {reason}")
            self.tell(f"trial {number}: failed: {reason}")
            raise
        return self._settled(trial, ended, folder)

    def _settled(self, trial: optuna.Trial, ended: Ended, folder: Path) -> float:
        """Tell Optuna how a trial went, and keep its checkpoint only if no other is better."""
        import optuna

        for name, fact in ((REASON, ended.reason), (STEP, ended.step), (TOKENS, ended.tokens)):
            trial.set_user_attr(name, fact)
        best = "none yet" if ended.bits_per_byte is None else f"{ended.bits_per_byte:.4f} bits/byte"
        if ended.how == "stopped":
            self.interrupted = True
            self.tell(f"trial {trial.number}: stopped at step {ended.step}; it is in line again")
            retry(self.study, self.study.trials[trial.number], blame=False)
            raise _InterruptedError
        if ended.how != "finished" or ended.bits_per_byte is None:
            shutil.rmtree(folder, ignore_errors=True)
            self.tell(f"trial {trial.number}: pruned, {ended.reason} (best {best})")
            raise optuna.TrialPruned
        self.tell(f"trial {trial.number}: {best}")
        self._keep_if_best(ended.bits_per_byte, folder)
        return ended.bits_per_byte

    def _keep_if_best(self, bits: float, folder: Path) -> None:
        """A checkpoint with its optimiser takes 60 MB, and only the best one is ever asked for."""
        from optuna.trial import TrialState

        others = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if min((other.value for other in others if other.value is not None), default=math.inf) <= bits:
            shutil.rmtree(folder, ignore_errors=True)
            return
        for other in others:
            first = int(other.user_attrs.get(FIRST, other.number))
            shutil.rmtree(self.plan.folder(self.out, first), ignore_errors=True)

    def _judge(self, trial: optuna.Trial) -> Judge:
        known = set(self.study.trials[trial.number].intermediate_values)

        def judge(part: int, bits: float) -> str | None:
            if part not in known:  # an earlier try of this trial may have come so far
                known.add(part)
                trial.report(bits, part)
            if part < PARTS and trial.should_prune():
                return f"behind the others at {part}/{PARTS} of its budget with {bits:.4f} bits/byte"
            return None

        return judge

    def _begun(self, start: RunStart) -> None:
        """All trials of a sweep have to see the same data; on Modal it is known only now which that are."""
        digest = str(start.data.get("digest"))
        plan: dict[str, Any] = self.study.user_attrs[PLAN]
        if plan["digest"] is None:
            self.study.set_user_attr(PLAN, plan | {"digest": digest})
        elif plan["digest"] != digest:
            raise InputError(
                "data",
                f"must be what the sweep was begun with (digest {plan['digest'][:12]}), got {digest[:12]}",
            )
