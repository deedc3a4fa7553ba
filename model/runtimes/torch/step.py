"""One decode step of many streams in PyTorch, over buffers that stay where they are.

The same function as `StoryNetwork.step`, made for decoding: the states of all streams lie in a few arrays that the
step changes in place, so nothing of a ring is copied to write one place of it, and a CUDA graph, which knows only
addresses, can replay the step. Nothing here asks the device for a value, so nothing waits for it.

What is prepared once: the embedding's normed rows, a recurrence's three input products as one, attention's norm,
rotation and scale for queries and key together.

Shapes: B rows of the step, D width, V vocabulary, H heads, P values a head, N keys a head, W window, K convolution
taps, M channels that the convolution mixes, E = H x P, U width of the MLP, R recurrent layers, A attention layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.architecture.config import ModelConfig
from model.architecture.network import Attention, Block, Recurrence, StoryNetwork, rms_norm


@dataclass(frozen=True, slots=True)
class RecurrenceWeights:
    """One recurrent layer's mixer."""

    inputs_DC: Tensor
    """To the convolution's channels, the gate and the write strength: C = M + E + H."""
    sizes: tuple[int, int, int]
    rate_bias_H: Tensor
    decay_H: Tensor
    """Log of the decay for a write strength of one; negative."""
    taps_KM: Tensor
    skip_H1: Tensor
    output_ED: Tensor


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """One attention layer's mixer."""

    inputs_DC: Tensor
    """To the queries, the key and the value: C = E + 2 P."""
    gain_G1: Tensor
    """(H + 1, 1): of each query, with the scale of scores, and one for the key."""
    output_ED: Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A mixer and the MLP behind it."""

    mixer: RecurrenceWeights | AttentionWeights
    up_DU: Tensor
    down_UD: Tensor


@dataclass(frozen=True, slots=True)
class StepWeights:
    """A network laid out for decoding, on one device, in fp32."""

    config: ModelConfig
    normed_VD: Tensor
    output_DV: Tensor
    layers: tuple[LayerWeights, ...]
    frequency_Q: Tensor
    """(P / 2): turns of the rotary positions a token, float64, so that a far token's angle is exact."""

    @property
    def device(self) -> torch.device:
        return self.output_DV.device

    @classmethod
    @torch.no_grad()
    def of(cls, network: StoryNetwork, device: torch.device) -> StepWeights:
        """Copy the weights of `network` to `device`."""

        def here(value: Tensor) -> Tensor:
            # A copy always: a network that goes on being trained must not change a runtime.
            return torch.empty_like(value, device=device, memory_format=torch.contiguous_format).copy_(value)

        layers = []
        for block in network.blocks:
            assert isinstance(block, Block)
            mixer: RecurrenceWeights | AttentionWeights
            if isinstance(block.mixer, Recurrence):
                mixer = _recurrence(block.mixer, here)
            else:
                mixer = _attention(block.mixer, here)
            layers.append(LayerWeights(mixer, here(block.up.weight.t()), here(block.down.weight.t())))
        config, table_VD = network.config, network.embedding.weight
        half = config.head_dim // 2
        frequency_Q = config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        normed_VD = here(rms_norm(table_VD))
        return cls(config, normed_VD, here(table_VD.t()), tuple(layers), here(frequency_Q))


def _recurrence(mixer: Recurrence, here: Callable[[Tensor], Tensor]) -> RecurrenceWeights:
    channels, heads = sum(mixer.sizes), mixer.config.heads
    inputs_CD = torch.cat([mixer.inputs.weight, mixer.rate.weight])
    sizes = (channels, len(inputs_CD) - channels - heads, heads)
    return RecurrenceWeights(
        here(inputs_CD.t()),
        sizes,
        here(mixer.rate.bias),
        here(-mixer.log_decay.exp()),
        here(mixer.conv),
        here(mixer.skip),
        here(mixer.output.weight.t()),
    )


def _attention(mixer: Attention, here: Callable[[Tensor], Tensor]) -> AttentionWeights:
    scaled_H1 = mixer.gain * mixer.config.head_dim**-0.5
    gain_G1 = torch.cat([scaled_H1, torch.ones_like(scaled_H1[:1])])
    return AttentionWeights(here(mixer.inputs.weight.t()), here(gain_G1), here(mixer.output.weight.t()))


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """All that a step reads and writes, for `room` streams; every tensor keeps its address."""

    feed_2B: Tensor
    """The tokens to take in, and how many tokens of its story each row has taken in before."""
    logits_BV: Tensor
    conv_RBKM: Tensor
    """The convolution's last K - 1 inputs, oldest first."""
    memory_RBHNP: Tensor
    ring_ABWP: Tensor
    """(2 A, ...): keys (rotated), then values, of each attention layer; a token stands at its position modulo W."""

    @classmethod
    def make(cls, config: ModelConfig, room: int, device: torch.device) -> StepBuffers:
        recurrent, attentive = config.pattern.count("R"), config.pattern.count("A")
        heads, keys, values = config.heads, config.key_dim, config.head_dim
        channels = 2 * heads * keys + heads * values

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            zeros(2, room, dtype=torch.int64),
            zeros(room, config.vocab_size),
            zeros(recurrent, room, config.conv_width - 1, channels),
            zeros(recurrent, room, heads, keys, values),
            zeros(2 * attentive, room, config.window, values),
        )

    def clear(self) -> None:
        """Back to zeros, in place."""
        for part in (self.feed_2B, self.logits_BV, self.conv_RBKM, self.memory_RBHNP, self.ring_ABWP):
            part.zero_()


