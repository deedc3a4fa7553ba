"""Resumable checkpoints: `last/` is what a resume continues, `best/` has the lowest validation loss.

A checkpoint appears by renaming a finished folder, so that a kill at any moment leaves a whole one behind.
"""

import errno
import io
import shutil
from pathlib import Path
from typing import Any

import torch

from model.architecture.folder import ModelConfig, ModelFolder, read_config
from model.architecture.network import StoryNetwork, load_network, save_network
from model.errors import InputError, ModelError, TrainingError
from model.files import replace_folder
from training.data.corpus import file_sha256
from training.data.shards import same_tokenizer

LAST, BEST = "last", "best"


def write_checkpoint(
    folder: Path,
    network: StoryNetwork,
    *,
    tokenizer: Path,
    notes: dict[str, Any],
    trainer: dict[str, Any] | None = None,
) -> None:
    """Replace the checkpoint at `folder`; with `trainer` (tensors and plain values) it can be resumed.

    Raises `TrainingError` if the disk has no room for it; the run's earlier checkpoints then stay.
    """
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        save_network(network, fresh, tokenizer=tokenizer, notes=notes)
        if trainer is not None:
            torch.save(trainer, fresh / "trainer.pt")
        replace_folder(fresh, folder, old)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's, whatever the system said
        shutil.rmtree(fresh, ignore_errors=True)
        content = io.BytesIO()
        torch.save([network.state_dict(), trainer], content)
        needed = content.tell() + tokenizer.stat().st_size
        free = shutil.disk_usage(next(path for path in fresh.parents if path.is_dir())).free
        if free >= needed and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = [str(found) for name in (LAST, BEST) if (found := find_checkpoint(folder.with_name(name)))]
        raise TrainingError(
            f"{folder}: the disk is full: a checkpoint needs {needed:,} bytes, {free:,} are free; "
            f"kept: {' and '.join(kept) or 'nothing yet'}"
        ) from error


def find_checkpoint(folder: Path) -> Path | None:
    """`folder`, or the one set aside when a kill fell between two renames; None if there is neither."""
    for candidate in (folder, folder.with_name(folder.name + ".old")):
        if (candidate / "config.json").is_file():
            return candidate
    return None


def find_last(out: Path) -> Path:
    """The checkpoint that a resume of the run in `out` continues. Raises `ModelError` where there is none."""
    folder = find_checkpoint(out / LAST)
    if folder is None:
        raise ModelError(f"{out / LAST} does not exist: there is no run to resume")
    return folder


def read_checkpoint(folder: Path) -> tuple[StoryNetwork, dict[str, Any], dict[str, Any]]:
    """(network, config.json, trainer state) of a resumable checkpoint. Raises `ModelError`."""
    path = folder / "trainer.pt"
    try:
        trainer = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise errors of many kinds, some of many lines
        kind = type(error).__name__
        raise ModelError(f"{path} cannot be read, so this run cannot be resumed ({kind})") from None
    return load_network(folder), read_config(folder), trainer


def read_initial(
    folder: Path, sizes: ModelConfig, tokenizer: Path, *, name: str = "init"
) -> tuple[StoryNetwork, dict[str, Any]]:
    """Read the network in `folder` (a model folder or a checkpoint), and the record of it for a run's notes.

    The record holds the folder's own notes and its `digest`: a model folder's own, or SHA-256 of a checkpoint's
    weights. `name` is the option named in errors.

    Raises:
        InputError: its sizes are not `sizes`, or its tokenizer is not `tokenizer`.
        ModelError, DataError: the folder is missing or damaged.
    """
    network, notes = load_network(folder), read_config(folder)
    exported = (folder / "digest").is_file()
    digest = ModelFolder.open(folder).digest if exported else file_sha256(folder / "model.safetensors")
    theirs, ours = network.config.as_dict(), sizes.as_dict()
    for key, value in ours.items():
        if theirs[key] != value:
            raise InputError(name, f"has model.{key} = {theirs[key]!r} ({folder}), and not {value!r}")
    if not same_tokenizer(folder / "tokenizer.json", tokenizer):
        raise InputError(
            name,
            f"has another tokenizer ({folder}) than {tokenizer.parent}; "
            f"`story data --tokenizer {folder / 'tokenizer.json'}` makes data for it",
        )
    del notes["format"], notes["model"]
    return network, {"digest": digest, **notes}
