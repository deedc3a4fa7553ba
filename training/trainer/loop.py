"""The training loop.

A run is a function of its recipe, data and seed. It can be interrupted at any step and resumed to the same losses. A
loss or gradient that is not finite stops it before the weights change. The best and the last network are kept.
"""

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.architecture.folder import END_ID
from model.architecture.network import StoryNetwork, save_network
from model.errors import InputError, TrainingError
from training.data.shards import TokenShard, read_meta
from training.trainer.checkpoint import (
    BEST,
    LAST,
    find_checkpoint,
    find_last,
    read_checkpoint,
    read_initial,
    write_checkpoint,
)
from training.trainer.observers import (
    AgeObserver,
    AgeReport,
    EndRun,
    EvaluationReport,
    Observer,
    Outcome,
    RunEnd,
    RunStart,
    StepReport,
    StopFlag,
    stop_on_signals,
)
from training.trainer.optim import Average, Optimizers, has_bf16, rate_share
from training.trainer.parallel import Group
from training.trainer.recipe import Recipe
from training.trainer.rows import IGNORED, RowStream, Validation, write_samples

EVALUATED_PARTS = 8
"""A budget in minutes is evaluated at each of these parts of it too, if evaluations leave enough time for steps."""
STEP_SHARE = 0.75
"""Share of the minutes that is kept for steps: evaluations and checkpoints that would take more of them wait."""
LEAST_STEPS = 60
"""Steps that a budget in minutes is to give: where full steps are too slow for that, the first ones have fewer rows."""
FIRST_STEP, LAST_STEP = 0.4, 1.8
"""How long the first and the last step may take, in shares of the mean. It grows in a line with the time, which gives
`LEAST_STEPS` times ln(last / first) / (last - first) = 1.07."""
FORWARD_SHARE = 1 / 3
"""Of the time that a token takes in training, for validating one."""
YOUNGEST = 1 / 256
"""Share of the budget at which the second age is due; the first is due before the first step."""


COUNTERS = ("step", "tokens", "elapsed", "aside", "best", "worse", "evaluated", "part", "age")
"""Fields of `Trainer` that a checkpoint keeps."""


def ages_due(progress: float, count: int) -> int:
    """How many of `count` ages are due when `progress` of the budget is used: all of them at 1."""
    shares = [0.0, *np.geomspace(1.0, YOUNGEST, max(0, count - 1))[::-1]]
    return bisect_right(shares, progress) if count else 0


