"""What `story register` is given: a model folder, or a checkpoint that has to be exported first."""

from __future__ import annotations

from pathlib import Path

from model.architecture.folder import PRETRAINED, ModelFolder
from model.errors import InputError

LATEST = Path("runs/story/best")
"""The best checkpoint of `story train` without `--out`."""
EXPORTED = "model"
"""Beside the checkpoint: the model folder made from it."""


def opened(source: Path | None) -> tuple[ModelFolder, Path | None]:
    """The model folder of `source`, and the folder of the training run it lies in, if it lies in one.

    None stands for the checkpoint that `story train` left in `runs/story`, and where there is none, for the shipped
    model. A checkpoint is exported to the folder `model` beside it.

    Raises:
        InputError: `source` is neither a model folder nor a checkpoint.
        ModelError: it is damaged, or its graphs are not its network.
    """
    if source is None:
        source = LATEST if LATEST.is_dir() else PRETRAINED
    if (source / "digest").is_file():
        return ModelFolder.open(source), _run_of(source)
    if not (source / "model.safetensors").is_file():
        raise InputError("source", f"must be a model folder or a checkpoint of a training run, got {source}")
    from training.export.export import export_checkpoint

    out = source.resolve().parent / EXPORTED
    export_checkpoint(source, out)
    return ModelFolder.open(out), _run_of(source)


def _run_of(source: Path) -> Path | None:
    parent = source.resolve().parent
    return parent if (parent / "last").is_dir() or (parent / "last.old").is_dir() else None
