"""Trace one story through the network: with which weight each token reads each earlier token, and what depends on it.

The network computes its recurrence in chunks and its attention in one fused call, and neither ever holds these weights.
Here they are formed explicitly from the same parameters and the inputs that hooks capture, so they can be inspected and
changed; tests hold them to the layers' own output. What stories and names cost when one kind of layer sees fewer tokens
says which layers keep what.

The first mention of a name can only be guessed; from the second on it can be copied from the context. Names are
recognised as `experiments.quality` does: a capitalised word in mid-sentence. So "Grandma" and "Monday" count too, which
are easier to guess than "Delroy". All intervals are 95 %, over stories.

Shapes: T tokens (row: the one that reads, column: the one that is read), D width, H heads, N keys and P values a
head, K convolution taps, M channels that the convolution mixes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.common.statistics import ratio_of_sums
from experiments.quality.generation import names_in
from model.architecture.folder import END_ID
from model.architecture.network import Attention, Block, Recurrence, StoryNetwork, rms_norm, rotate
from model.architecture.tokenizer import StoryTokenizer
from model.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

Kind = Literal["recurrence", "attention"]
LAYERS: dict[Kind, type[Recurrence] | type[Attention]] = {"recurrence": Recurrence, "attention": Attention}
LONGEST = 2048
"""Tokens of a story at most: the weights of a layer grow with their square."""
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RecurrenceWeights:
    """A recurrence: memory <- keep * memory + key value^T, read by a query."""

    layer: Recurrence
    keep_TH: Tensor
    """Share of the memory that is kept at a token; it does not apply to what the token writes."""
    key_THN: Tensor
    """Includes the write strength."""
    value_THP: Tensor
    gate_TE: Tensor
    weight_HTT: Tensor
    """Signed and unbounded: the layer normalises what it has read."""

    @classmethod
    def of(cls, layer: Recurrence, x_TD: Tensor) -> RecurrenceWeights:
        """Compute them from the layer's input."""
        sizes, heads, time = layer.sizes, layer.config.heads, len(x_TD)
        mixed_TM, gate_TE = layer.inputs(x_TD).split([sum(sizes), layer.inputs.out_features - sum(sizes)], -1)
        padded = F.pad(mixed_TM, (0, 0, layer.config.conv_width - 1, 0))
        mixed_TM = cast(Tensor, sum(tap * padded[k : k + time] for k, tap in enumerate(layer.conv)))
        query, key, value = (part.unflatten(-1, (heads, -1)) for part in F.silu(mixed_TM).split(sizes, -1))
        query = query / math.sqrt(layer.config.key_dim)
        write_TH = F.softplus(layer.rate(x_TD))
        key = key * write_TH[..., None]
        log_keep_TH = -write_TH * layer.log_decay.exp()
        weight_HTT = torch.einsum("ihn,jhn->hij", query, key) * _decay(log_keep_TH)
        return cls(layer, log_keep_TH.exp(), key, value, gate_TE, weight_HTT)

    def output(self, weight_HTT: Tensor) -> Tensor:
        """Return the layer's output (T, D) for these weights."""
        read_THP = torch.einsum("hij,jhp->ihp", weight_HTT, self.value_THP) + self.layer.skip * self.value_THP
        return cast(Tensor, self.layer.output(rms_norm(read_THP).flatten(1) * F.silu(self.gate_TE)))

    def within(self, reach: int) -> Tensor:
        """Return the weights if a token could read only the last `reach` tokens, its own included."""
        return self.weight_HTT.masked_fill(~_near(self.weight_HTT.size(-1), reach), 0.0)

    def survival(self) -> Tensor:
        """Return (H, T, T): the share of what a token (column) wrote that is left at a later one (row)."""
        return _decay(self.keep_TH.log())

    def left_at_the_end(self) -> Tensor:
        """Return (H, T): the size of what each token wrote, as far as it is left after the last token."""
        written_TH = self.key_THN.norm(dim=-1) * self.value_THP.norm(dim=-1)  # of an outer product
        left_HT: Tensor = written_TH.T * self.survival()[:, -1]
        return left_HT

    def half_life(self) -> Tensor:
        """Return (H,): tokens after which half of the memory has decayed, at this story's mean rate."""
        rate_H: Tensor = -self.keep_TH.log().mean(0)
        return math.log(2) * rate_H.reciprocal()


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Attention over the last W tokens, with the methods of `RecurrenceWeights`."""

    layer: Attention
    value_TP: Tensor
    weight_HTT: Tensor
    """Each row is positive and sums to 1."""

    @classmethod
    def of(cls, layer: Attention, x_TD: Tensor) -> AttentionWeights:
        """Compute them from the layer's input."""
        position_T = torch.arange(len(x_TD))
        query, key, value = layer.inputs(x_TD).split(layer.sizes, -1)
        query_THP, key_TP = query.unflatten(-1, (layer.config.heads, -1)), key[:, None]
        base = layer.config.rope_base
        query_THP = rotate(rms_norm(query_THP), position_T, base) * layer.gain
        key_TP = rotate(rms_norm(key_TP), position_T, base)[:, 0]
        score_HTT = torch.einsum("ihp,jp->hij", query_THP, key_TP) / math.sqrt(layer.config.head_dim)
        near_TT = _near(len(x_TD), layer.config.window)
        return cls(layer, value, score_HTT.masked_fill(~near_TT, -torch.inf).softmax(-1))

    def output(self, weight_HTT: Tensor) -> Tensor:
        return cast(Tensor, self.layer.output((weight_HTT @ self.value_TP).transpose(0, 1).flatten(1)))

    def within(self, reach: int) -> Tensor:
        near = self.weight_HTT.masked_fill(~_near(self.weight_HTT.size(-1), reach), 0.0)
        return near / near.sum(-1, keepdim=True)


