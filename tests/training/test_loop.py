"""A run against itself: interrupted, killed, cut into other pieces, it must give the same numbers."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from model.checkpoint import load_network
from model.errors import InputError, ModelError, TrainingError
from model.network import StoryNetwork
from tests.training.runs import (
    MODEL,
    Recorder,
    read_journal,
    same_weights,
    smallest,
    train,
    train_elsewhere,
    weights,
)
from training.checkpoint import find_checkpoint
from training.loop import Trainer
from training.optim import rate_share
from training.parallel import Group
from training.recipe import Recipe
from training.report import EvaluationReport
from training.rows import IGNORED, RowStream
from training.shards import TokenShard
from training.validation import Validation


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, Path]:
    """The run that nobody disturbed, and its folder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(smallest(), shards, out), out


def figures(evaluations: list[EvaluationReport]) -> list[tuple[int, float, bool]]:
    return [(report.step, report.bits_per_byte, report.best) for report in evaluations]


def assert_same_run(recorder: Recorder, out: Path, whole: tuple[Recorder, Path]) -> None:
    expected, expected_out = whole
    assert recorder.losses == expected.losses
    assert figures(recorder.evaluations) == figures(expected.evaluations)
    assert recorder.ends[-1].tokens == expected.ends[-1].tokens
    assert recorder.ends[-1].best_bits_per_byte == expected.ends[-1].best_bits_per_byte
    for name in ("last", "best"):
        assert same_weights(out / name, expected_out / name)


def interrupting(number: signal.Signals, at: set[int]) -> Recorder:
    """A recorder that sends this process a real signal after some steps."""
    return Recorder(then=lambda step: os.kill(os.getpid(), number) if step in at else None)


def test_a_run_tells_where_it_starts_each_step_each_evaluation_and_its_end(
    whole: tuple[Recorder, Path], shards: Path
) -> None:
    recorder, out = whole
    (start,), (end,) = recorder.starts, recorder.ends
    assert start.recipe == smallest().as_dict()
    assert start.parameters == sum(parameter.numel() for parameter in StoryNetwork(MODEL).parameters())
    assert (start.data_folder, start.out, start.world_size, start.resumed_from) == (shards, out, 1, 0)
    assert [report.step for report in recorder.steps] == list(range(1, 13))
    assert [report.step for report in recorder.evaluations] == [4, 8, 12]
    assert (end.outcome, end.reason, end.step) == ("finished", "the budget is used", 12)
    assert end.checkpoint == out / "best"
    stream = RowStream(TokenShard(shards, "train"), 64, 0)
    counts = [sum(int((targets != IGNORED).sum()) for _, targets in islice(stream, 4)) for _ in range(12)]
    assert [report.tokens for report in recorder.steps] == np.cumsum(counts).tolist()
    assert [report.progress for report in recorder.steps] == [step / 12 for step in range(12)]
    elapsed = [report.elapsed for report in recorder.steps]
    assert elapsed == sorted(elapsed)


@pytest.mark.parametrize(
    ("number", "at"),
    [
        (signal.SIGINT, {5}),  # between a checkpoint and an evaluation
        (signal.SIGTERM, {4, 12}),  # where an evaluation is due, and behind the last step
        (signal.SIGINT, {1, 2, 3, 8, 11}),
    ],
)
def test_an_interrupted_and_resumed_run_is_the_same_bit_for_bit(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path, number: signal.Signals, at: set[int]
) -> None:
    out = tmp_path / "run"
    recorder = interrupting(number, at)
    train(smallest(), shards, out, recorder)
    while recorder.ends[-1].outcome == "stopped":
        train(smallest(), shards, out, recorder, resume=True)
    assert [end.outcome for end in recorder.ends] == ["stopped"] * len(at) + ["finished"]
    assert [start.resumed_from for start in recorder.starts] == [0, *sorted(at)]
    assert [report.step for report in recorder.steps] == list(range(1, 13)), "no step is done twice"
    assert_same_run(recorder, out, whole)


