"""How far back each kind of layer must read: what stories cost as its reach is cut shorter and shorter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np

from experiments.common.statistics import ratio_of_sums
from experiments.interpret.look import Kind, cost_of, encode, reach_of
from model.architecture.network import StoryNetwork
from model.architecture.tokenizer import StoryTokenizer

if TYPE_CHECKING:
    from pandas import DataFrame

REACHES = (1, 4, 16, 64, 256)
KINDS: tuple[Kind, ...] = ("attention", "recurrence")


def cost_by_reach(
    network: StoryNetwork, tokenizer: StoryTokenizer, texts: Sequence[str], reaches: Sequence[int] = REACHES
) -> DataFrame:
    """Bits per byte with one kind of layer cut to each reach, in tokens: `cut`, `reach`, `mean`, `low`, `high`.

    The row with `cut` "none" is the whole network; the intervals are 95 %, over stories. A story's end is not counted.
    """
    from pandas import DataFrame

    stories = [encode(tokenizer, text) for text in texts]
    sizes = [len(text.encode()) for text in texts]
    rows = []
    cuts: list[tuple[str, int]] = [("none", 0), *((kind, reach) for kind in KINDS for reach in reaches)]
    for cut, reach in cuts:
        with nullcontext() if cut == "none" else reach_of(network, reach, _kind(cut)):
            bits = [float(np.nansum(cost_of(network, tokens))) / math.log(2) for tokens in stories]
        found = ratio_of_sums(bits, sizes)
        rows.append((cut, reach, found.value, found.low, found.high))
    return DataFrame(rows, columns=["cut", "reach", "mean", "low", "high"])


def _kind(cut: str) -> Kind:
    return next(kind for kind in KINDS if kind == cut)
