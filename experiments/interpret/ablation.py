"""What stories and names cost when one kind of layer sees fewer tokens: which layers keep what.

The first mention of a name can only be guessed; from the second on it can be copied from the context. Names are
recognised as `experiments.quality` does: a capitalised word in mid-sentence. So "Grandma" and "Monday" count too, which
are easier to guess than "Delroy". All intervals are 95 %, over stories.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from experiments.common.statistics import ratio_of_sums
from experiments.interpret.trace import Kind, encode, limited_reach, token_nats
from experiments.quality.generation import names_in
from model.architecture.network import StoryNetwork
from model.architecture.tokenizer import StoryTokenizer

if TYPE_CHECKING:
    from pandas import DataFrame

REACHES = (1, 4, 16, 64, 256)
KINDS: tuple[Kind, ...] = ("attention", "recurrence")
NAME_REACH = 8
"""Tokens that a limited layer may still read: the phrase, but not who was in the sentence before."""
LAST_MENTION = 5
"""Later mentions count with it."""
WHOLE = "the whole network"


def cost_by_reach(
    network: StoryNetwork, tokenizer: StoryTokenizer, texts: Sequence[str], reaches: Sequence[int] = REACHES
) -> DataFrame:
    """Measure bits per byte with one kind of layer limited to each reach, in tokens.

    Columns: `cut`, `reach`, `mean`, `low`, `high`; the row with `cut` "none" is the whole network. A story's end is not
    counted.
    """
    from pandas import DataFrame

    stories = [encode(tokenizer, text) for text in texts]
    sizes = [len(text.encode()) for text in texts]
    networks: list[tuple[str, int, AbstractContextManager[None]]] = [("none", 0, nullcontext())]
    networks += [(kind, reach, limited_reach(network, reach, kind)) for kind in KINDS for reach in reaches]
    rows = []
    for cut, reach, limit in networks:
        with limit:
            bits = [float(np.nansum(token_nats(network, tokens))) / math.log(2) for tokens in stories]
        found = ratio_of_sums(bits, sizes)
        rows.append((cut, reach, found.value, found.low, found.high))
    return DataFrame(rows, columns=["cut", "reach", "mean", "low", "high"])


def mentions(text: str, tokenizer: StoryTokenizer) -> list[tuple[str, int, range]]:
    """Find every name that occurs twice or more: (name, which mention, its tokens), in the order of the text.

    The tokens are positions in what `encode` returns.
    """
    ends = np.cumsum([len(tokenizer.token_bytes(token)) for token in encode(tokenizer, text)])
    found = []
    for name in names_in(text):
        places = [
            (len(text[: match.start()].encode()), len(text[: match.end()].encode()))
            for match in re.finditer(rf"\b{re.escape(name)}\b", text)
        ]
        if len(places) < 2:
            continue
        for number, (first, last) in enumerate(places, 1):
            # From the token that holds the name's first byte to the one that holds its last.
            begin, end = (int(np.searchsorted(ends, byte, side="right")) for byte in (first, last - 1))
            found.append((name, number, range(begin, end + 1)))
    return sorted(found, key=lambda one: one[2].start)


def cost_of_names(network: StoryNetwork, tokenizer: StoryTokenizer, texts: Sequence[str]) -> DataFrame:
    """Measure each mention in each network: `story`, `name`, `mention`, `network`, `nats`.

    The networks are the whole one, and those whose attention, recurrences, or both see only `NAME_REACH` tokens.
    """
    from pandas import DataFrame

    rows = []
    for number, text in enumerate(texts):
        tokens = encode(tokenizer, text)
        found = mentions(text, tokenizer)
        if not found:
            continue
        limits: dict[str, AbstractContextManager[None]] = {
            WHOLE: nullcontext(),
            f"attention sees {NAME_REACH} tokens": limited_reach(network, NAME_REACH, "attention"),
            f"recurrences remember {NAME_REACH} tokens": limited_reach(network, NAME_REACH, "recurrence"),
            f"both only {NAME_REACH} tokens": limited_reach(network, NAME_REACH, *KINDS),
        }
        for label, limit in limits.items():
            with limit:
                nats = token_nats(network, tokens)
            for name, mention, places in found:
                rows.append((number, name, mention, label, float(nats[list(places)].sum())))
    return DataFrame(rows, columns=["story", "name", "mention", "network", "nats"])


def by_mention(costs: DataFrame, most: int = LAST_MENTION) -> DataFrame:
    """Average the nats of a name by network and mention: `network`, `mention`, `mean`, `low`, `high`, `n`."""
    from pandas import DataFrame

    rows = []
    capped = costs.assign(mention=costs["mention"].clip(upper=most))
    for (label, mention), group in capped.groupby(["network", "mention"], sort=False):
        sums = group.groupby("story")["nats"].agg(["sum", "size"])
        found = ratio_of_sums(sums["sum"].to_numpy(), sums["size"].to_numpy())
        rows.append((label, mention, found.value, found.low, found.high, len(group)))
    return DataFrame(rows, columns=["network", "mention", "mean", "low", "high", "n"])
