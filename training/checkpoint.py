"""Resumable checkpoints: the network plus all else that the next step depends on.

`last/` is what a resume continues, `best/` the network with the lowest validation loss. A checkpoint appears by
renaming a finished folder, so that a kill at any moment leaves a whole one behind.
"""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import load_network, save_network
from model.errors import ModelError
from model.folder import read_config
from model.network import StoryNetwork

LAST, BEST = "last", "best"


def write_checkpoint(
    folder: Path,
    network: StoryNetwork,
    *,
    tokenizer: Path,
    notes: dict[str, Any],
    trainer: dict[str, Any] | None = None,
) -> None:
    """Replace the checkpoint at `folder`; with `trainer` (tensors and plain values) it can be resumed."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_network(network, fresh, tokenizer=tokenizer, notes=notes)
    if trainer is not None:
        torch.save(trainer, fresh / "trainer.pt")
    if folder.exists():
        folder.rename(old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """`folder`, or the one set aside when a kill fell between two renames; None if there is neither."""
    for candidate in (folder, folder.with_name(folder.name + ".old")):
        if (candidate / "config.json").is_file():
            return candidate
    return None


def read_checkpoint(folder: Path) -> tuple[StoryNetwork, dict[str, Any], dict[str, Any]]:
    """(network, config.json, trainer state) of a resumable checkpoint. Raises `ModelError`."""
    path = folder / "trainer.pt"
    try:
        trainer = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(f"{path} cannot be read, so this run cannot be resumed: {error}") from None
    return load_network(folder), read_config(folder), trainer