@torch.no_grad()
def decode_step(weights: StepWeights, buffers: StepBuffers, first: int, rows: int) -> None:
    """Advance the `rows` streams from `first` on by the token that each is fed; their logits are written.

    A stream that begins a story must hold an empty state and the position 0: the step itself does not look for
    the end of story, which only the host has to know of.
    """
    config, last = weights.config, first + rows
    token_B, position_B = buffers.feed_2B[0, first:last], buffers.feed_2B[1, first:last]
    x_BD = weights.normed_VD.index_select(0, token_B)
    angle_B1Q = (position_B.double()[:, None] * weights.frequency_Q)[:, None]
    cos_B1Q, sin_B1Q = angle_B1Q.cos().float(), angle_B1Q.sin().float()
    place_W = torch.arange(config.window, device=x_BD.device)
    unseen_B1W = (place_W > position_B[:, None])[:, None]
    at_ring = (torch.arange(rows, device=x_BD.device), position_B % config.window)
    recurrent = attentive = 0
    for layer in weights.layers:
        mixer = layer.mixer
        if isinstance(mixer, RecurrenceWeights):
            conv_BKM = buffers.conv_RBKM[recurrent, first:last]
            memory_BHNP = buffers.memory_RBHNP[recurrent, first:last]
            y_BE = _recur(config, mixer, rms_norm(x_BD), conv_BKM, memory_BHNP)
            recurrent += 1
        else:
            key_BWP, value_BWP = buffers.ring_ABWP[attentive : attentive + 2, first:last].unbind(0)
            heads_BGP, value_BP = project(config, mixer, rms_norm(x_BD), cos_B1Q, sin_B1Q)
            key_BWP.index_put_(at_ring, heads_BGP[:, -1])
            value_BWP.index_put_(at_ring, value_BP)
            score_BHW = heads_BGP[:, :-1] @ key_BWP.transpose(1, 2)
            weight_BHW = score_BHW.masked_fill_(unseen_B1W, -torch.inf).softmax(-1)
            y_BE = (weight_BHW @ value_BWP).flatten(1)
            attentive += 2
        x_BD = finish_layer(layer, x_BD, y_BE)
    torch.mm(rms_norm(x_BD), weights.output_DV, out=buffers.logits_BV[first:last])


def _recur(
    config: ModelConfig, mixer: RecurrenceWeights, x_BD: Tensor, conv_BKM: Tensor, memory_BHNP: Tensor
) -> Tensor:
    """The recurrence for one token; convolution inputs and memory are changed in place."""
    mixed_BM, gate_BE, rate_BH = (x_BD @ mixer.inputs_DC).split(mixer.sizes, dim=-1)
    seen_BKM = torch.cat([conv_BKM, mixed_BM[:, None]], dim=1)
    conv_BKM.copy_(seen_BKM[:, 1:])
    query_BHN, key_BHN, value_BHP = split_heads(config, F.silu((seen_BKM * mixer.taps_KM).sum(1)))
    write_BH = F.softplus(rate_BH + mixer.rate_bias_H)
    memory_BHNP.mul_((write_BH * mixer.decay_H).exp()[..., None, None])
    memory_BHNP.addcmul_((key_BHN * write_BH[..., None])[..., None], value_BHP[..., None, :])
    read_BHP = (query_BHN[..., None, :] @ memory_BHNP).squeeze(-2) + mixer.skip_H1 * value_BHP
    return rms_norm(read_BHP).flatten(1) * F.silu(gate_BE)


def split_heads(config: ModelConfig, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., M) -> query (..., H, N), with the scale of reads, key (..., H, N), value (..., H, P)."""
    heads, keys, values = config.heads, config.key_dim, config.head_dim
    query, key, value = mixed.split((heads * keys, heads * keys, heads * values), dim=-1)
    query = query.unflatten(-1, (heads, keys)) * keys**-0.5
    return query, key.unflatten(-1, (heads, keys)), value.unflatten(-1, (heads, values))


def project(
    config: ModelConfig, mixer: AttentionWeights, x_BD: Tensor, cos_B1Q: Tensor, sin_B1Q: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and, as the last head, the key, normed, rotated and scaled (B, H + 1, P); and the value (B, P)."""
    heads_BC, value_BP = (x_BD @ mixer.inputs_DC).split(
        ((config.heads + 1) * config.head_dim, config.head_dim), dim=-1
    )
    heads_BGP = rms_norm(heads_BC.unflatten(-1, (config.heads + 1, config.head_dim)))
    left, right = heads_BGP.chunk(2, dim=-1)
    turned = torch.cat([left * cos_B1Q - right * sin_B1Q, right * cos_B1Q + left * sin_B1Q], dim=-1)
    return turned * mixer.gain_G1, value_BP


def finish_layer(layer: LayerWeights, x_BD: Tensor, y_BE: Tensor) -> Tensor:
    """Add the mixer's output to the residual stream, then the MLP's."""
    x_BD = torch.addmm(x_BD, y_BE, layer.mixer.output_ED)
    return torch.addmm(x_BD, (rms_norm(x_BD) @ layer.up_DU).relu_().square_(), layer.down_UD)
