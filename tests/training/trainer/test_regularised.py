"""Dropout and averaged weights, inside a run: what is dropped, what is judged and kept, and the same promises."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from model.architecture.network import load_network
from model.errors import InputError, TrainingError
from tests.training.runs import REGULARISED, Recorder, same_weights, smallest, train, weights
from training.data.shards import TokenShard
from training.trainer.loop import Trainer
from training.trainer.parallel import Group
from training.trainer.rows import Validation

RUN = smallest(**REGULARISED)


@pytest.fixture(scope="module")
def regularised(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, Path]:
    """The smallest run with both, disturbed by nobody; to be read only."""
    out = tmp_path_factory.mktemp("regularised") / "run"
    return train(RUN, shards, out), out


def stop_at(trainer: Trainer, at: set[int], step: int) -> None:
    if step in at:
        trainer._stop.set()


@pytest.mark.parametrize("at", [{5}, {4, 12}, {1, 2, 3, 8, 11}])
def test_an_interrupted_and_resumed_run_is_the_same_bit_for_bit(
    regularised: tuple[Recorder, Path], shards: Path, tmp_path: Path, at: set[int]
) -> None:
    expected, expected_out = regularised
    recorder, out = Recorder(), tmp_path / "run"
    while not recorder.ends or recorder.ends[-1].outcome == "stopped":
        torch.manual_seed(len(recorder.ends))  # whatever others have thrown in between
        resume = bool(recorder.ends)
        trainer = Trainer(RUN, data=shards, out=out, observers=[recorder], resume=resume)
        recorder.then = partial(stop_at, trainer, at)
        trainer.run()
    assert len(recorder.ends) == len(at) + 1
    assert recorder.losses == expected.losses
    bits = [report.bits_per_byte for report in recorder.evaluations]
    assert bits == [report.bits_per_byte for report in expected.evaluations]
    for name in ("last", "best"):
        assert same_weights(out / name, expected_out / name)


def test_each_step_drops_something_else_and_each_pass_of_a_step_too(shards: Path, tmp_path: Path) -> None:
    still = {"matrix_lr": 0.0, "table_lr": 0.0, "vector_lr": 0.0}
    recipe = smallest(dropout=0.3, optimizer=still)
    trainer = Trainer(recipe, data=shards, out=tmp_path / "run")
    trainer.network.load_state_dict(load_network_of_training(shards, tmp_path))
    row = trainer._stack([next(trainer.rows)] * 2)
    losses = []
    for step, index in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        trainer.step = step
        trainer._seed_pass(index)
        losses.append(float(trainer.loss_sum(*row).detach()))
    assert len(set(losses)) == 4
    trainer._seed_pass(1)
    assert float(trainer.loss_sum(*row).detach()) == losses[-1], "the same step throws the same rng"


def load_network_of_training(shards: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Weights that have learned a little: new ones have branches of zeros, of which nothing can be dropped."""
    train(smallest(steps=4), shards, tmp_path / "learned")
    return weights(tmp_path / "learned" / "last")


def test_dropout_is_of_training_alone(shards: Path, tmp_path: Path) -> None:
    train(smallest(steps=4), shards, tmp_path / "plain")
    trainer = Trainer(smallest(dropout=0.5), data=shards, out=tmp_path / "run", init=tmp_path / "plain" / "last")
    trainer._evaluate()
    plain = load_network(tmp_path / "plain" / "last")
    assert trainer.best == trainer.validation.measure(plain)[1]
    assert trainer.network.training, "behind an evaluation it drops again"


def test_what_is_judged_and_kept_as_the_best_is_the_average(regularised: tuple[Recorder, Path], shards: Path) -> None:
    recorder, out = regularised
    tokenizer = Tokenizer.from_file(str(shards / "tokenizer.json"))
    validation = Validation(TokenShard(shards, "val"), tokenizer, 3, Group())
    assert [report.best for report in recorder.evaluations] == [True] * 3, "the last one is the best"
    assert validation.measure(load_network(out / "best"))[1] == recorder.evaluations[-1].bits_per_byte
    state = torch.load(out / "last" / "trainer.pt", weights_only=True)
    averaged = dict(zip(dict(load_network(out / "best").named_parameters()), state["average"]["values"], strict=True))
    for name, value in weights(out / "best").items():
        assert torch.equal(value, averaged[name])
    assert not same_weights(out / "best", out / "last")


def test_an_average_changes_what_is_kept_and_not_how_the_run_goes(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    recorder = train(smallest(average=0.8), shards, tmp_path / "run")
    assert recorder.losses == whole[0].losses
    assert same_weights(tmp_path / "run" / "last", whole[1] / "last")
    assert not same_weights(tmp_path / "run" / "best", whole[1] / "best")


def test_a_resume_can_begin_to_average_and_cease_to(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    plain = train(smallest(steps=4), shards, out)
    begun = train(smallest(steps=4, average=0.9), shards, out, resume=True)
    assert begun.ends[0].best_bits_per_byte == plain.ends[0].best_bits_per_byte
    first = Trainer(smallest(steps=8, average=0.9), data=shards, out=out, resume=True)
    assert first.average is not None
    for value, parameter in zip(first.average.values, first.network.parameters(), strict=True):
        assert torch.equal(value, parameter), "where the run kept none so far, it begins with the present weights"
    first.run()
    ceased = train(smallest(steps=12), shards, out, resume=True)
    assert [report.step for report in ceased.steps] == [9, 10, 11, 12]
    assert torch.load(out / "last" / "trainer.pt", weights_only=True)["average"] is None


def test_a_loss_that_is_not_finite_leaves_the_average_as_it_was(
    regularised: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    trainer = Trainer(RUN, data=shards, out=tmp_path / "run", observers=[recorder := Recorder()])
    assert trainer.average is not None
    loss_sum = trainer.loss_sum
    kept: list[torch.Tensor] = []

    def spoiled(*rows: torch.Tensor) -> torch.Tensor:
        # A network whose every layer is normed does not overflow when a test asks.
        if trainer.step < 5:
            return loss_sum(*rows)
        kept[:] = [value.clone() for value in trainer.average.values] if trainer.average else []
        return loss_sum(*rows) * torch.nan

    trainer.loss_sum = spoiled  # type: ignore[assignment]
    with pytest.raises(TrainingError, match="step 6: loss nan"):
        trainer.run()
    assert all(torch.equal(*pair) for pair in zip(trainer.average.values, kept, strict=True))
    resumed = train(RUN, shards, tmp_path / "run", resume=True)
    assert recorder.losses | resumed.losses == regularised[0].losses
    assert same_weights(tmp_path / "run" / "best", regularised[1] / "best")


@pytest.mark.parametrize("name", ["dropout", "replace", "average"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), True, "much"])
def test_a_share_that_is_none_is_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^{name} must be .*, got {value!r}$"):
        smallest(**{name: value})


def test_replaced_tokens_are_a_share_of_the_inputs_and_never_story_ends(shards: Path, tmp_path: Path) -> None:
    trainer = Trainer(smallest(replace=0.5), data=shards, out=tmp_path / "run")
    inputs_BT = torch.cat([torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 500, dtype=torch.long)], dim=1)
    for share in (0.0, 0.25, 0.5):
        replaced_BT = trainer._with_replacements(inputs_BT, share)
        assert (replaced_BT[:, 0] == 0).all(), "the end of a story stays"
        assert (replaced_BT[:, 1:] > 0).all(), "and none is added"
        assert float((replaced_BT != inputs_BT).double().mean()) == pytest.approx(share, abs=0.05)
