from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.architecture.folder import ModelConfig
from model.architecture.network import StoryNetwork
from model.errors import InputError, ModelError
from training.trainer.recipe import OptimizerRecipe, Recipe, load_recipe, preset_names


def parameters(preset: str) -> int:
    return StoryNetwork(load_recipe(preset).model).parameter_count()


def test_every_preset_loads_under_its_own_name() -> None:
    assert {"small", "continued", "tiny", "recurrent", "transformer"} <= set(preset_names())
    for name in preset_names():
        assert load_recipe(name).name == name


def test_the_small_preset_has_the_stated_size_and_is_what_nobody_asked_otherwise_gets() -> None:
    assert parameters("small") == pytest.approx(5.2e6, rel=0.02)
    assert load_recipe() == load_recipe("small")


@pytest.mark.parametrize(("control", "letter"), [("recurrent", "R"), ("transformer", "A")])
def test_a_control_differs_from_small_in_its_pattern_and_keeps_size_and_budget(control: str, letter: str) -> None:
    small, other = load_recipe("small"), load_recipe(control)
    assert set(other.model.pattern) == {letter}
    assert parameters(control) == pytest.approx(parameters("small"), rel=0.02)
    model = dataclasses.replace(other.model, pattern=small.model.pattern, mlp_width=small.model.mlp_width)
    assert dataclasses.replace(other, model=model, name="small") == small


def test_the_second_part_of_the_shipped_model_has_its_sizes() -> None:
    assert load_recipe("continued").model == load_recipe("small").model


def test_the_tiny_preset_is_tiny() -> None:
    assert parameters("tiny") < 50_000


