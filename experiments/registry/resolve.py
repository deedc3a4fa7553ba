"""Model references: what a user may name, and the model folder that it stands for."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from model.architecture.folder import PRETRAINED, ModelFolder
from model.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from experiments.registry.versions import Version
    from model.settings import Settings

MODELS = "models:/"
"""How MLflow's reference to a registered version begins."""
LATEST = Path("runs/story/best")
"""The best checkpoint of `story train` without `--out`."""
EXPORTED = "model"
"""Folder beside a checkpoint that holds the model folder exported from it."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """The model folder that a reference stands for."""

    path: Path
    version: Version | None = None
    """None: the reference named a folder, not a registered version."""


@contextlib.contextmanager
def resolve_model(reference: str | Path | None, uri: str, *, bare_names: bool = False) -> Iterator[ResolvedModel]:
    """Find the model that `reference` names; a registered version is downloaded for as long as the context is open.

    Args:
        reference: a model folder, `models:/story-writer/3` or `models:/story-writer@champion`; None: the shipped
            model.
        uri: the MLflow store.
        bare_names: whether a word that is no path (`3`, `champion`, the beginning of a digest) names a registered
            version. Without it, it is the name of a folder.

    Raises:
        InputError: there is no such version, or the store cannot be used. `MissingExtraError`: MLflow is not installed.
        ModelError: the version's files are damaged.
    """
    text = "" if reference is None else str(reference)
    is_path = "/" in text or Path(text).is_dir()
    if reference is None:
        yield ResolvedModel(PRETRAINED)
    elif text.startswith(MODELS) or (bare_names and not is_path):
        if find_spec("mlflow") is None:
            raise MissingExtraError(f"the registered version {text!r}", "train")
        from experiments.registry.versions import download, find

        version = find(uri, text)
        with tempfile.TemporaryDirectory(prefix="story-version-") as scratch:
            yield ResolvedModel(download(uri, version, Path(scratch)).path, version)
    else:
        yield ResolvedModel(Path(text).expanduser())


def challenger_reference(settings: Settings) -> str | None:
    """The store's challenger as `models:/story-writer/N`; None: there is none, or the settings name a model.

    `story register && story evaluate && story benchmark && story gate` then all judge the same artifact. A store that
    does not exist is not made. Raises `InputError` when the store cannot be used.
    """
    if settings.story_model is not None or find_spec("mlflow") is None:
        return None
    from training.tracking.store import database_file

    uri = settings.mlflow_tracking_uri
    database = database_file(uri)
    if database is not None and not database.is_file():
        return None
    from experiments.registry.versions import CHALLENGER, NAME, holder

    version = holder(uri, CHALLENGER)
    return None if version is None else f"{MODELS}{NAME}/{version.number}"


def folder_to_register(source: Path | None) -> tuple[ModelFolder, Path | None]:
    """The model folder of `source`, and the folder of the training run that it lies in, if it lies in one.

    A checkpoint is exported to the folder `model` beside it. None: the checkpoint that `story train` left in
    `runs/story`, else the shipped model.

    Raises:
        InputError: `source` is neither a model folder nor a checkpoint.
        ModelError: it is damaged, or its graphs are not its network.
    """
    if source is None:
        source = LATEST if LATEST.is_dir() else PRETRAINED
    parent = source.resolve().parent
    run_folder = parent if any((parent / name).is_dir() for name in ("last", "last.old")) else None
    if (source / "digest").is_file():
        return ModelFolder.open(source), run_folder
    if not (source / "model.safetensors").is_file():
        raise InputError("source", f"must be a model folder or a checkpoint of a training run, got {source}")
    from training.export.export import export_checkpoint

    export_checkpoint(source, parent / EXPORTED)
    return ModelFolder.open(parent / EXPORTED), run_folder
