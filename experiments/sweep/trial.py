"""Trials: what Optuna minimises, and the training run behind it.

`Objective` draws a trial's recipe, has a `Runner` train it (`run` in this process, `remote` in another or in a
container) and reports the result to Optuna. `run_trial` is that training run; it knows nothing of Optuna, so the same
code runs on this machine and on Modal.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.sweep import study as studies
from experiments.sweep.plan import PARTS, kind_of, part_of
from model.errors import InputError, StoryError, TrainingError, one_line
from training.tracking.store import owner_of
from training.trainer.observers import EndRun, EvaluationReport, Observer, Outcome, RunEnd, RunStart, StepReport
from training.trainer.recipe import Recipe

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

MAX_FAILURES = 3
"""Trials that may fail in a row before the sweep gives up: the fault is not theirs then."""

Say = Callable[[str], None]
"""Reports what happens to a trial, in one line."""


class KilledError(StoryError):
    """A trial's process was killed, so its training is worth another attempt."""

    exit_code = 1


@dataclass
class TrialObserver:
    """Reports a training run to its trial in Optuna, and ends it where that is pruned or `stopping` says so."""

    trial: optuna.Trial
    frozen: FrozenTrial
    """The trial as it was before this attempt."""
    recipe: Recipe
    folder: Path
    """For its checkpoints, on this machine."""
    say: Say
    """Gets a line at the start and after each evaluation."""
    stopping: Callable[[], bool]
    pruned: bool = False
    end: RunEnd | None = None

    def __post_init__(self) -> None:
        # An earlier attempt at this trial may have reported some evaluations already.
        self._reported = set(self.frozen.intermediate_values)
        self._so_far: dict[str, Any] = {"step": 0, "tokens": 0, "best_bits_per_byte": None}

    def started(self, start: RunStart) -> None:
        """Refuse other data than the sweep's; on Modal the first trial says which data that is."""
        digest = str(start.data.get("digest"))
        plan: dict[str, Any] = self.trial.study.user_attrs[studies.PLAN]
        if plan["digest"] is None:
            self.trial.study.set_user_attr(studies.PLAN, plan | {"digest": digest})
        elif plan["digest"] != digest:
            raise InputError(
                "data", f"must be what the sweep was begun with (digest {plan['digest'][:12]}), got {digest[:12]}"
            )
        begin = f"resuming after step {start.resumed_from}" if start.resumed_from else "starting"
        self.say(f"trial {self.trial.number}: {begin}, {start.parameters:,} parameters")

    def stepped(self, report: StepReport) -> None:
        self._so_far |= {"step": report.step, "tokens": report.tokens}
        if self.stopping():
            raise EndRun("interrupted by hand")

    def evaluated(self, report: EvaluationReport) -> None:
        bits = report.bits_per_byte
        best = min(self._so_far["best_bits_per_byte"] or bits, bits)
        self._so_far |= {"step": report.step, "tokens": report.tokens, "best_bits_per_byte": best}
        self.say(f"trial {self.trial.number}: step {report.step}, {bits:.4f} bits/byte")
        part = part_of(self.recipe, report.step, report.elapsed)
        if part and part not in self._reported:
            self._reported.add(part)
            self.trial.report(bits, part)
        if 0 < part < PARTS and self.trial.should_prune():
            self.pruned = True
            raise EndRun(f"behind the others at {part}/{PARTS} of its budget with {bits:.4f} bits/byte")

    def ended(self, end: RunEnd) -> None:
        self.end = end

    def cut_off(self, outcome: Outcome, reason: str) -> RunEnd:
        """Return the end of a run that cannot report its end itself."""
        return RunEnd(outcome=outcome, reason=reason, checkpoint=None, **self._so_far)


Runner = Callable[[TrialObserver], None]
"""Trains a trial's recipe until its budget or an observer ends it; reports to the observer."""


def run_trial(recipe: Recipe, *, data: Path, out: Path, observers: Sequence[Observer]) -> None:
    """Train `recipe` on `data` with its checkpoints in `out`, resuming an earlier attempt at the same recipe.

    A loss that is not finite is no error, but a bad trial: observers are told that the run `failed`.

    Raises:
        StoryError: data or recipe are not usable.
    """
    import torch

    from training.run import train

    try:
        with contextlib.suppress(TrainingError):
            train(recipe, data=data, out=out, resume=_can_resume(recipe, out), observers=observers)
    finally:
        # What was compiled for this network is of no use to the next trial, and the cache is limited.
        torch.compiler.reset()
        gc.collect()


def _can_resume(recipe: Recipe, out: Path) -> bool:
    """Whether `out` holds a checkpoint of this very recipe; the folder of any other run is removed."""
    from training.run import resumed_recipe

    with contextlib.suppress(StoryError):  # there is none, or it is damaged
        if resumed_recipe(out, []) == recipe:
            return True
    shutil.rmtree(out, ignore_errors=True)
    return False