@pytest.mark.parametrize("preset", preset_names())
def test_a_recipe_survives_its_dictionary_and_json(preset: str) -> None:
    recipe = load_recipe(preset, overrides=["minutes=2.5", 'samples=["A cat", "Ünal"]'])
    assert Recipe.from_dict(recipe.as_dict()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


RATES = st.floats(0, 10)


@given(
    optimizer=st.builds(
        OptimizerRecipe,
        name=st.sampled_from(["muon", "adamw"]),
        matrix_lr=RATES,
        table_lr=RATES,
        warmup_steps=st.integers(0, 1000),
        warmdown=st.floats(0, 1),
    ),
    model=st.builds(
        ModelConfig,
        width=st.integers(1, 512),
        pattern=st.text("RA", min_size=1),
        head_dim=st.integers(1, 64).map(lambda half: 2 * half),
    ),
    rows=st.integers(1, 8),
    micro=st.integers(1, 8),
    minutes=st.none() | st.floats(0.01, 1e6),
    samples=st.lists(st.text()).map(tuple),
)
def test_every_allowed_recipe_survives_its_dictionary(
    optimizer: OptimizerRecipe,
    model: ModelConfig,
    rows: int,
    micro: int,
    minutes: float | None,
    samples: tuple[str, ...],
) -> None:
    recipe = Recipe(
        optimizer=optimizer, model=model, rows=rows * micro, micro_rows=micro, minutes=minutes, samples=samples
    )
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


def test_overrides_reach_numbers_texts_tables_and_lists() -> None:
    recipe = load_recipe(
        "tiny",
        overrides=[
            "steps=7",
            "minutes=1.5",
            "eval_every=1e3",
            "dropout=.5",
            "compile=true",
            "model.pattern=AAAA",
            "optimizer.name=adamw",
            "optimizer.matrix_lr=1e-3",
            "samples=[]",
        ],
    )
    assert (recipe.steps, recipe.minutes, recipe.compile, recipe.samples) == (7, 1.5, True, ())
    assert (recipe.model.pattern, recipe.model.width) == ("AAAA", 32)
    assert (recipe.eval_every, recipe.dropout) == (1000, 0.5)
    assert (recipe.optimizer.name, recipe.optimizer.matrix_lr) == ("adamw", 0.001)
    assert load_recipe("tiny", overrides=["steps=7", "steps=8"]).steps == 8


def test_a_file_may_hold_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('steps = 5\neval_every = 1e2\n[model]\npattern = "AR"\n')
    recipe = load_recipe(config=path, overrides=["optimizer.clip=0"])
    expected = Recipe(
        name="mine", steps=5, eval_every=100, model=ModelConfig(pattern="AR"), optimizer=OptimizerRecipe(clip=0)
    )
    assert recipe == expected


BAD_VALUES: list[tuple[str, Any]] = [
    *[(name, bad) for name in ("row_tokens", "rows", "micro_rows", "steps") for bad in (0, -3, 1.5, True, "x")],
    *[(name, 0) for name in ("eval_every", "save_every")],
    *[(name, bad) for name in ("eval_stories", "patience", "seed", "ages") for bad in (-1, 2.0, False, "x")],
    ("ages", 101),
    ("row_tokens", 7),
    ("micro_rows", 3),
    ("minutes", 0),
    ("minutes", -1.0),
    ("minutes", float("nan")),
    ("minutes", float("inf")),
    ("minutes", "ten"),
    ("minutes", True),
    ("precision", "fp16"),
    ("precision", 16),
    ("compile", "yes"),
    ("compile", 1),
    ("name", ""),
    ("name", 5),
    ("samples", "Once"),
    ("samples", 1),
    ("model", 5),
    ("optimizer", "muon"),
    ("optimizer.name", "sgd"),
    ("optimizer.name", ["muon"]),
    ("optimizer.warmup_steps", 1.5),
    ("optimizer.warmup_steps", -1),
    ("optimizer.momentum", 1),
    ("optimizer.beta2", 1.0),
    *[
        (f"optimizer.{field.name}", bad)
        for field in dataclasses.fields(OptimizerRecipe)
        if field.name not in ("name", "warmup_steps")
        for bad in (-0.1, float("nan"), float("inf"), "x", True, None)
    ],
]


@pytest.mark.parametrize(("name", "bad"), BAD_VALUES, ids=lambda value: repr(value)[:30])
def test_a_bad_value_gives_one_line_that_names_it(name: str, bad: Any) -> None:
    values = load_recipe("tiny").as_dict()
    target = values
    *tables, last = name.split(".")
    for table in tables:
        target = target[table]
    target[last] = bad
    with pytest.raises(InputError) as caught:
        Recipe.from_dict(values)
    message = str(caught.value)
    assert caught.value.param == name
    assert message.startswith(f"{name} must ")
    assert "\n" not in message
    assert repr(bad) in message


def test_samples_must_all_be_texts() -> None:
    with pytest.raises(InputError, match=r"^samples\.1 must be a valid string, got 1$"):
        Recipe.from_dict({"samples": ["Once", 1]})


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("width", 0),
        ("heads", 1.5),
        ("pattern", ""),
        ("pattern", "RAX"),
        ("pattern", 7),
        ("head_dim", 15),
        ("rope_base", "x"),
        ("rope_base", 0),
        ("chunk", True),
    ],
)
def test_a_bad_size_of_the_model_is_named_too(name: str, bad: Any) -> None:
    values = load_recipe("tiny").as_dict()
    values["model"][name] = bad
    with pytest.raises(InputError, match=rf"model\.{name} must ") as caught:
        Recipe.from_dict(values)
    assert "\n" not in str(caught.value)
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stepz=3"], "stepz is not known; allowed are name, seed, model"),
        (["optimizer.lr=3"], "optimizer.lr is not known; allowed are name, matrix_lr"),
        (["model.depth=3"], "model.depth is not known; allowed are chunk"),
        (["steps"], "override must be name=value"),
        (["=3"], "override must be name=value"),
        (["steps.x=3"], "steps.x is not a table in this recipe"),
        (["steps="], "steps must be a valid integer, got ''"),
        (["steps=1000.0"], "steps must be a valid integer, got 1000.0"),
        (["name=2020-02-02"], "name must be a valid string"),
    ],
)
def test_a_bad_override_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("tiny", overrides=overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_says_which_there_are() -> None:
    with pytest.raises(
        InputError,
        match=r"preset must be one of continued, copying, copying_continued, gpu-25min, own, .*transformer, got 'big'",
    ):
        load_recipe("big")


def test_a_preset_and_a_file_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="preset and config cannot both be given"):
        load_recipe("tiny", tmp_path / "x.toml")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"steps = = 3", "is not valid TOML"), (b"steps = \xff", "cannot be read")],
)
def test_an_unusable_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_recipe(config=path)
    assert str(caught.value).startswith(f"config {path} {message}")
    assert "\n" not in str(caught.value)


def test_a_recipe_cannot_be_changed_behind_its_checks() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe("tiny").steps = 0  # type: ignore[misc]


def test_a_model_alone_reports_as_a_model() -> None:
    with pytest.raises(ModelError, match=r"model\.pattern must be letters R and A"):
        ModelConfig(pattern="")
