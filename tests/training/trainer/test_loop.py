"""What one run does: its steps, what it keeps of them, when it ends and what it refuses."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from model.architecture.network import StoryNetwork, load_network
from model.errors import InputError, TrainingError
from tests.training.runs import MODEL, Recorder, same_weights, smallest, train, weights
from training.data.shards import TokenShard
from training.trainer.loop import Trainer
from training.trainer.observers import EndRun, EvaluationReport
from training.trainer.optim import rate_share
from training.trainer.parallel import Group
from training.trainer.recipe import Recipe
from training.trainer.rows import IGNORED, RowStream, Validation


def test_a_run_reports_where_it_starts_each_step_each_evaluation_and_its_end(
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


# One step.


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Those of the first step, caught where the optimiser would use and then drop them."""
    caught: dict[str, torch.Tensor] = {}

    def catch() -> None:
        for name, parameter in trainer.network.named_parameters():
            assert parameter.grad is not None
            caught[name] = parameter.grad.clone()

    trainer.optimizers.step = catch  # type: ignore[method-assign]
    trainer._one_step(0.0, trainer.recipe.rows)
    return caught


@pytest.mark.parametrize("micro_rows", [1, 2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(shards: Path, tmp_path: Path, micro_rows: int) -> None:
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
    caught = gradients(Trainer(smallest(optimizer={"clip": 0.001}), data=shards, out=tmp_path / "run", observers=[]))
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


def test_bf16_gives_nearly_the_losses_of_fp32(whole: tuple[Recorder, Path], shards: Path, tmp_path: Path) -> None:
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


def test_an_observer_can_end_a_run_which_is_saved_and_can_be_resumed(shards: Path, tmp_path: Path) -> None:
    class Enough(Recorder):
        def evaluated(self, report: EvaluationReport) -> None:
            super().evaluated(report)
            raise EndRun(f"enough at {report.step}")

    recipe = smallest()
    recorder = train(recipe, shards, tmp_path / "run", Enough())
    (end,) = recorder.ends
    assert (end.outcome, end.reason) == ("stopped", "enough at 4")
    assert [report.step for report in recorder.evaluations] == [4]
    rest = train(recipe, shards, tmp_path / "run", resume=True)
    assert (rest.ends[0].outcome, rest.ends[0].step) == ("finished", recipe.steps)
    assert (train(smallest(steps=4), shards, tmp_path / "short", Enough()).ends[0].outcome) == "finished"


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


@pytest.mark.parametrize(("interrupted_at", "eval_every"), [(None, 1000), (8, 1000), (5, 5)])
def test_a_budget_of_minutes_ends_the_run_and_brings_the_rate_down(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: int | None, eval_every: int
) -> None:
    clock = Clock()
    monkeypatch.setattr("training.trainer.loop.time", clock)

    def then(step: int) -> None:
        clock.tick(step)
        if step == interrupted_at:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = smallest(steps=10_000, minutes=2.0, save_every=1000, eval_every=eval_every, eval_stories=1)
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


@pytest.mark.parametrize(("token_seconds", "stories"), [(3.2e-3, 20), (8e-3, 0), (3e-2, 0)])
def test_any_budget_of_minutes_gives_steps_enough_and_leaves_most_of_it_to_them(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token_seconds: float, stories: int
) -> None:
    """Simulated: a token takes `token_seconds` in training, and half of that in validation."""
    clock = Clock()
    monkeypatch.setattr("training.trainer.loop.time", clock)
    budget = {"steps": 100_000, "minutes": 3.0, "save_every": 1000}
    recipe = smallest(**budget, eval_every=5, eval_stories=stories)
    recorder = Recorder()
    trainer = Trainer(recipe, data=shards, out=tmp_path / "run", observers=[recorder])
    loss_sum, passes = trainer.network.loss_sum, list[tuple[int, int]]()

    def slow(inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        clock.now += inputs_BT.numel() * token_seconds * (1.0 if torch.is_grad_enabled() else 0.5)
        if torch.is_grad_enabled():
            passes.append((trainer.step, len(inputs_BT)))
        return loss_sum(inputs_BT, targets_BT)

    for owner in (trainer, trainer.network):
        monkeypatch.setattr(owner, "loss_sum", slow)
    end = trainer.run()
    assert (end.outcome, end.reason) == ("finished", "the budget is used")
    rows = Counter[int]()
    for step, count in passes[3:]:  # behind those that warm up
        rows[step] += count
    assert sum(rows.values()) * recipe.row_tokens * token_seconds >= 0.7 * 180
    assert len(recorder.steps) >= 60
    assert rows[len(recorder.steps) - 1] >= rows[0]
    assert max(rows.values()) <= recipe.rows
    if stories:  # time enough for the recipe's own rows, and for evaluations on the way
        assert set(rows.values()) == {recipe.rows}
        assert len(recorder.evaluations) > 3
    else:
        assert rows[0] < recipe.rows
    assert recorder.evaluations[-1].step == end.step


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
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path, what: str, how: Callable[[torch.Tensor], torch.Tensor]
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
        trainer.validation, "measure", lambda net: (torch.nan, torch.nan) if trainer.step == 8 else measure(net)
    )
    with pytest.raises(TrainingError, match="step 8: validation gives nan bits per byte"):
        trainer.run()
    assert [report.step for report in recorder.evaluations] == [4]
    assert recorder.ends[0].best_bits_per_byte == recorder.evaluations[0].bits_per_byte


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
