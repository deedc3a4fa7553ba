"""What `story train` does around the loop: which recipe a resumed run goes on with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from model.errors import InputError, ModelError
from tests.training.runs import smallest
from training.run import resumed_recipe
from training.run import train as run_training


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a recipe that no preset has, with a budget in minutes."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_training(smallest(steps=4, minutes=5.0), data=shards, out=out, track=False)
    return out


def test_a_resumed_run_goes_on_with_its_own_recipe_and_the_overrides_of_today(finished: Path) -> None:
    assert resumed_recipe(finished, []) == smallest(steps=4, minutes=5.0)
    assert resumed_recipe(finished, ["steps=6", "optimizer.clip=0.5"]) == smallest(
        steps=6, minutes=5.0, optimizer={"clip": 0.5}
    )


def test_a_run_is_resumed_for_more_steps_without_giving_its_recipe_again(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    result = run_training(resumed_recipe(out, ["steps=6"]), data=shards, out=out, resume=True, track=False)
    assert (result.outcome, result.step) == ("finished", 6)
    assert resumed_recipe(out, []).steps == 6  # the run's own from now on


def test_there_is_no_recipe_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no run to resume"):
        resumed_recipe(tmp_path, [])


def test_a_bad_override_of_a_resumed_run_is_named(finished: Path) -> None:
    with pytest.raises(InputError, match="is not known"):
        resumed_recipe(finished, ["stepz=6"])
