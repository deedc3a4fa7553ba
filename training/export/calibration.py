"""Temperature scaling (Guo et al. 2017): one scale of the logits, found on held-out stories.

It corrects the overconfidence of repeated epochs and of dropout, and changes no ranking of tokens. It costs nothing at
run time: it is multiplied into the tied embedding, whose input side is normed.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from model.architecture.network import StoryNetwork
from model.errors import InputError, ModelError
from training.data.bpe import same_tokenizer
from training.data.shards import TokenShard, read_meta
from training.trainer.parallel import Group
from training.trainer.rows import IGNORED
from training.trainer.validation import Validation

STORIES = 400
"""Validation stories that decide: one number needs no more, and the others stay unseen by it."""
LOWEST, HIGHEST = 0.25, 4.0
CLOSE = 1e-4
MOST_PASSES = 8


@dataclass(frozen=True, slots=True)
class Calibration:
    """The scale that was found, on which stories, and what it changed there."""

    scale: float
    stories: int
    data: str | None
    """Digest of the shards."""
    bits_per_byte_before: float
    bits_per_byte: float


def calibrate(network: StoryNetwork, data: Path, tokenizer: Path, *, stories: int = STORIES) -> Calibration:
    """Scale the network's logits, in place, to the lowest loss on the first validation stories in `data`.

    Raises `InputError` for shards of another tokenizer, `DataError` for damaged ones, and `ModelError` where logits
    are not finite or no scale from 0.25 to 4 is best.
    """
    meta = read_meta(data)
    if not same_tokenizer(data / "tokenizer.json", tokenizer):
        raise InputError("calibrate", f"has another tokenizer than the checkpoint ({data})")
    shared = Tokenizer.from_file(str(tokenizer))
    validation = Validation(TokenShard(data, "val"), shared, stories, Group())
    scale, before, after = _search(network, validation)
    with torch.no_grad():
        network.embedding.weight.mul_(scale)
    per_byte = 1 / math.log(2) / validation.bytes
    return Calibration(scale, validation.stories, meta.get("digest"), before * per_byte, after * per_byte)


def _search(network: StoryNetwork, validation: Validation) -> tuple[float, float, float]:
    """(best scale, nats before, nats with it), by Newton's method: the loss is convex in the scale."""
    scale, before = 1.0, None
    for _ in range(MOST_PASSES):
        nats, slope, curvature = _derivatives(network, validation, scale)
        if not math.isfinite(nats):
            raise ModelError("the network gives logits that are not finite: its weights are unusable")
        before = nats if before is None else before
        step = slope / max(curvature, 1e-30)  # 0 where every choice is certain: then to the end of the range
        if abs(step) < CLOSE:
            return scale, before, nats
        scale = min(max(scale - step, LOWEST), HIGHEST)
    raise ModelError(f"no scale of the logits between {LOWEST:g} and {HIGHEST:g} is best for this network")


@torch.no_grad()
def _derivatives(network: StoryNetwork, validation: Validation, scale: float) -> tuple[float, float, float]:
    """Summed loss in nats with logits times `scale`, and its first and second derivative by `scale`."""
    total = torch.zeros(3, dtype=torch.float64)
    for inputs_BT, targets_BT in validation.batches():
        counts = targets_BT.flatten() != IGNORED
        logits_NV = network(inputs_BT).flatten(0, 1)[counts].float()
        target_N = logits_NV.gather(1, targets_BT.flatten()[counts, None]).squeeze(1)
        chance_NV = (logits_NV * scale).softmax(-1)
        mean_N = (chance_NV * logits_NV).sum(-1)
        total[0] += F.cross_entropy(logits_NV * scale, targets_BT.flatten()[counts], reduction="sum").double()
        total[1] += (mean_N - target_N).double().sum()
        total[2] += ((chance_NV * logits_NV.square()).sum(-1) - mean_N.square()).double().sum()
    nats, slope, curvature = total.tolist()
    return nats, slope, curvature
