"""Both kinds of layer written out: with which weight each token reads each token before it.

The network computes its recurrence in chunks and its attention in one fused call, and neither ever holds these
weights. Here they are formed one by one from the same parameters, for one story, so that they can be looked at and
changed; that they are what the network computes is tested against its own output.

Shapes: T tokens (row: the one that reads, column: the one that is read), D width, H heads, N keys and P values a
head, K convolution taps, M channels that the convolution mixes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from model.architecture.network import Attention, Recurrence, rms_norm, rotate


class Reading(Protocol):
    """A layer at work on one story."""

    @property
    def weight_HTT(self) -> Tensor:
        """With which weight each token reads each one before it."""

    def output(self, weight_HTT: Tensor) -> Tensor:
        """What the layer would put out (T, D) if it read with these weights."""

    def within(self, reach: int) -> Tensor:
        """The weights it would read with if nothing from more than `reach` - 1 tokens ago could be read."""


@dataclass(frozen=True, slots=True)
class RecurrenceReading:
    """A recurrence: memory <- keep * memory + key value^T, read out by a query."""

    layer: Recurrence
    keep_TH: Tensor
    """Share of the memory that is kept as a token comes; what it writes itself is not faded by it."""
    query_THN: Tensor
    key_THN: Tensor
    """With the write strength in it."""
    value_THP: Tensor
    gate_TE: Tensor
    weight_HTT: Tensor
    """Signed, and of any size: the layer norms what it has read."""

    @classmethod
    def of(cls, layer: Recurrence, x_TD: Tensor) -> RecurrenceReading:
        """Read one story; `x_TD` is what the layer is given."""
        sizes, heads, time = layer.sizes, layer.config.heads, len(x_TD)
        mixed_TM, gate_TE = layer.inputs(x_TD).split([sum(sizes), layer.inputs.out_features - sum(sizes)], -1)
        padded = F.pad(mixed_TM, (0, 0, layer.config.conv_width - 1, 0))
        mixed_TM = cast(Tensor, sum(tap * padded[k : k + time] for k, tap in enumerate(layer.conv)))
        query, key, value = (part.unflatten(-1, (heads, -1)) for part in F.silu(mixed_TM).split(sizes, -1))
        query = query / math.sqrt(layer.config.key_dim)
        write_TH = F.softplus(layer.rate(x_TD))
        key = key * write_TH[..., None]
        log_keep_TH = -write_TH * layer.log_decay.exp()
        fade_HTT = _fade(log_keep_TH)
        weight_HTT = torch.einsum("ihn,jhn->hij", query, key) * fade_HTT
        return cls(layer, log_keep_TH.exp(), query, key, value, gate_TE, weight_HTT)

    def output(self, weight_HTT: Tensor) -> Tensor:
        read_THP = torch.einsum("hij,jhp->ihp", weight_HTT, self.value_THP) + self.layer.skip * self.value_THP
        return cast(Tensor, self.layer.output(rms_norm(read_THP).flatten(1) * F.silu(self.gate_TE)))

    def within(self, reach: int) -> Tensor:
        return self.weight_HTT.masked_fill(~_near(self.weight_HTT.size(-1), reach), 0.0)

    def survival(self) -> Tensor:
        """(H, T, T): of what a token (column) put into the memory, the share that is left at a later one (row)."""
        return _fade(self.keep_TH.log())

    def left_at_the_end(self) -> Tensor:
        """(H, T): size of what each token put into the memory, as much of it as is left after the last token."""
        written_TH = self.key_THN.norm(dim=-1) * self.value_THP.norm(dim=-1)  # of an outer product
        left_HT: Tensor = written_TH.T * self.survival()[:, -1]
        return left_HT

    def half_life(self) -> Tensor:
        """(H,): tokens after which half of the memory has faded, at this story's mean rate."""
        rate_H: Tensor = -self.keep_TH.log().mean(0)
        return math.log(2) * rate_H.reciprocal()


@dataclass(frozen=True, slots=True)
class AttentionReading:
    """Attention over the last W tokens."""

    layer: Attention
    value_TP: Tensor
    weight_HTT: Tensor
    """Each row is of positive numbers that sum to 1."""

    @classmethod
    def of(cls, layer: Attention, x_TD: Tensor) -> AttentionReading:
        """Read one story; `x_TD` is what the layer is given."""
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


def reading_of(layer: Recurrence | Attention, x_TD: Tensor) -> RecurrenceReading | AttentionReading:
    """The reading of either kind of layer."""
    return (
        RecurrenceReading.of(layer, x_TD)
        if isinstance(layer, Recurrence)
        else AttentionReading.of(layer, x_TD)
    )


def _near(time: int, reach: int) -> Tensor:
    """(T, T): whether the column's token is the row's own or one of the `reach` - 1 before it."""
    ago_TT = torch.arange(time)[:, None] - torch.arange(time)
    return (ago_TT >= 0) & (ago_TT < reach)


def _fade(log_keep_TH: Tensor) -> Tensor:
    """(H, T, T): the product of what is kept at each token after the column's, up to the row's; 0 before it."""
    total_HT = log_keep_TH.cumsum(0).T
    gap_HTT = total_HT[:, :, None] - total_HT[:, None, :]
    return gap_HTT.masked_fill(~_near(gap_HTT.size(-1), gap_HTT.size(-1)), -torch.inf).exp()
