"""Which model is judged and measured when none is named: the one on trial.

So that `story register && story evaluate && story benchmark && story gate` speak of the same artifact.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from model.settings import Settings


def challenger_name(settings: Settings) -> str | None:
    """`models:/story-writer/N` of the store's challenger. None: there is none, or the settings name a model.

    Looks, and makes nothing: a store that is not there yet is not made for it. Raises `InputError` when the store that
    the settings name cannot be used.
    """
    if settings.story_model is not None or find_spec("mlflow") is None:
        return None
    from training.tracking.store import database_file

    uri = settings.mlflow_tracking_uri
    database = database_file(uri)
    if database is not None and not database.is_file():
        return None
    from experiments.registry.versions import CHALLENGER, NAME, versions

    for version in versions(uri):
        if CHALLENGER in version.aliases:
            return f"models:/{NAME}/{version.number}"
    return None


@contextlib.contextmanager
def model_to_judge(given: Path | None, settings: Settings) -> Iterator[Path | None]:
    """The model folder to judge: the given one, else the settings', else the store's challenger, fetched for as long
    as this context is open; None: the shipped one.

    Raises `InputError` when the store cannot be used, `ModelError` when the challenger's files are damaged.
    """
    if given is not None or settings.story_model is not None:
        yield given or Path(str(settings.story_model))
        return
    name = challenger_name(settings)
    if name is None:
        yield None
        return
    from experiments.benchmark.targets.choose import registered_folder

    with tempfile.TemporaryDirectory(prefix="story-version-") as place:
        yield registered_folder(name, settings.mlflow_tracking_uri, Path(place))