LayerWeights = RecurrenceWeights | AttentionWeights


def layer_weights(layer: Recurrence | Attention, x_TD: Tensor) -> LayerWeights:
    """Compute the weights of either kind of layer from its input."""
    kind = RecurrenceWeights if isinstance(layer, Recurrence) else AttentionWeights
    return kind.of(cast(Any, layer), x_TD)


@dataclass(frozen=True, slots=True)
class StoryTrace:
    """What happened in the network as it read one story."""

    tokens: tuple[int, ...]
    """The first is the end of the story before."""
    texts: tuple[str, ...]
    """Text of each token; that of the first is empty."""
    nats: Floats
    """Loss of each token, given those before it; NaN for the first."""
    recurrences: dict[int, RecurrenceWeights]
    """By the number of the layer, counted from 0."""
    attentions: dict[int, AttentionWeights]


def encode(tokenizer: StoryTokenizer, text: str) -> tuple[int, ...]:
    """Return a story's tokens after the start token. Raises `InputError` for one that is empty or too long."""
    tokens = (END_ID, *tokenizer.encode(text))
    if not 2 <= len(tokens) <= LONGEST:
        raise InputError("text", f"must be a story of 1 to {LONGEST - 1} tokens, got {len(tokens) - 1}")
    return tokens


def trace_story(network: StoryNetwork, tokenizer: StoryTokenizer, text: str) -> StoryTrace:
    """Read `text` and keep every layer's weights. Raises as `encode` does."""
    return trace_tokens(network, tokenizer, encode(tokenizer, text))


@torch.no_grad()
def trace_tokens(network: StoryNetwork, tokenizer: StoryTokenizer, tokens: tuple[int, ...]) -> StoryTrace:
    """Do as `trace_story`, for the tokens of a story, of which the first is the start token."""
    inputs: dict[int, Tensor] = {}

    def capture(number: int) -> Any:
        def hook(module: Any, arguments: tuple[Tensor, ...]) -> None:
            inputs[number] = arguments[0][0]

        return hook

    with ExitStack() as stack:
        for number, layer in _layers(network):
            stack.callback(layer.register_forward_pre_hook(capture(number)).remove)
        nats = token_nats(network, tokens)
    weights = {number: layer_weights(layer, inputs[number]) for number, layer in _layers(network)}
    return StoryTrace(
        tokens=tokens,
        texts=tuple(tokenizer.token_text(token) or "�" * (token != END_ID) for token in tokens),
        nats=nats,
        recurrences={number: one for number, one in weights.items() if isinstance(one, RecurrenceWeights)},
        attentions={number: one for number, one in weights.items() if isinstance(one, AttentionWeights)},
    )


@torch.no_grad()
def token_nats(network: StoryNetwork, tokens: tuple[int, ...]) -> Floats:
    """Return the loss of each token of one story, in nats; NaN for the first."""
    ids = torch.tensor(tokens)
    logits_TV = network(ids[None])[0].float()
    nats = F.cross_entropy(logits_TV[:-1], ids[1:], reduction="none").numpy()
    return np.concatenate([np.full(1, np.nan, np.float32), nats])


@contextmanager
def limited_reach(network: StoryNetwork, reach: int, *kinds: Kind) -> Iterator[None]:
    """Limit layers of these kinds to the last `reach` tokens while the context is open.

    Everything else stays: the weights between near tokens, the convolution before a recurrence, the other layers. Works
    for one story at a time.

    Raises:
        InputError: `reach` is below 1, or a kind is neither "recurrence" nor "attention".
    """
    if reach < 1:
        raise InputError("reach", f"must be at least 1, got {reach}")
    if unknown := set(kinds) - set(LAYERS):
        raise InputError("kinds", f"must be among {', '.join(LAYERS)}, got {sorted(unknown)[0]!r}")

    def limit(layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weights = layer_weights(layer, arguments[0][0])
        return weights.output(weights.within(reach))[None]

    with ExitStack() as stack:
        for _, layer in _layers(network):
            if isinstance(layer, tuple(LAYERS[kind] for kind in kinds)):
                stack.callback(layer.register_forward_hook(limit).remove)
        yield


def _layers(network: StoryNetwork) -> Iterator[tuple[int, Recurrence | Attention]]:
    for number, block in enumerate(network.blocks):
        yield number, cast(Block, block).mixer


def _near(time: int, reach: int) -> Tensor:
    """Return (T, T): whether the column's token is the row's own or one of the `reach` - 1 before it."""
    ago_TT = torch.arange(time)[:, None] - torch.arange(time)
    return (ago_TT >= 0) & (ago_TT < reach)


def _decay(log_keep_TH: Tensor) -> Tensor:
    """Return (H, T, T): the product of what is kept after the column's token up to the row's; 0 before it."""
    total_HT = log_keep_TH.cumsum(0).T
    gap_HTT = total_HT[:, :, None] - total_HT[:, None, :]
    return gap_HTT.masked_fill(~_near(gap_HTT.size(-1), gap_HTT.size(-1)), -torch.inf).exp()


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
