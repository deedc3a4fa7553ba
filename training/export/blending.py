"""The mean of two models' weights, where one was trained on from the other.

A continuation leaves its beginning in another direction than the one in which the beginning had learned its corpus by
heart, and no hill lies between the two: their mean predicts better than either (Wortsman et al. 2022, "Robust
fine-tuning of zero-shot models" and "Model soups"). It costs no training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.architecture.network import StoryNetwork
from training.trainer.initial import read_initial

SHARE = 0.5
"""Of the other model."""


def blend(network: StoryNetwork, other: Path, tokenizer: Path) -> dict[str, Any]:
    """Turn the network's weights into their mean with those in the folder `other`; returns what notes should tell.

    Raises:
        InputError: `other` has other sizes or another tokenizer than `tokenizer`.
        ModelError, DataError: `other` is missing or damaged.
    """
    theirs, told = read_initial(other, network.config, tokenizer, name="blend")
    with torch.no_grad():
        for mine, other_one in zip(network.parameters(), theirs.parameters(), strict=True):
            mine.lerp_(other_one, SHARE)
    return {"share": SHARE, "digest": told["digest"]}
