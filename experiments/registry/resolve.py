"""Model references of commands: those of `model.serving.registry`, also in a store that is a database."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from model.architecture.folder import PRETRAINED, ModelFolder
from model.errors import InputError, MissingExtraError
from model.serving import registry
from model.serving.registry import MODELS, NAME, Registry, ResolvedModel, open_server
from model.settings import without_password

if TYPE_CHECKING:
    from model.settings import Settings

LATEST = Path("runs/story/best")
"""The best checkpoint of `story train` without `--out`."""
EXPORTED = "model"
"""Folder beside a checkpoint that holds the model folder exported from it."""


def open_registry(settings: Settings) -> Registry:
    """Open the registry of the settings: an MLflow server by its REST API, a database through MLflow.

    Raises `MissingExtraError` for a database where MLflow is not installed.
    """
    uri = settings.mlflow_tracking_uri
    if uri.startswith(("http://", "https://")):
        return open_server(settings)
    if find_spec("mlflow") is None:
        raise MissingExtraError(f"a registered version in {without_password(uri)}", "train")
    from experiments.registry.versions import StoreRegistry

    return StoreRegistry(uri)


def resolve_model(reference: str | Path | None, settings: Settings, *, bare_names: bool = False) -> ResolvedModel:
    """Find the model that `reference` names: `model.serving.registry.resolve_model`, with databases too."""
    return registry.resolve_model(reference, settings, bare_names=bare_names, open_registry=open_registry)


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
    from experiments.registry.versions import CHALLENGER, holder

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
