"""A run that was interrupted, killed or extended goes on to the numbers of one that nobody disturbed."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import InputError, ModelError
from tests.training.runs import Recorder, read_journal, same_weights, smallest, train, train_elsewhere, weights
from training.trainer.checkpoint import find_checkpoint
from training.trainer.loop import Trainer
from training.trainer.observers import EvaluationReport
from training.trainer.recipe import Recipe


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
    rng = random.Random(0)
    for kill, step in enumerate((1, 3, 5, 8, 10)):
        process = run.start(recipe, resume=kill > 0)
        run.wait_for_step(step)
        time.sleep(rng.uniform(0.0, 0.03))
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


# What a resume must not do.


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
