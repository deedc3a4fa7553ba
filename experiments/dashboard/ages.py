"""The ages of a training run in the user's cache, and what one of them writes.

An age is a network of the run at one of some log-spaced steps (`training.trainer.recipe.Recipe.ages`): about 11 MB for
the network that ships. Needs neither MLflow nor PyTorch.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from model.engine.load import load_bare_engine
from model.errors import ModelError
from model.generation import Completion, GenerationRequest
from model.serving.registry import cache_folder

KEPT = 36
"""Ages that the cache keeps, of all runs: about 400 MB of the network that ships."""
WRITING_SECONDS = 60.0

_NAME = re.compile(r"[0-9a-f]{32}-[0-9]{6,}")


def cached(run: str, step: int) -> Path | None:
    """Return the folder of an age in the cache and mark it as used; None: it is not there."""
    place = _place(run, step)
    try:
        os.utime(place)
    except OSError:
        return None
    return place


def keep(run: str, step: int, download: Callable[[Path], str]) -> Path:
    """Return the folder of an age in the cache; where it is not there, move what `download` fetches to its place.

    `download` gets an empty folder for its files and returns the age's folder in it. Raises what it raises, `OSError`.
    """
    place = _place(run, step)
    if (found := cached(run, step)) is not None:
        return found
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=place.parent) as scratch:
        fetched = Path(download(Path(scratch)))
        try:
            fetched.rename(place)
        except OSError:
            if not place.is_dir():  # else another process was faster
                raise
    _remove_old(place.parent)
    return place


def continue_with(folder: Path, request: GenerationRequest) -> Completion:
    """Load the age in `folder`, let it write one story, and drop it.

    Raises `ModelError`; what cannot be loaded is removed from the cache.
    """
    try:
        engine = load_bare_engine(folder)
    except ModelError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    with engine:
        try:
            done = engine.submit(request).wait(WRITING_SECONDS)
        except TimeoutError as error:
            raise ModelError(str(error)) from None
    if done.error is not None:
        raise ModelError(done.error)
    return done


def _place(run: str, step: int) -> Path:
    return cache_folder().with_name("ages") / f"{run}-{step:06d}"


def _remove_old(ages: Path) -> None:
    """Remove the least recently used ages."""
    with contextlib.suppress(OSError):
        known = [each for each in ages.iterdir() if _NAME.fullmatch(each.name)]
        for old in sorted(known, key=lambda each: -each.stat().st_mtime)[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
