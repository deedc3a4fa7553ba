"""One story through the network, with a look at every layer; and the same with a layer's reach cut short.

Hooks take what each layer is given, so what is looked at is the network at its work and not a copy of it.

Shapes: T tokens, D width, H heads, L recurrent layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.interpret.readings import AttentionReading, RecurrenceReading, reading_of
from model.architecture.network import (
    END_OF_STORY_ID,
    Attention,
    Block,
    Recurrence,
    RecurrentState,
    StoryNetwork,
)
from model.architecture.tokenizer import StoryTokenizer
from model.errors import InputError

Kind = Literal["recurrence", "attention"]
LAYERS: dict[Kind, type[Recurrence] | type[Attention]] = {"recurrence": Recurrence, "attention": Attention}
LONGEST = 2048
"""Tokens of a story that is looked at: the weights of a layer grow with their square."""
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Look:
    """What happened in the network as it read one story."""

    tokens: tuple[int, ...]
    """The first is the end of the story before."""
    pieces: tuple[str, ...]
    """Text of each token; that of the first is empty."""
    nats: Floats
    """What each token cost, told by those before it; NaN for the first."""
    recurrences: dict[int, RecurrenceReading]
    """By the number of the layer, counted from 0."""
    attentions: dict[int, AttentionReading]


def encode(tokenizer: StoryTokenizer, text: str) -> tuple[int, ...]:
    """A story's tokens behind the piece that starts it. Raises `InputError` for one that is empty or too long."""
    tokens = (END_OF_STORY_ID, *tokenizer.encode(text))
    if not 2 <= len(tokens) <= LONGEST:
        raise InputError("text", f"must be a story of 1 to {LONGEST - 1} tokens, got {len(tokens) - 1}")
    return tokens


@torch.no_grad()
def look(network: StoryNetwork, tokenizer: StoryTokenizer, text: str) -> Look:
    """Read `text` and keep every layer's weights.

    Raises:
        InputError: the text is empty or longer than 2,047 tokens.
    """
    tokens = encode(tokenizer, text)
    given: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: Any, arguments: tuple[Tensor, ...]) -> None:
            given[number] = arguments[0][0]

        return hook

    with ExitStack() as hooks:
        for number, layer in _layers(network):
            hooks.enter_context(_removed(layer.register_forward_pre_hook(keep(number))))
        nats = cost_of(network, tokens)
    readings = {number: reading_of(layer, given[number]) for number, layer in _layers(network)}
    return Look(
        tokens=tokens,
        pieces=tuple(tokenizer.piece_text(token) or "�" * (token != END_OF_STORY_ID) for token in tokens),
        nats=nats,
        recurrences={number: one for number, one in readings.items() if isinstance(one, RecurrenceReading)},
        attentions={number: one for number, one in readings.items() if isinstance(one, AttentionReading)},
    )


@torch.no_grad()
def cost_of(network: StoryNetwork, tokens: tuple[int, ...]) -> Floats:
    """Nats of each token of one story, told by those before it; NaN for the first."""
    fed = torch.tensor(tokens)
    logits_TV = network(fed[None])[0].float()
    nats = F.cross_entropy(logits_TV[:-1], fed[1:], reduction="none").numpy()
    return np.concatenate([np.full(1, np.nan, np.float32), nats])


@contextmanager
def reach_of(network: StoryNetwork, reach: int, *kinds: Kind) -> Iterator[None]:
    """Within the block, layers of these kinds read nothing from more than `reach` - 1 tokens ago.

    All else stays: the same weights between near tokens, the convolution before a recurrence, the other layers. Only
    for one story at a time.

    Raises:
        InputError: `reach` is below 1, or a kind is neither "recurrence" nor "attention".
    """
    if reach < 1:
        raise InputError("reach", f"must be at least 1, got {reach}")
    if unknown := set(kinds) - set(LAYERS):
        raise InputError("kinds", f"must be among {', '.join(LAYERS)}, got {sorted(unknown)[0]!r}")

    def shorten(layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        reading = reading_of(layer, arguments[0][0])
        return reading.output(reading.within(reach))[None]

    with ExitStack() as hooks:
        for _, layer in _layers(network):
            if isinstance(layer, tuple(LAYERS[kind] for kind in kinds)):
                hooks.enter_context(_removed(layer.register_forward_hook(shorten)))
        yield


@torch.no_grad()
def change_of_memory(network: StoryNetwork, tokens: tuple[int, ...]) -> Floats:
    """(T, L): how far each token moves a recurrence's memory, as a share of what the memory is after it.

    By the network's own step form, one token after the other, as it decodes. 1 for the first token, which finds
    nothing there.
    """
    state = network.initial_state(1)
    before = _memories(state.layers)
    changes = []
    for token in tokens:
        _, state = network.step(torch.tensor([token]), state)
        after = _memories(state.layers)
        changes.append(
            [float((new - old).norm() / new.norm()) for new, old in zip(after, before, strict=True)]
        )
        before = after
    return np.array(changes, np.float32)


def _memories(layers: tuple[Any, ...]) -> list[Tensor]:
    return [layer.memory_BHNP for layer in layers if isinstance(layer, RecurrentState)]


def _layers(network: StoryNetwork) -> Iterator[tuple[int, Recurrence | Attention]]:
    for number, block in enumerate(network.blocks):
        yield number, cast(Block, block).mixer


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    """A hook that goes with its block."""
    try:
        yield
    finally:
        handle.remove()
