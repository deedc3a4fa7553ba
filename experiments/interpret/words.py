"""What each head of each layer reads at one place of a story, by words, for whoever has no PyTorch loaded.

`layers_at` is run in a worker process: PyTorch takes seconds to import and holds the interpreter lock meanwhile, so a
process that serves must never load it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.background import background
from model.architecture.folder import ModelFolder
from model.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from model.architecture.network import StoryNetwork
    from model.architecture.tokenizer import StoryTokenizer

IDLE_TIMEOUT = 600.0
DIGITS = 5


def layers_at(folder: Path, version: str, tokens: tuple[int, ...], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Return what each head reads after the last of `tokens`, layer by layer.

    A dictionary for each layer: its `layer`, counted from 1, its `kind`, and its `heads`. Of an attention head, `words`
    are the weights of the words, and `start` is that of the story's beginning; together they are 1. Of a head of a
    recurrence, they are the shares of what its memory holds, by what each word wrote and how much of that is left; and
    `half_life` is in tokens.

    Args:
        folder: of the model.
        version: its digest.
        tokens: of the story up to there, the start token first.
        sizes: tokens of each word, in order, without the start token.

    Raises:
        ModelError: the folder is damaged, or holds another version by now.
    """
    with background(IDLE_TIMEOUT):
        network, tokenizer = _opened(folder, version)

        from experiments.interpret.trace import trace_tokens

        trace = trace_tokens(network, tokenizer, tokens)
        found = []
        for number, attention in trace.attentions.items():
            heads = _by_words(attention.weight_HTT[:, -1], sizes)
            found.append({"layer": number + 1, "kind": "attention", "heads": heads})
        for number, recurrence in trace.recurrences.items():
            left_HT = recurrence.left_at_the_end()
            heads = _by_words(left_HT / left_HT.sum(1, keepdim=True), sizes)
            for head, half_life in zip(heads, recurrence.half_life().tolist(), strict=True):
                head["half_life"] = half_life
            found.append({"layer": number + 1, "kind": "recurrence", "heads": heads})
        return sorted(found, key=lambda layer: layer["layer"])


@functools.lru_cache(maxsize=1)
def _opened(folder: Path, version: str) -> tuple[StoryNetwork, StoryTokenizer]:
    import torch

    from model.architecture.network import load_network
    from model.architecture.tokenizer import StoryTokenizer

    torch.set_num_threads(1)
    opened = ModelFolder.open(folder)
    if opened.digest != version:
        raise ModelError(f"the model's folder holds another version by now: {opened.digest[:12]}")
    return load_network(folder), StoryTokenizer.load(opened.tokenizer)


def _by_words(share_HT: Tensor, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Sum the shares of tokens by words, head by head."""
    edges = list(accumulate(sizes, initial=1))
    before_HT = share_HT.double().cumsum(1)[:, [edge - 1 for edge in edges]]  # up to each edge
    words_HW = before_HT.diff(dim=1)
    return [
        {"start": round(start, DIGITS), "words": [round(share, DIGITS) for share in words]}
        for start, words in zip(before_HT[:, 0].tolist(), words_HW.tolist(), strict=True)
    ]
