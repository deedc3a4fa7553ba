"""What a name costs each time that it comes: a measure of what a network remembers of who is in a story.

The first time a name can only be guessed; from the second on it can be remembered. Who remembers is asked by cutting
the reach of one kind of layer to a few tokens while all else stays as it is.

A name is recognised as `experiments.quality.names` does: a capitalised word in mid-sentence. So "Grandma" and
"Monday" count, which are guessed more easily than "Delroy".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from experiments.common.statistics import ratio_of_sums
from experiments.interpret.look import cost_of, encode, reach_of
from experiments.quality.names import names_in
from model.architecture.network import StoryNetwork
from model.architecture.tokenizer import StoryTokenizer

if TYPE_CHECKING:
    from pandas import DataFrame

REACH = 8
"""Tokens that a layer may still read where its reach is cut: the phrase, and not who was in the sentence before."""
MOST = 5
"""The last mention shown: later ones count with it."""
WHOLE = "the whole network"


def mentions(text: str, tokenizer: StoryTokenizer) -> list[tuple[str, int, range]]:
    """(name, which mention, its tokens) of every name that comes twice or more, in the order of the text.

    The tokens are places in what `encode` gives.
    """
    ends = np.cumsum([len(tokenizer.piece_bytes(token)) for token in encode(tokenizer, text)])
    found = []
    for name in names_in(text):
        places = [
            (len(text[: match.start()].encode()), len(text[: match.end()].encode()))
            for match in re.finditer(rf"\b{re.escape(name)}\b", text)
        ]
        if len(places) < 2:
            continue
        for number, (first, last) in enumerate(places, 1):
            # The token that holds the name's first byte, and so on to the one that holds its last.
            begin, end = (int(np.searchsorted(ends, byte, side="right")) for byte in (first, last - 1))
            found.append((name, number, range(begin, end + 1)))
    return sorted(found, key=lambda one: one[2].start)


def cost_of_names(network: StoryNetwork, tokenizer: StoryTokenizer, texts: Sequence[str]) -> DataFrame:
    """A row for each mention and network: `story`, `name`, `mention`, `network`, `nats`.

    The networks are the whole one, and those whose attention, recurrences, or both read only the last `REACH` tokens.
    """
    from pandas import DataFrame

    rows = []
    for number, text in enumerate(texts):
        tokens = encode(tokenizer, text)
        found = mentions(text, tokenizer)
        if not found:
            continue
        for label, cut in _networks(network):
            with cut:
                nats = cost_of(network, tokens)
            for name, mention, places in found:
                rows.append((number, name, mention, label, float(nats[list(places)].sum())))
    return DataFrame(rows, columns=["story", "name", "mention", "network", "nats"])


def by_mention(costs: DataFrame, most: int = MOST) -> DataFrame:
    """Mean nats of a name by mention and network, with 95 % intervals over stories: `mean`, `low`, `high`, `n`."""
    from pandas import DataFrame

    rows = []
    capped = costs.assign(mention=costs["mention"].clip(upper=most))
    for (label, mention), group in capped.groupby(["network", "mention"], sort=False):
        sums = group.groupby("story")["nats"].agg(["sum", "size"])
        found = ratio_of_sums(sums["sum"].to_numpy(), sums["size"].to_numpy())
        rows.append((label, mention, found.value, found.low, found.high, len(group)))
    return DataFrame(rows, columns=["network", "mention", "mean", "low", "high", "n"])


def _networks(network: StoryNetwork) -> Iterable[tuple[str, AbstractContextManager[None]]]:
    return (
        (WHOLE, nullcontext()),
        (f"attention sees {REACH} tokens", reach_of(network, REACH, "attention")),
        (f"recurrences remember {REACH} tokens", reach_of(network, REACH, "recurrence")),
        (f"both only {REACH} tokens", reach_of(network, REACH, "attention", "recurrence")),
    )