class _FailedError(Exception):
    """The trial has no result, for a reason that is recorded."""


@dataclass
class Objective:
    """What Optuna minimises: bits per byte at the end of a trial."""

    study: optuna.Study
    out: Path
    """Folder of the trials' checkpoints; only the best one is kept."""
    train: Runner
    say: Say
    """Gets a line for each trial's end."""
    stopping: Callable[[], bool] = lambda: False
    lines: bool = False
    """Whether `say` also gets each trial's start and evaluations."""
    failures: list[str] = field(default_factory=list)
    """What went wrong with failed trials, in a line each."""
    interrupted: bool = False
    """Whether a trial was stopped by hand."""

    def __post_init__(self) -> None:
        self.plan = studies.plan_of(self.study)
        self._in_a_row = 0

    def minimise(self, trials: int, at_once: int = 1) -> None:
        """Run trials, `at_once` in parallel, until the study has `trials`, one is interrupted, or too many fail."""
        from optuna.study import MaxTrialsCallback
        from optuna.trial import TrialState

        # Failed ones do not use up the number that was asked for.
        counted = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        callbacks: list[Any] = [self._after, MaxTrialsCallback(trials, counted)]
        self.study.pruner = self.plan.space.prune.pruner()
        self.study.sampler = studies.sampler_of(self.plan.seed)
        while not self._over() and (missing := trials - len(self.study.get_trials(deepcopy=False, states=counted))) > 0:
            # Optuna sends the trials' heartbeats meanwhile, and gives up trials whose heartbeat has stopped.
            self.study.optimize(self, missing, n_jobs=at_once, catch=(_FailedError,), callbacks=callbacks)

    def __call__(self, trial: optuna.Trial) -> float:
        """Train the trial. Raises `TrialPruned`, or `_FailedError` where it has no result."""
        import optuna

        number = trial.number
        frozen = self.study.trials[number]
        try:
            bits = self._bits_per_byte(trial, frozen)
        except optuna.TrialPruned as pruned:
            trial.set_user_attr(studies.REASON, str(pruned))
            self.say(f"trial {number}: pruned, {pruned}")
            self._in_a_row = 0
            raise
        except _FailedError:
            raise
        except Exception as error:
            reason = one_line(error)
            trial.set_user_attr(studies.REASON, reason)
            if (
                isinstance(error, KilledError)
                and len(frozen.system_attrs.get("retry_history", ())) < studies.MAX_RETRIES
            ):
                studies.retry(self.study, self.study.trials[number])
                self.say(f"trial {number}: {reason}; it is queued again")
            else:
                self._in_a_row += 1
                self.failures.append(f"trial {number}: {reason}")
                self.say(f"trial {number}: failed: {reason}")
            raise _FailedError from error
        self.say(f"trial {number}: {bits:.4f} bits/byte")
        self._in_a_row = 0
        return bits

    def _bits_per_byte(self, trial: optuna.Trial, frozen: FrozenTrial) -> float:
        import optuna

        trial.set_user_attr(studies.OWNER, owner_of().to_text())
        search = self.plan.space.search
        values = {name: getattr(trial, f"suggest_{kind_of(entry)}")(name, **entry) for name, entry in search.items()}
        try:
            recipe = self.plan.recipe(values)
        except InputError as error:
            raise optuna.TrialPruned(f"no possible recipe: {error}") from None
        trial.set_user_attr(studies.RECIPE, recipe.as_dict())
        say = self.say if self.lines else lambda line: None
        observer = TrialObserver(trial, frozen, recipe, self._folder(frozen), say, self.stopping)
        self.train(observer)
        end = observer.end
        assert end is not None
        for name, fact in ((studies.REASON, end.reason), (studies.STEP, end.step), (studies.TOKENS, end.tokens)):
            trial.set_user_attr(name, fact)
        if end.outcome == "stopped" and not observer.pruned:
            self.interrupted = True
            studies.retry(self.study, self.study.trials[trial.number], max_retry=None)
            self.say(f"trial {trial.number}: stopped; it is queued again")
            raise _FailedError
        if end.outcome != "finished" or end.best_bits_per_byte is None:
            raise optuna.TrialPruned(end.reason)
        return end.best_bits_per_byte

    def _folder(self, trial: FrozenTrial) -> Path:
        """Return the checkpoint folder of a trial, which all its attempts share."""
        return self.out / f"trial-{studies.first_attempt(trial):04d}"

    def _after(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Remove all checkpoints but the best: with its optimiser one takes 60 MB. Stop where there is a reason."""
        from optuna.trial import TrialState

        complete = [*study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
        best = min(complete, key=lambda one: one.values[0], default=None)
        pruned = [trial] if trial.state == TrialState.PRUNED else []
        for other in complete + pruned:
            if other is not best:
                shutil.rmtree(self._folder(other), ignore_errors=True)
        if self._over():
            study.stop()

    def _over(self) -> bool:
        return self.stopping() or self.interrupted or self._in_a_row >= MAX_FAILURES
