"""Loss by place in the story: does a model use what came before?

Late places are easier for every model, because a story repeats its own words; so the floor stands beside each figure.
A model that reads far back gains on a table of short runs the more, the further it is into the story.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.quality.held_out import HeldOut, Nats
from model.architecture.tokenizer import StoryTokenizer

STARTS = (0, 16, 32, 64, 128, 256, 512)
"""First places of the buckets; place 0 is the story's first token, and its end counts as its last."""


@dataclass(frozen=True, slots=True)
class PlaceLoss:
    """The targets of all stories that stand between two places."""

    first: int
    last: int | None
    """None: no end."""
    tokens: int
    loss: float
    """Nats a token."""
    bits_per_byte: float | None
    """None where the targets have no bytes: nothing but ends of stories."""
    floor_loss: float | None
    """Nats a token of the n-gram table on the same targets."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def target_bytes(held_out: HeldOut, tokenizer: StoryTokenizer) -> list[npt.NDArray[np.int64]]:
    """The bytes of each target of each story: those of its piece, and none for the end."""
    sizes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    return [sizes[held_out.targets(index)] for index in range(len(held_out.texts))]


def loss_by_place(
    nats: Sequence[Nats],
    sizes: Sequence[npt.NDArray[np.int64]],
    floor: Sequence[Nats] | None = None,
    starts: Sequence[int] = STARTS,
) -> tuple[PlaceLoss, ...]:
    """Mean loss of the targets in each bucket that holds any.

    Args:
        nats: of each story's targets.
        sizes: bytes of the same targets.
        floor: the n-gram table's nats of the same targets.
        starts: first places of the buckets, rising, from 0.
    """
    place = np.concatenate([np.arange(len(story)) for story in nats])
    bucket = np.searchsorted(np.array(starts), place, side="right") - 1

    def total(values: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
        return np.bincount(bucket, np.concatenate(values), minlength=len(starts)).astype(np.float64)

    counts = np.bincount(bucket, minlength=len(starts))
    summed, width = total(nats), total(sizes)
    below = None if floor is None else total(floor)
    return tuple(
        PlaceLoss(
            first=first,
            last=starts[index + 1] - 1 if index + 1 < len(starts) else None,
            tokens=int(counts[index]),
            loss=float(summed[index] / counts[index]),
            bits_per_byte=float(summed[index] / math.log(2) / width[index]) if width[index] else None,
            floor_loss=None if below is None else float(below[index] / counts[index]),
        )
        for index, first in enumerate(starts)
        if counts[index]
    )
