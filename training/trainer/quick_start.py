"""Where `story train` starts when it is told nothing: in a fresh clone too, offline and without anyone's data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from model.architecture.folder import PRETRAINED
from training.data.own_corpus import own_stories_folder
from training.data.prepare import PrepareOptions, prepare

SHARDS = Path("data/tinystories")
"""What `story data` makes, without --out."""
OWN_SHARDS = Path("data/own")
OWN_RECIPE = "own"


@dataclass(frozen=True, slots=True)
class Start:
    """What a run begins with."""

    data: Path
    preset: str | None
    init: Path | None


def find_start(
    data: Path | None, *, preset: str | None, init: Path | None, recipe_given: bool, say: Console
) -> Start:
    """Fill in what was not said.

    The data are `data/tinystories` where `story data` has made it; otherwise the stories that ship with the project,
    whose shards this makes. They are too few to learn to write from, so unless a recipe or a beginning was chosen
    (`recipe_given`: by a file, or a resumed run's own), the shipped model goes on with them.

    Raises:
        DataError: the project's own stories are damaged, or the shards cannot be written.
    """
    if data is not None:
        return Start(data, preset, init)
    if SHARDS.is_dir():
        return Start(SHARDS, preset, init)
    tokenizer = PRETRAINED / "tokenizer.json"
    prepare(PrepareOptions(sources=(own_stories_folder(),), out=OWN_SHARDS, tokenizer=tokenizer), None)
    if recipe_given or preset is not None or init is not None:
        say.print(
            f"{SHARDS} is not there (`story data` makes it): training on our own few stories", soft_wrap=True
        )
        return Start(OWN_SHARDS, preset, init)
    say.print(
        f"{SHARDS} is not there (`story data` makes it): the shipped model goes on with our own few stories",
        soft_wrap=True,
    )
    return Start(OWN_SHARDS, OWN_RECIPE, PRETRAINED)
