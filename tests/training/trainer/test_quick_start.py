"""Where a run starts when `story train` is notes nothing, or only a part."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from model.architecture.folder import PRETRAINED
from training.data.corpus import load_own_stories
from training.run import OWN_SHARDS, SHARDS, find_start
from training.trainer.recipe import load_recipe


def found(data: Path | None = None, **given: Any) -> tuple[tuple[Path, str | None, Path | None], str]:
    """(start, what was said) in the working directory."""
    said = io.StringIO()
    options = {"preset": None, "init": None, "recipe_given": False} | given
    return find_start(data, **options, say=Console(file=said, width=200)), said.getvalue()


def test_in_a_fresh_clone_the_shipped_model_goes_on_with_our_own_training_stories() -> None:
    start, said = found()
    assert start == (OWN_SHARDS, "own", PRETRAINED)
    assert (
        said == f"{SHARDS} is not there (`story data` makes it): the shipped model goes on with our own few stories\n"
    )
    meta = json.loads((OWN_SHARDS / "meta.json").read_text())
    assert meta["splits"]["train"]["stories"] == len(load_own_stories("train"))
    assert meta["splits"]["val"]["stories"] == len(load_own_stories("heldout"))
    assert (OWN_SHARDS / "tokenizer.json").read_bytes() == (PRETRAINED / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("given", [{"preset": "tiny"}, {"init": Path("a")}, {"recipe_given": True}])
def test_whoever_chose_a_recipe_or_a_beginning_keeps_it(given: dict[str, Any]) -> None:
    start, said = found(**given)
    assert start == (OWN_SHARDS, given.get("preset"), given.get("init"))
    assert "training on our own few stories" in said


def test_shards_that_story_data_made_are_taken_without_a_word() -> None:
    SHARDS.mkdir(parents=True)
    assert found() == ((SHARDS, None, None), "")


def test_named_data_are_taken_as_they_are() -> None:
    assert found(Path("mine"), preset="small") == ((Path("mine"), "small", None), "")
    assert not OWN_SHARDS.exists()


def test_the_recipe_goes_on_with_the_network_that_ships() -> None:
    config = json.loads((PRETRAINED / "config.json").read_text())["model"]
    recipe = load_recipe("own").model
    assert (recipe.pattern, recipe.width, recipe.mlp_width) == tuple(
        config[name] for name in ("pattern", "width", "mlp_width")
    )
