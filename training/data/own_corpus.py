"""The small corpus of our own: original stories in the public domain, at hand wherever this is installed.

Tests, notebooks, the quick start and the gate run on these, offline and without anyone's data. They are too
few to train a model worth reading; the held-out ones are for judging, and no model of ours has seen them.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from model.errors import DataError, InputError
from training.data.corpus import Story, read_stories

Split = Literal["train", "heldout", "all"]


def own_stories_folder() -> Path:
    """Where the files lie; any reader of story files takes the folder as a source."""
    return Path(str(resources.files("training"))) / "stories"


def load_own_stories(split: Split = "all") -> list[Story]:
    """The stories of one split, always in the same order.

    Raises:
        InputError: `split` is not "train", "heldout" or "all".
        DataError: a file is damaged, or a story has no title or split.
    """
    if split not in ("train", "heldout", "all"):
        raise InputError("split", f'must be "train", "heldout" or "all", got {split!r}')
    return [story for story in _all_stories() if split in ("all", story.split)]


@cache
def _all_stories() -> tuple[Story, ...]:
    stories: list[Story] = []
    for path in sorted(own_stories_folder().glob("*.jsonl")):
        for story in read_stories(path):
            if not story.title or story.split not in ("train", "heldout"):
                raise DataError(
                    f'{path}, line {story.line}: needs a "title" and the "split" train or heldout'
                )
            stories.append(story)
    return tuple(stories)
