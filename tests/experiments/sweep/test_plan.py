"""Search spaces, budgets and plans: what the files say is what recipes get, and a mistake is named with its line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.sweep.plan import (
    PARTS,
    SPACES,
    Budget,
    Plan,
    Space,
    SpaceError,
    as_overrides,
    changed,
    load_space,
    part_of,
)
from experiments.sweep.study import begin_study
from model.errors import InputError
from tests.experiments.sweep.sweeps import fake_plan
from tests.training.runs import smallest
from training.trainer.loop import EVALUATED_PARTS
from training.trainer.recipe import load_recipe, overridden

BASE = "preset: tiny\nsearch:\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_space_contains_its_base_recipe(path: Path, tmp_path: Path) -> None:
    space = load_space(path)
    plan = Plan(space=space, budget=Budget(steps=8), data="shards", digest="0" * 64, place="here")
    (first,) = begin_study(f"sqlite:///{tmp_path}/sweeps.db", "new", plan).trials
    assert changed(space.base, first.params) == space.base, "the base recipe is a sweep's first trial"
    assert Space.model_validate(json.loads(space.model_dump_json())) == space


def test_the_origin_gives_story_train_the_same_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('rows = 8\nmicro_rows = 4\n[optimizer]\nname = "adamw"\n')
    text = "recipe: mine.toml\nset: {samples: [A cat.], precision: fp32}\nsearch:\n  rows: {choices: [4, 8]}\n"
    space = load_space(written(tmp_path, text))
    assert space.base.optimizer.name == "adamw"
    option, file, *overrides = shlex.split(shlex.join(space.origin))
    assert option == "--config"
    assert load_recipe(None, Path(file), overrides) == space.base
    assert changed(space.base, {"rows": 4}).rows == 4


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (BASE + "  optimizer.matrix_lrr: {low: 0.1, high: 1.0}", 3, "optimizer.matrix_lrr is not known; allowed are"),
        (BASE + "  dropout: {low: 0.0, high: 0.1}\n  minutes: {low: 1, high: 2}", 4, "minutes is equal for all trials"),
        (BASE + "  dropout: {low: 0.2, high: 0.1}", 3, "dropout: `low <= high` must hold, but got (low=0.2, high=0.1)"),
        (BASE + "  dropout:\n    low: 0.0\n    high: 1.5", 5, "dropout must be less than 1, got 1.5"),
        (BASE + "  dropout: {low: 0.0, high: 0.1, log: true}", 3, "`low > 0` must hold for `log=True`"),
        (BASE + "  dropout: {low: 0.0, high: 0.1, step: 0.03}", 3, "step=0.03, but the range is not divisible"),
        (BASE + "  dropout: {low: 0.0}", 3, "dropout: must be {low, high, log, step} with numbers, or"),
        (BASE + "  dropout: {low: 0.0, heigh: 0.1}", 3, "dropout: must be {low, high, log, step}"),
        (BASE + "  dropout: 0.1", 3, "dropout input should be a valid dictionary"),
        (BASE + "  rows: {choices: [4]}", 3, "rows: must allow at least two different values"),
        (BASE + "  rows: {choices: [4, 6]}", 3, "micro_rows must divide rows=6"),
        (BASE + "  rows: {low: 4, high: 8.5}", 3, "rows must be a valid integer, got 8.5"),
        (BASE + "  model.pattern: {low: 1, high: 2}", 3, "pattern"),
        (BASE + "  model.pattern: {choices: [RRA, RXA]}", 3, "must be letters R and A"),
        (BASE + "  dropout: {low: 0, high: 0.1}\n  dropout: {low: 0, high: 0.2}", 4, "dropout is given twice"),
        ("preset: tinny\nsearch:\n  rows: {choices: [4, 8]}", 1, "preset must be one of"),
        ("preset: tiny\nset: {rows: 8}\nsearch:\n  rows: {choices: [4, 8]}", 2, "rows is both set and searched"),
        ("preset: tiny\nset:\n  rowz: 8\nsearch:\n  rows: {choices: [4, 8]}", 3, "rowz is not known"),
        ("preset: tiny\nsearch: {}", 2, "search dictionary should have at least 1 item"),
        ("preset: tiny\nsearch:\n  rows: {choices: [4, 8]}\nprune:\n  by: mean", 5, "by"),
        ("preset: tiny", 1, "search is missing"),
        ("- preset", 1, "must be a mapping"),
        ("preset: [", 1, "not valid YAML"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_key(text: str, line: int, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SpaceError) as caught:
        load_space(path)
    shown = str(caught.value)
    assert shown.startswith(f"{path}, line {line}")
    assert message in shown


def test_a_space_names_one_recipe(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="must name a preset or a recipe file"):
        load_space(written(tmp_path, "search:\n  rows: {choices: [4, 8]}"))
    with pytest.raises(SpaceError, match="no such file"):
        load_space(tmp_path / "nowhere.yaml")


@given(
    st.floats(1e-12, 9.9), st.floats(0, 0.99), st.integers(0, 10**6), st.booleans(), st.sampled_from(["bf16", "fp32"])
)
def test_overrides_keep_values(rate: float, dropout: float, warmup: int, compiled: bool, precision: str) -> None:
    values = {
        "optimizer.matrix_lr": rate,
        "dropout": dropout,
        "optimizer.warmup_steps": warmup,
        "compile": compiled,
        "precision": precision,
    }
    words = shlex.split(shlex.join(as_overrides(values)))
    recipe = load_recipe("tiny", overrides=words)
    assert (recipe.optimizer.matrix_lr, recipe.dropout, recipe.optimizer.warmup_steps) == (rate, dropout, warmup)
    assert (recipe.compile, recipe.precision) == (compiled, precision)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])))
def test_overrides_keep_text_as_text(text: str) -> None:
    assert overridden({}, as_overrides({"name": text}))["name"] == text


def test_trials_are_evaluated_where_the_training_loop_evaluates() -> None:
    assert PARTS == EVALUATED_PARTS


@given(st.integers(8, 2000), st.sampled_from([2, 4, 8, 16]), st.sampled_from([32, 64, 128]))
def test_trials_of_equal_steps_see_equally_many_tokens(steps: int, rows: int, row_tokens: int) -> None:
    base = smallest()
    recipe = Budget(steps=steps).given_to(smallest(rows=rows, row_tokens=row_tokens), base)
    wanted = steps * base.rows * base.row_tokens
    if recipe.steps > PARTS:
        assert abs(recipe.steps * rows * row_tokens - wanted) <= rows * row_tokens / 2
    evaluated = {part_of(recipe, step, 0.0) for step in range(0, recipe.steps, recipe.eval_every)}
    assert len(evaluated) == len(range(0, recipe.steps, recipe.eval_every)), "no two evaluations are at the same part"
    assert part_of(recipe, recipe.steps, 0.0) == PARTS


def test_a_budget_in_minutes_counts_time_only() -> None:
    recipe = Budget(minutes=2.0).given_to(smallest(steps=3, patience=2), smallest())
    assert (recipe.minutes, recipe.patience) == (2.0, 0)
    assert [part_of(recipe, 50, seconds) for seconds in (0.0, 14.9, 15.0, 119.9, 120.0, 500.0)] == [0, 0, 1, 7, 8, 8]


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
def test_an_invalid_budget_is_refused(given_: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget(**given_)  # type: ignore[arg-type]


def test_a_plan_survives_json() -> None:
    for plan in (fake_plan(), fake_plan().model_copy(update={"digest": None, "seed": 3, "place": "modal"})):
        assert Plan.model_validate(json.loads(json.dumps(plan.model_dump(mode="json")))) == plan