class Trainer:
    """One run over the shards in `data`, with its checkpoints in `out`.

    It starts from random weights, or from those in `init`, a model folder or a checkpoint.

    Raises:
        InputError: recipe, data and `init` do not fit together; `out` holds a run and `resume` is not set, or is
            set and would change what the run is made of.
        DataError: the shards are missing or damaged.
        ModelError: there is no run to resume, or its checkpoint is damaged, or `init` is.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        data: Path,
        out: Path,
        observers: Sequence[Observer] = (),
        group: Group | None = None,
        resume: bool = False,
        init: Path | None = None,
    ) -> None:
        self.recipe, self.data, self.out = recipe, data, out
        self.group = group or Group()
        self.observers = observers if self.group.first else ()
        self.meta = read_meta(data)
        if self.meta.get("vocab_size") != recipe.model.vocab_size:
            theirs = self.meta.get("vocab_size")
            raise InputError(
                "model.vocab_size", f"must equal the data's {theirs} ({data}), got {recipe.model.vocab_size}"
            )
        if recipe.rows % (recipe.micro_rows * self.group.size):
            product = f"{recipe.micro_rows} x {self.group.size}"
            must = f"must be a multiple of micro_rows x processes = {product}, got {recipe.rows}"
            raise InputError("rows", must)
        self.tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
        self.rows = RowStream(TokenShard(data, "train"), recipe.row_tokens, recipe.seed)
        self.validation = Validation(TokenShard(data, "val"), self.tokenizer, recipe.eval_stories, self.group)
        self.step = self.tokens = self.worse = self.evaluated = self.saved = self.part = self.age = 0
        self.elapsed = self.aside = self.evaluation_seconds = self.row_seconds = 0.0
        self.micro_rows = recipe.micro_rows
        self.best: float | None = None
        self.bits: float | None = None
        """Bits per byte of the last evaluation, if it was made since the start or the resume."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(recipe.seed)
        self.network = StoryNetwork(recipe.model, dropout=recipe.dropout).to(self.device)
        self.origin: dict[str, Any] | None = None
        if resume and init:
            raise InputError("init", f"cannot be given with resume: the run in {out} has weights already")
        if init:
            network, self.origin = read_initial(init, recipe.model, data / "tokenizer.json")
            self.network.load_state_dict(network.state_dict())
        self.average = Average(self.network, recipe.average) if recipe.average else None
        self.optimizers = Optimizers(self.network, recipe.optimizer)
        if resume:
            self._resume()
        elif find_checkpoint(out / LAST):
            raise InputError("out", f"already holds a run ({out}); --resume continues it, another --out starts anew")
        self.resumed_from = self.step
        self.bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and has_bf16(self.device))
        self.loss_sum = torch.compile(self.network.loss_sum) if recipe.compile else self.network.loss_sum
        self._stop, self._reason = StopFlag(), "interrupted by hand"
        self.group.meet()  # before anyone writes to `out`: the others have to find it as it was

    def run(self) -> RunEnd:
        """Train until the budget is used, patience ends or someone interrupts.

        Raises:
            TrainingError: a loss or gradient was not finite.
        """
        start = RunStart(
            recipe=self.recipe.as_dict(),
            parameters=self.network.parameter_count(),
            data=self.meta,
            data_folder=self.data,
            out=self.out,
            world_size=self.group.size,
            resumed_from=self.resumed_from,
            init=self.origin["digest"] if self.origin else None,
        )
        outcome: Outcome = "failed"
        reason = "an unexpected error"
        with stop_on_signals(self._stop):
            for observer in self.observers:
                observer.started(start)
            try:
                outcome, reason = self._train()
            except TrainingError as error:
                reason = str(error)
                raise
            finally:
                kept, counts = find_checkpoint(self.out / BEST), {"step": self.step, "tokens": self.tokens}
                end = RunEnd(outcome=outcome, reason=reason, **counts, best_bits_per_byte=self.best, checkpoint=kept)
                for observer in self.observers:
                    observer.ended(end)
        return end

    def _train(self) -> tuple[Outcome, str]:
        if self.step == 0:
            self._save()  # from here on this run can be resumed, whatever happens to it
        self._warm_up()
        began = time.monotonic() - self.elapsed
        rows, before = 0, 0.0
        while True:
            self.elapsed, stopped = self.group.agree(time.monotonic() - began, self._stop.is_set())
            in_steps = self.elapsed - self.aside
            if rows:
                self.row_seconds = (in_steps - before) * self.group.size / rows
            before = in_steps
            progress = self._progress()
            if stopped:
                # An evaluation that is due now is left to the resume, which finds that it was not made.
                self._save()
                return "stopped", self._reason
            if self.step != self.evaluated and self._evaluation_is_due(progress):
                self.evaluation_seconds = self._set_aside(self._evaluate, self._save)
            # An age has its bits per byte, where evaluations have begun; the first ones come long before.
            if self.evaluated in (0, self.step) and (age := ages_due(progress, self.recipe.ages)) > self.age:
                self.age = age
                self._set_aside(partial(self._report_age, last=progress >= 1))
            if self.recipe.patience and self.worse >= self.recipe.patience:
                return "finished", f"no better validation in {self.worse} evaluations"
            if progress >= 1:
                return "finished", "the budget is used"
            if self.step % self.recipe.save_every == 0 and self.step != self.saved:
                self._set_aside(self._save)
            rows = self._rows_of_a_step(progress)
            self._one_step(progress, rows)

    def _evaluation_is_due(self, progress: float) -> bool:
        """Whether to evaluate now: by steps, at each part of the minutes if there is time for it, and at the end."""
        by_step, minutes = self.step % self.recipe.eval_every == 0, self.recipe.minutes
        if progress >= 1 or minutes is None:
            return progress >= 1 or by_step
        part = int(progress * EVALUATED_PARTS)
        cost = self.evaluation_seconds
        if not cost and self.tokens:
            cost = self.validation.tokens / self.tokens * (self.elapsed - self.aside) * FORWARD_SHARE
        due = (by_step or part > self.part) and self.aside + cost <= (1 - STEP_SHARE) * (self.elapsed + cost)
        if due:
            self.part = part
        return due

    def _set_aside(self, *work: Callable[[], None]) -> float:
        """Do what is no step, and return and count its seconds (of the slowest process)."""
        began = time.monotonic()
        for part in work:
            part()
        (seconds,) = self.group.agree(time.monotonic() - began)
        self.aside += seconds
        return seconds

    def _rows_of_a_step(self, progress: float) -> int:
        """The recipe's rows, or, where so many take too long for `LEAST_STEPS` in the minutes, fewer whole passes."""
        one_pass = self.micro_rows * self.group.size
        if not self.recipe.minutes or not self.row_seconds:
            return self.recipe.rows
        passes = int(self._step_seconds(progress) / (self.row_seconds * self.micro_rows))
        return min(max(1, passes) * one_pass, self.recipe.rows)

    def _step_seconds(self, progress: float) -> float:
        """How long a step may take when `progress` of the minutes is used."""
        assert self.recipe.minutes is not None
        mean = self.recipe.minutes * 60 * STEP_SHARE / LEAST_STEPS
        return mean * (FIRST_STEP + (LAST_STEP - FIRST_STEP) * progress)

    def _progress(self) -> float:
        share = self.step / self.recipe.steps
        return max(share, self.elapsed / (self.recipe.minutes * 60)) if self.recipe.minutes else share

    def _one_step(self, progress: float, row_count: int) -> None:
        recipe, micro_rows = self.recipe, self.micro_rows
        began = time.monotonic()
        rows = [next(self.rows) for _ in range(row_count)]
        count = sum(int((targets != IGNORED).sum()) for _, targets in rows)
        nats = torch.zeros(1, dtype=torch.float64)
        share = rate_share(recipe.optimizer, self.step, progress)
        # Whole passes are shared out, so that each drops the same values whoever computes it.
        for index in range(self.group.rank, row_count // micro_rows, self.group.size):
            first = index * micro_rows
            inputs_BT, targets_BT = self._stack(rows[first : first + micro_rows])
            if recipe.dropout or recipe.replace:
                self._seed_pass(index)
            if recipe.replace:
                inputs_BT = self._with_replacements(inputs_BT, recipe.replace * share)
            with self._autocast():
                loss = self.loss_sum(inputs_BT, targets_BT) / count
            loss.backward()
            nats += loss.detach().double().cpu()
        self.group.sum_gradients(self.network.parameters())
        loss_mean = float(self.group.sum(nats))
        clip = recipe.optimizer.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.network.parameters(), clip))
        if not math.isfinite(loss_mean) or not math.isfinite(norm):
            raise TrainingError(
                f"step {self.step + 1}: loss {loss_mean}, gradient norm {norm}; stopped before the weights "
                f"changed. The last good checkpoint (step {self.saved}) is kept; resume with a lower learning rate"
            )
        self.optimizers.set_rate(share)
        self.optimizers.step()
        self.optimizers.zero_grad()
        if self.average:
            self.average.update()
        self.step += 1
        self.tokens += count
        seconds = time.monotonic() - began
        report = StepReport(
            step=self.step,
            tokens=self.tokens,
            loss=loss_mean,
            grad_norm=norm,
            elapsed=self.elapsed + seconds,
            learning_rate=share * recipe.optimizer.matrix_lr,
            tokens_per_second=count / max(seconds, 1e-9),
            progress=progress,
        )
        self._notify(lambda observer: observer.stepped(report))

    def _seed_pass(self, index: int) -> None:
        """Seed pass `index` of this step by recipe seed and step, so that a resume draws the same numbers."""
        rng = np.random.SeedSequence([self.recipe.seed, self.step, index])
        torch.manual_seed(int(rng.generate_state(1, np.uint64)[0]))

    def _with_replacements(self, inputs_BT: Tensor, share: float) -> Tensor:
        """The inputs with a share of the tokens replaced by random ones; story ends stay and none is added."""
        random_BT = torch.randint_like(inputs_BT, 1, self.recipe.model.vocab_size)
        chosen_BT = torch.rand(inputs_BT.shape, device=inputs_BT.device) < share
        return torch.where(chosen_BT & (inputs_BT != END_ID), random_BT, inputs_BT)

    def _evaluate(self) -> None:
        """Validate the network or its average, and keep it if it is the best."""
        self.network.eval()
        with self.average.applied() if self.average else nullcontext():
            loss, bits = self.validation.measure(self.network)
            if not math.isfinite(bits):
                raise TrainingError(
                    f"step {self.step}: validation gives {bits} bits per byte. "
                    f"The last good checkpoint (step {self.saved}) is kept; resume with a lower learning rate"
                )
            self.evaluated, self.bits = self.step, bits
            better = self.best is None or bits < self.best
            self.worse = 0 if better else self.worse + 1
            if better:
                self.best = bits
            if self.group.first:
                prompts, seed = self.recipe.samples, self.recipe.seed
                samples = write_samples(self.network, self.tokenizer, prompts, seed=seed)
                if better:
                    self._write(BEST)
                report = EvaluationReport(
                    step=self.step,
                    tokens=self.tokens,
                    loss=loss,
                    bits_per_byte=bits,
                    best=better,
                    samples=samples,
                    elapsed=self.elapsed,
                )
                self._notify(lambda observer: observer.evaluated(report))
        self.network.train()

    def _report_age(self, *, last: bool) -> None:
        keepers = [observer for observer in self.observers if isinstance(observer, AgeObserver)]
        bits = self.bits if self.evaluated == self.step else None

        def write(folder: Path, notes: dict[str, Any]) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer = self.data / "tokenizer.json"
            save_network(self.network, folder, tokenizer=tokenizer, notes=notes, dtype=torch.float16)

        with self.average.applied() if self.average and keepers else nullcontext():
            report = AgeReport(step=self.step, tokens=self.tokens, bits_per_byte=bits, last=last, write=write)
            for keeper in keepers:
                keeper.aged(report)

    def _notify(self, report: Callable[[Observer], None]) -> None:
        """Notify all observers, and stop before the next step if one of them ends the run."""
        for observer in self.observers:
            try:
                report(observer)
            except EndRun as wish:
                self._reason = str(wish)
                self._stop.set()

    def _save(self) -> None:
        if self.group.first:
            state = {name: getattr(self, name) for name in COUNTERS} | {
                "rows": self.rows.state(),
                "optimizers": self.optimizers.state_dict(),
                "average": self.average.state_dict() if self.average else None,
            }
            self._write(LAST, state)
        self.group.meet()  # so that nobody resumes from an earlier one
        self.saved = self.step

    def _write(self, name: str, trainer: dict[str, Any] | None = None) -> None:
        notes = {
            "recipe": self.recipe.as_dict(),
            "data": self.meta.get("digest"),
            "step": self.step,
            "tokens": self.tokens,
            "elapsed": round(self.elapsed, 1),
            "best_bits_per_byte": self.best,
        }
        if self.origin:
            notes["init"] = self.origin
        tokenizer = self.data / "tokenizer.json"
        write_checkpoint(self.out / name, self.network, tokenizer=tokenizer, notes=notes, trainer=trainer)

    def _resume(self) -> None:
        network, notes, state = read_checkpoint(find_last(self.out))
        ours = _fixed(self.recipe.as_dict(), self.meta.get("digest"))
        theirs = _fixed(notes.get("recipe", {}), notes.get("data"))
        for name in ours:
            if ours[name] != theirs.get(name):
                must = f"must stay what the run in {self.out} was started with"
                raise InputError(name, f"{must} ({theirs.get(name)!r}), got {ours[name]!r}")
        self.network.load_state_dict(network.state_dict())
        self.optimizers.load_state_dict(state["optimizers"])
        self.origin = notes.get("init")
        if self.recipe.average:
            self.average = Average(self.network, self.recipe.average)  # from here on, where there was none
            if state.get("average"):
                self.average.load_state_dict(state["average"])
        self.rows.seek(state["rows"])
        # Of checkpoints that had no such counters.
        before = {"evaluated": state["step"], "part": EVALUATED_PARTS, "age": self.recipe.ages}
        for name in COUNTERS:
            setattr(self, name, (before | state).get(name, getattr(self, name)))
        self.saved = self.step
        # A longer budget than before is in an earlier part.
        self.part = min(self.part, int(self._progress() * EVALUATED_PARTS))
        self.age = min(self.age, ages_due(self._progress(), self.recipe.ages))

    def _warm_up(self) -> None:
        """Passes whose results are dropped: compiling must not eat the run's minutes."""
        if self.recipe.minutes:
            # One row without compiling, which is no faster than one with it; the first loads what libraries need.
            for _ in range(2):
                began = time.monotonic()
                self._drop_pass(self.network.loss_sum, 1)
            (self.row_seconds,) = self.group.agree(time.monotonic() - began)
            sizes = [size for size in range(1, self.recipe.micro_rows + 1) if self.recipe.micro_rows % size == 0]
            quick = [size for size in sizes if size * self.row_seconds <= self._step_seconds(0.0)]
            self.micro_rows = quick[-1] if quick else 1
        self._drop_pass(self.loss_sum, self.micro_rows)
        self.group.meet()  # the clock starts when all are ready

    def _drop_pass(self, loss_sum: Callable[[Tensor, Tensor], Tensor], rows: int) -> None:
        tokens_BT = torch.zeros((rows, self.recipe.row_tokens), dtype=torch.long, device=self.device)
        with self._autocast():
            loss = loss_sum(tokens_BT, tokens_BT.clone())  # an alias would be compiled for itself
        loss.backward()
        self.optimizers.zero_grad()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def _stack(self, rows: list[Any]) -> tuple[Tensor, Tensor]:
        inputs_BT, targets_BT = (torch.from_numpy(np.stack(part)).to(self.device) for part in zip(*rows, strict=True))
        return inputs_BT, targets_BT


def _fixed(recipe: dict[str, Any], data: object) -> dict[str, object]:
    """What a resume must not change: data, model, the order of the rows, the meaning of the moments."""
    chosen = {"data": data, "optimizer.name": recipe.get("optimizer", {}).get("name")}
    chosen |= {name: recipe.get(name) for name in ("seed", "row_tokens")}
    return chosen | {f"model.{name}": value for name, value in recipe.get("model", {}).items()}
