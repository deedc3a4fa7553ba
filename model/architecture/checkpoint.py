"""A network on disk: `config.json`, `model.safetensors` and the tokenizer it was trained with.

A training checkpoint holds these three files beside the optimiser's state, a model folder beside its decode graphs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from model.architecture.folder import FORMAT, read_sizes
from model.architecture.network import StoryNetwork
from model.errors import ModelError


def save_network(
    network: StoryNetwork, folder: Path, *, tokenizer: Path, notes: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write the network into an existing `folder`, its weights as `dtype`; `notes` go into config.json."""
    weights = {name: value.detach().to(dtype).contiguous() for name, value in network.state_dict().items()}
    # Written as any other file: `safetensors.torch.save_file` makes it readable by the owner only.
    (folder / "model.safetensors").write_bytes(save(weights))
    config = {"format": FORMAT, "model": network.config.as_dict(), **notes}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    if tokenizer.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")


def load_network(folder: Path) -> StoryNetwork:
    """The network of a checkpoint or model folder, in fp32 and in evaluation mode.

    Raises:
        ModelError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    network = StoryNetwork(read_sizes(folder))
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / 'model.safetensors'} cannot be read: {error}") from None
    try:
        network.load_state_dict({name: value.float() for name, value in weights.items()})
    except RuntimeError as error:
        raise ModelError(
            f"{folder}: weights and config.json do not fit: {str(error).splitlines()[-1].strip()}"
        ) from None
    return network.eval()