def test_signals_mean_again_what_they_meant_before(shards: Path, tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    train(smallest(steps=1), shards, tmp_path / "run")
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_finished_run_has_nothing_to_resume_and_can_be_given_more_steps(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[1], out)
    again = train(smallest(), shards, out, resume=True)
    assert (again.steps, again.evaluations) == ([], [])
    assert (again.ends[0].outcome, again.ends[0].step) == ("finished", 12)
    more = train(smallest(steps=14), shards, out, resume=True)
    assert [report.step for report in more.steps] == [13, 14]
    assert [report.step for report in more.evaluations] == [14]


# Processes of their own. The fork server imports torch once, so that each of them starts in a moment.


@pytest.fixture(scope="module")
def processes(repository: Path) -> Iterator[ForkServerContext]:
    context = multiprocessing.get_context("forkserver")
    # Optimisers import torch._dynamo at their first step, which takes longer than all steps here.
    context.set_forkserver_preload(["tests.training.runs", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(repository))
        patch.chdir(repository)
        yield context


class Elsewhere:
    """A run in another process, seen through its files."""

    def __init__(self, context: ForkServerContext, data: Path, out: Path) -> None:
        self.context, self.data, self.out = context, data, out
        self.journal = out.with_name("journal")
        self.process: ForkServerProcess | None = None

    def start(self, recipe: Recipe, *, resume: bool) -> ForkServerProcess:
        args = (recipe.as_dict(), self.data, self.out, self.journal, resume)
        self.process = self.context.Process(target=train_elsewhere, args=args, daemon=True)
        self.process.start()
        return self.process

    def wait_for_step(self, step: int, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while max([0, *(done for done, _ in read_journal(self.journal))]) < step:
            assert time.monotonic() < deadline, "the run does not get on"
            assert self.process is not None
            assert self.process.is_alive(), f"it ended with {self.process.exitcode}"
            time.sleep(0.002)

    def losses(self) -> dict[int, float]:
        losses: dict[int, float] = {}
        for step, loss in read_journal(self.journal):
            assert losses.setdefault(step, loss) == loss, f"step {step} was done again with another loss"
        return losses


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_another_process_that_is_interrupted_saves_and_ends_well(
    processes: ForkServerContext, whole: tuple[Recorder, Path], shards: Path, tmp_path: Path, number: int
) -> None:
    run = Elsewhere(processes, shards, tmp_path / "run")
    process = run.start(smallest(), resume=False)
    run.wait_for_step(2)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0
    done = len(run.losses())
    recorder = train(smallest(), shards, run.out, resume=True)
    assert recorder.starts[0].resumed_from == done < 12
    assert run.losses() | recorder.losses == whole[0].losses
    assert same_weights(run.out / "last", whole[1] / "last")


def test_a_run_killed_at_random_moments_can_always_be_resumed_to_the_same_weights(
    processes: ForkServerContext, whole: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    # Saving after every step, so that most kills fall into the writing of a checkpoint.
    recipe = smallest(save_every=1)
    run = Elsewhere(processes, shards, tmp_path / "run")
    dice = random.Random(0)
    for kill, step in enumerate((1, 3, 5, 8, 10)):
        process = run.start(recipe, resume=kill > 0)
        run.wait_for_step(step)
        time.sleep(dice.uniform(0.0, 0.03))
        process.kill()
        process.join(60)
        assert find_checkpoint(run.out / "last") is not None
    train(recipe, shards, run.out, recorder := Recorder(), resume=True)
    assert run.losses() | recorder.losses == whole[0].losses
    assert same_weights(run.out / "last", whole[1] / "last")
    assert same_weights(run.out / "best", whole[1] / "best")


def test_a_run_killed_before_its_first_step_can_be_resumed(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    def killed(step: int) -> None:
        raise KeyboardInterrupt  # anything that no code expects here

    with pytest.raises(KeyboardInterrupt):
        train(smallest(), shards, tmp_path / "run", recorder := Recorder(then=killed))
    assert (recorder.ends[0].outcome, recorder.ends[0].reason) == ("failed", "an unexpected error")
    resumed = train(smallest(), shards, tmp_path / "run", resume=True)
    assert_same_run(resumed, tmp_path / "run", whole)


# One step.


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Those of the first step, caught where the optimiser would use and then drop them."""
    caught: dict[str, torch.Tensor] = {}

    def catch() -> None:
        for name, parameter in trainer.network.named_parameters():
            assert parameter.grad is not None
            caught[name] = parameter.grad.clone()

    trainer.optimizers.step = catch  # type: ignore[method-assign]
    trainer._one_step(0.0)
    return caught


@pytest.mark.parametrize("micro_rows", [1, 2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    shards: Path, tmp_path: Path, micro_rows: int
) -> None:
    recipe = smallest(micro_rows=micro_rows, optimizer={"clip": 0.0})
    trainer = Trainer(recipe, data=shards, out=tmp_path / "run", observers=[recorder := Recorder()])
    torch.manual_seed(recipe.seed)
    network = StoryNetwork(MODEL)
    rows = list(islice(RowStream(TokenShard(shards, "train"), 64, recipe.seed), recipe.rows))
    inputs_BT, targets_BT = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    loss = network.loss_sum(inputs_BT, targets_BT) / int((targets_BT != IGNORED).sum())
    loss.backward()
    assert recorder.steps == []
    caught = gradients(trainer)
    assert recorder.steps[0].loss == pytest.approx(float(loss.detach()), rel=1e-6)
    squares = 0.0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(caught[name], parameter.grad, rtol=1e-5, atol=1e-7)
        squares += float(parameter.grad.double().square().sum())
    assert recorder.steps[0].grad_norm == pytest.approx(squares**0.5, rel=1e-5)


def test_gradients_are_clipped_to_the_bound(shards: Path, tmp_path: Path) -> None:
    caught = gradients(
        Trainer(smallest(optimizer={"clip": 0.001}), data=shards, out=tmp_path / "run", observers=[])
    )
    norm = sum(float(gradient.double().square().sum()) for gradient in caught.values()) ** 0.5
    assert norm == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_loss_falls_on_a_small_corpus(shards: Path, tmp_path: Path, optimizer: str) -> None:
    recipe = smallest(steps=24, eval_every=12, save_every=24, optimizer={"name": optimizer})
    recorder = train(recipe, shards, tmp_path / "run")
    losses = [report.loss for report in recorder.steps]
    assert losses[0] == pytest.approx(np.log(512), rel=0.05), "an untrained network knows nothing"
    assert np.mean(losses[-4:]) < 0.9 * losses[0]
    bits = [report.bits_per_byte for report in recorder.evaluations]
    assert bits == sorted(bits, reverse=True)


def test_bf16_gives_nearly_the_losses_of_fp32(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    recorder = train(smallest(steps=4, precision="bf16"), shards, tmp_path / "run")
    exact = [whole[0].losses[step] for step in range(1, 5)]
    losses = list(recorder.losses.values())
    assert losses == pytest.approx(exact, rel=0.01)
    assert losses != exact
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run" / "last").values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch 2.13's compiler warns of itself
def test_a_compiled_run_gives_the_losses_of_a_plain_one(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    compiled = train(smallest(steps=12, compile=True), shards, tmp_path / "run")
    assert list(compiled.losses.values()) == pytest.approx(list(whole[0].losses.values()), rel=1e-4)
    assert compiled.ends[0].best_bits_per_byte == pytest.approx(whole[0].ends[0].best_bits_per_byte, rel=1e-4)


# What is kept, and when it ends.


def test_the_best_checkpoint_is_the_one_with_the_lowest_bits_per_byte(shards: Path, tmp_path: Path) -> None:
    # Without a warm-down, and so fast that the network gets worse again.
    rates = {"matrix_lr": 1.0, "table_lr": 1.0, "vector_lr": 1.0, "warmdown": 0.0, "warmup_steps": 20}
    recorder = train(smallest(steps=10, eval_every=2, optimizer=rates), shards, tmp_path / "run")
    bits = {report.step: report.bits_per_byte for report in recorder.evaluations}
    best = min(bits, key=lambda step: bits[step])
    assert min(bits) < best < max(bits), "the case is one in which it matters"
    lowest = np.minimum.accumulate(list(bits.values())).tolist()
    assert [report.best for report in recorder.evaluations] == [
        index == 0 or value < lowest[index - 1] for index, value in enumerate(bits.values())
    ]
    assert recorder.ends[0].best_bits_per_byte == bits[best]
    tokenizer = Tokenizer.from_file(str(shards / "tokenizer.json"))
    validation = Validation(TokenShard(shards, "val"), tokenizer, 3, Group())
    kept = recorder.ends[0].checkpoint
    assert kept is not None
    assert validation.measure(load_network(kept))[1] == bits[best]
    assert validation.measure(load_network(tmp_path / "run" / "last"))[1] == bits[10]


def test_a_run_that_gets_no_better_stops_early_and_stays_stopped(shards: Path, tmp_path: Path) -> None:
    still = {"matrix_lr": 0.0, "table_lr": 0.0, "vector_lr": 0.0}
    recipe = smallest(steps=50, eval_every=2, patience=3, optimizer=still)
    recorder = train(recipe, shards, tmp_path / "run")
    end = recorder.ends[0]
    assert (end.outcome, end.step) == ("finished", 8)
    assert end.reason == "no better validation in 3 evaluations"
    assert [report.best for report in recorder.evaluations] == [True, False, False, False]
    again = train(recipe, shards, tmp_path / "run", resume=True)
    assert (again.steps, again.ends[0].reason) == ([], end.reason)


class Clock:
    """Stands for `time` in the loop, so that a budget of minutes does not depend on this machine's speed."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def tick(self, step: int) -> None:
        self.now += 6.0


@pytest.mark.parametrize("interrupted_at", [None, 7])
def test_a_budget_of_minutes_ends_the_run_and_brings_the_rate_down(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: int | None
) -> None:
    clock = Clock()
    monkeypatch.setattr("training.loop.time", clock)

    def then(step: int) -> None:
        clock.tick(step)
        if step == interrupted_at:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = smallest(steps=10_000, minutes=2.0, save_every=1000, eval_every=1000)
    recorder = train(recipe, shards, tmp_path / "run", Recorder(then))
    if interrupted_at:
        assert recorder.ends[0].outcome == "stopped"
        clock.now += 3600  # what passes between a stop and a resume is not the run's
        train(recipe, shards, tmp_path / "run", recorder, resume=True)
    end = recorder.ends[-1]
    assert (end.outcome, end.reason, end.step) == ("finished", "the budget is used", 20)
    assert [report.progress for report in recorder.steps] == pytest.approx([step / 20 for step in range(20)])
    # At each eighth of the budget, so that a run of any length shows a curve, and at its end.
    assert [report.step for report in recorder.evaluations] == [3, 5, 8, 10, 13, 15, 18, 20]
    peak = recipe.optimizer.matrix_lr
    shape = [peak * rate_share(recipe.optimizer, step, step / 20) for step in range(20)]
    assert [report.learning_rate for report in recorder.steps] == pytest.approx(shape)
    assert recorder.steps[-1].learning_rate < 0.1 * peak


# What must not be.


def break_at(trainer: Trainer, step: int, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Spoil the loss of one step. A network whose every layer is normed does not overflow when a test asks."""
    loss_sum = trainer.loss_sum

    def spoiled(*rows: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = loss_sum(*rows)
        return how(loss) if trainer.step + 1 == step else loss

    trainer.loss_sum = spoiled  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("loss nan, gradient norm nan", lambda loss: loss * torch.nan),
        ("loss inf", lambda loss: loss + torch.inf),
        (r"loss \d\.\d+, gradient norm (nan|inf)", lambda loss: loss + (loss - loss).sqrt()),
    ],
    ids=["loss nan", "loss inf", "only the gradient"],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_weights_change(
    whole: tuple[Recorder, Path],
    shards: Path,
    tmp_path: Path,
    what: str,
    how: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    out, recorder = tmp_path / "run", Recorder()
    trainer = Trainer(smallest(), data=shards, out=out, observers=[recorder])
    before: dict[str, torch.Tensor] = {}

    def then(step: int) -> None:
        if step == 5:
            before.update({name: value.clone() for name, value in trainer.network.state_dict().items()})

    recorder.then = then
    break_at(trainer, 6, how)
    with pytest.raises(TrainingError, match=rf"^step 6: {what}") as caught:
        trainer.run()
    assert "The last good checkpoint (step 4) is kept" in str(caught.value)
    after = trainer.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    end = recorder.ends[0]
    assert (end.outcome, end.reason, end.step) == ("failed", str(caught.value), 5)
    assert end.checkpoint == out / "best"
    assert set(recorder.losses) == {1, 2, 3, 4, 5}
    # What is kept is good: it goes on to where an undisturbed run comes.
    resumed = train(smallest(), shards, out, resume=True)
    assert resumed.starts[0].resumed_from == 4
    assert recorder.losses | resumed.losses == whole[0].losses
    assert same_weights(out / "last", whole[1] / "last")


def test_a_validation_that_is_not_finite_stops_and_never_counts_as_the_best(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(smallest(), data=shards, out=tmp_path / "run", observers=[recorder := Recorder()])
    measure = trainer.validation.measure
    # Spoiled for the reason given in `break_at`.
    monkeypatch.setattr(
        trainer.validation,
        "measure",
        lambda net: (torch.nan, torch.nan) if trainer.step == 8 else measure(net),
    )
    with pytest.raises(TrainingError, match="step 8: validation gives nan bits per byte"):
        trainer.run()
    assert [report.step for report in recorder.evaluations] == [4]
    assert recorder.ends[0].best_bits_per_byte == recorder.evaluations[0].bits_per_byte


def test_a_folder_with_a_run_is_refused_without_resume(whole: tuple[Recorder, Path], shards: Path) -> None:
    _, out = whole
    before = weights(out / "last")
    with pytest.raises(InputError, match=r"out already holds a run .* --resume continues it"):
        train(smallest(seed=5), shards, out)
    after = weights(out / "last")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_resume_without_a_run_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no run to resume"):
        train(smallest(), shards, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("seed", {"seed": 1}),
        ("row_tokens", {"row_tokens": 96}),
        ("optimizer.name", {"optimizer": {"name": "adamw"}}),
        ("model.pattern", {"model": {"pattern": "AR"}}),
        ("model.mlp_width", {"model": {"mlp_width": 64}}),
        ("model.window", {"model": {"window": 32}}),  # the same weights would fit
    ],
)
def test_a_resume_refuses_another_model_or_other_rows(
    whole: tuple[Recorder, Path], shards: Path, name: str, changes: dict[str, Any]
) -> None:
    if "model" in changes:
        values = smallest().as_dict()
        changes = {"model": Recipe.from_dict(values | {"model": values["model"] | changes["model"]}).model}
    with pytest.raises(InputError, match=rf"^{name} must stay what the run in ") as caught:
        train(smallest(**changes), shards, whole[1], resume=True)
    assert "\n" not in str(caught.value)


def test_a_resume_refuses_other_data(whole: tuple[Recorder, Path], shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    meta = (other / "meta.json").read_text()
    digest = Trainer(smallest(), data=shards, out=tmp_path / "x").meta["digest"]
    (other / "meta.json").write_text(meta.replace(digest, "f" * 64))
    with pytest.raises(InputError, match=rf"^data must stay .* \('{digest}'\), got 'ffff"):
        train(smallest(), other, whole[1], resume=True)


def test_a_vocabulary_that_is_not_the_data_s_is_refused(shards: Path, tmp_path: Path) -> None:
    values = smallest().as_dict()
    values["model"]["vocab_size"] = 600
    with pytest.raises(InputError, match=r"model.vocab_size must equal the data's 512 .*, got 600"):
        train(Recipe.from_dict(values), shards, tmp_path / "run")


def test_rows_that_cannot_be_shared_by_the_processes_are_refused(shards: Path, tmp_path: Path) -> None:
    group = Group()
    group.size = 4  # as in one of four processes; it is refused before they would talk
    with pytest.raises(InputError, match=r"rows must be a multiple of micro_rows x processes = 2 x 4, got 4"):
        Trainer(smallest(), data=shards, out=tmp_path / "run", group=group)
