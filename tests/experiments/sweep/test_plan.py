"""What a trial may use, and how far it has come."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.sweep.plan import PARTS, Budget, Plan, part_of
from model.errors import InputError
from tests.experiments.sweep.sweeps import pretended_plan
from tests.training.runs import smallest
from training.trainer.loop import EVALUATED_PARTS


def test_a_trial_is_looked_at_where_the_training_loop_looks() -> None:
    assert PARTS == EVALUATED_PARTS


@given(st.integers(8, 2000), st.sampled_from([2, 4, 8, 16]), st.sampled_from([32, 64, 128]))
def test_trials_of_equal_steps_see_equally_many_tokens(steps: int, rows: int, row_tokens: int) -> None:
    base = smallest()
    recipe = Budget(steps=steps).given_to(smallest(rows=rows, row_tokens=row_tokens), base)
    wanted = steps * base.rows * base.row_tokens
    if recipe.steps > PARTS:
        assert abs(recipe.steps * rows * row_tokens - wanted) <= rows * row_tokens / 2
    looks = {part_of(recipe, step, 0.0) for step in range(0, recipe.steps, recipe.eval_every)}
    assert len(looks) == len(range(0, recipe.steps, recipe.eval_every)), "no two looks are at the same part"
    assert part_of(recipe, recipe.steps, 0.0) == PARTS


def test_a_budget_in_minutes_is_the_clock_s_alone() -> None:
    recipe = Budget(minutes=2.0).given_to(smallest(steps=3, patience=2), smallest())
    assert (recipe.minutes, recipe.patience) == (2.0, 0)
    assert [part_of(recipe, 50, seconds) for seconds in (0.0, 14.9, 15.0, 119.9, 120.0, 500.0)] == [
        0,
        0,
        1,
        7,
        8,
        8,
    ]


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "--minutes or --steps"),
        ({"minutes": 1.0, "steps": 10}, "not both"),
        ({"minutes": 0.0}, "must be above 0"),
        ({"minutes": float("nan")}, "must be above 0"),
        ({"steps": 7}, "must be at least 8"),
    ],
)
def test_a_budget_that_is_none_is_refused(given_: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget(**given_)  # type: ignore[arg-type]


def test_a_plan_survives_the_database() -> None:
    for plan in (pretended_plan(), dataclasses.replace(pretended_plan(), digest=None, seed=3, place="modal")):
        assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
