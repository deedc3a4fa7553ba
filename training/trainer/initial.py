"""`story train --init`: the weights of a model that exists, as the start of a new run.

A continuation is a run of its own, with its own optimiser, steps and recipe. What it began with is written
into its notes, so that no checkpoint and no model card hides where its weights come from.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from model.architecture.checkpoint import load_network
from model.architecture.config import ModelConfig
from model.architecture.folder import ModelFolder, read_config
from model.architecture.network import StoryNetwork
from model.errors import InputError
from training.data.bpe import same_tokenizer


def read_initial(
    folder: Path, sizes: ModelConfig, tokenizer: Path, *, name: str = "init"
) -> tuple[StoryNetwork, dict[str, Any]]:
    """The network in `folder` (a model folder or a checkpoint), and what a run's notes should tell of it.

    The notes are those of the folder (its recipe, data, steps …; `init` again, if it was a continuation
    itself) and its `digest`: a model folder's own, or SHA-256 of a checkpoint's weights. `name` is the option that
    an error speaks of.

    Raises:
        InputError: its sizes are not `sizes`, or its tokenizer is not `tokenizer`.
        ModelError, DataError: the folder is missing or damaged.
    """
    network, notes = load_network(folder), read_config(folder)
    if (folder / "digest").is_file():
        digest = ModelFolder.open(folder).digest
    else:
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    theirs, ours = network.config.as_dict(), sizes.as_dict()
    for key, value in ours.items():
        if theirs[key] != value:
            raise InputError(name, f"has model.{key} = {theirs[key]!r} ({folder}), and not {value!r}")
    if not same_tokenizer(folder / "tokenizer.json", tokenizer):
        raise InputError(
            name, f"has another tokenizer ({folder}) than {tokenizer.parent}; "
            f"`story data --tokenizer {folder / 'tokenizer.json'}` makes data for it",
        )  # fmt: skip
    del notes["format"], notes["model"]
    return network, {"digest": digest, **notes}
