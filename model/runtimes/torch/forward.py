"""The network in PyTorch, laid out for decoding: one step of many streams, and a prompt's tokens at once.

`decode_step` is the same function as `StoryNetwork.step`, over buffers that keep their addresses: the states of all
streams lie in a few arrays that it changes in place, so nothing of a ring is copied to write one place of it, and a
CUDA graph can replay it. It never asks the device for a value, so nothing waits for it.

`prefill_chunk` launches about as many operations (243) for a whole chunk as a step does for one token. Inside the chunk
the recurrence is a masked matrix product (as in `StoryNetwork.forward`), what was before it comes in by the state.
States are values there: nothing that is handed in is changed.

Prepared once: the embedding's normed rows, a recurrence's three input products as one, attention's norm, rotation and
scale for queries and key together.

A decode step is 243 small operations, and choosing tokens 69 more. Launched one by one from Python they keep a GPU
waiting; a CUDA graph (`CudaGraphs`) launches them as one. It knows addresses, so all it reads and writes must stay
where it is, and its shapes are fixed: there is one for each number of rows out of a few (`bucket_sizes`), and a batch
is padded to the next. On the CPU nothing is captured; the tests stand in for a capture with a recorder that does what
it does to the memory it touches, and those marked `cuda` run where there is a GPU.

Shapes: B rows of a step, T tokens of a prefill, D width, V vocabulary, H heads, P values a head, N keys a head,
W window, K convolution taps, M channels that the convolution mixes, E = H x P, U width of the MLP, R recurrent layers,
A attention layers, G = H + 1, Q = P / 2, C columns of an input product, S places that attention sees in a prefill.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from model.architecture.folder import ModelConfig
from model.architecture.network import Attention, Block, Recurrence, StoryNetwork, rms_norm, split_heads

WARM_UPS = 3
"""Runs before a capture, in which libraries make their handles and workspaces: forbidden while capturing."""

Work = Callable[[], None]
Recorder = Callable[[Work], Work]
"""Turns work into something that can be launched again and again.

The work must read and write nothing but memory that keeps its address and is not in use. It may be run any number of
times while it is recorded."""


def eager(work: Work) -> Work:
    """Launch work by doing it."""
    return work


class CudaGraphs:
    """Captures work in CUDA graphs that share one pool of memory, since they are never launched at once."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool: Any = None

    def __call__(self, work: Work) -> Work:
        with exact_products():
            # Warmed up on the stream of the capture: cuBLAS keeps a workspace for each stream.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # By default an allocation anywhere in the process breaks a capture, for instance one by the engine
            # of another model that goes on writing; only this thread's calls can do harm here.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        self._pool = graph.pool()
        return graph.replay


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products in whole fp32: TF32, which training may have turned on, moves logits by more than 1e-3."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


def bucket_sizes(most: int) -> list[int]:
    """The powers of two up to the first that is at least `most`."""
    return [1 << power for power in range((most - 1).bit_length() + 1)]


def cover(count: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Launches, as (first row, rows), that together take in the first `count` rows.

    `sizes` are powers of two in ascending order. One launch if a size is large enough; else as many of the largest
    as are needed, with the last as small as can be.
    """
    launches = []
    first = 0
    while first < count:
        size = next((size for size in sizes if size >= count - first), sizes[-1])
        launches.append((first, size))
        first += size
    return launches


@dataclass(frozen=True, slots=True)
class RecurrenceWeights:
    """One recurrent layer's mixer."""

    inputs_DC: Tensor
    """C = M + E + H: to the convolution's channels, the gate and the write strength."""
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
    """C = E + 2 P: to the queries, the key and the value."""
    gain_G1: Tensor
    """Of each query, with the scale of scores, and one for the key."""
    output_ED: Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A mixer and the MLP behind it."""

    mixer: RecurrenceWeights | AttentionWeights
    up_DU: Tensor
    down_UD: Tensor


@dataclass(frozen=True, slots=True)
class NetworkWeights:
    """All weights, on one device, in fp32."""

    config: ModelConfig
    normed_VD: Tensor
    output_DV: Tensor
    layers: tuple[LayerWeights, ...]
    frequency_Q: Tensor
    """Turns of the rotary positions a token, float64, so that a far token's angle is exact."""

    @property
    def device(self) -> torch.device:
        return self.output_DV.device

    @classmethod
    @torch.no_grad()
    def of(cls, network: StoryNetwork, device: torch.device) -> Self:
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
    """All that a step reads and writes, for `capacity` streams; every tensor keeps its address."""

    feed_2B: Tensor
    """The tokens to take in, and how many tokens of its story each row has taken in before."""
    logits_BV: Tensor
    conv_RBKM: Tensor
    """The convolution's last K - 1 inputs, oldest first."""
    memory_RBHNP: Tensor
    ring_ABWP: Tensor
    """(2 A, ...): keys (rotated), then values, of each attention layer; a token stands at its position modulo W."""

    @classmethod
    def make(cls, config: ModelConfig, capacity: int, device: torch.device) -> Self:
        recurrent, attentive = config.pattern.count("R"), config.pattern.count("A")
        heads, keys, values = config.heads, config.key_dim, config.head_dim
        channels = 2 * heads * keys + heads * values

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            zeros(2, capacity, dtype=torch.int64),
            zeros(capacity, config.vocab_size),
            zeros(recurrent, capacity, config.conv_width - 1, channels),
            zeros(recurrent, capacity, heads, keys, values),
            zeros(2 * attentive, capacity, config.window, values),
        )

    def clear(self) -> None:
        """Back to zeros, in place."""
        for part in (self.feed_2B, self.logits_BV, self.conv_RBKM, self.memory_RBHNP, self.ring_ABWP):
            part.zero_()


@dataclass(frozen=True, slots=True, eq=False)
class TorchState:
    """One stream's state on the device: about half a megabyte, however long the story."""

    position: int
    """Tokens taken in since the story began."""
    conv_RKM: Tensor
    memory_RHNP: Tensor
    ring_AWP: Tensor


def empty_state(config: ModelConfig, device: torch.device) -> TorchState:
    """The state before the first token of a story."""
    one = StepBuffers.make(config, 1, device)
    return TorchState(0, one.conv_RBKM[:, 0], one.memory_RBHNP[:, 0], one.ring_ABWP[:, 0])


@torch.no_grad()
def decode_step(weights: NetworkWeights, buffers: StepBuffers, first: int, rows: int) -> None:
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
            heads_BGP, value_BP = _project(config, mixer, rms_norm(x_BD), cos_B1Q, sin_B1Q)
            key_BWP.index_put_(at_ring, heads_BGP[:, -1])
            value_BWP.index_put_(at_ring, value_BP)
            score_BHW = heads_BGP[:, :-1] @ key_BWP.transpose(1, 2)
            weight_BHW = score_BHW.masked_fill_(unseen_B1W, -torch.inf).softmax(-1)
            y_BE = (weight_BHW @ value_BWP).flatten(1)
            attentive += 2
        x_BD = _finish_layer(layer, x_BD, y_BE)
    torch.mm(rms_norm(x_BD), weights.output_DV, out=buffers.logits_BV[first:last])


def _recur(
    config: ModelConfig, mixer: RecurrenceWeights, x_BD: Tensor, conv_BKM: Tensor, memory_BHNP: Tensor
) -> Tensor:
    """The recurrence for one token; convolution inputs and memory are changed in place."""
    mixed_BM, gate_BE, rate_BH = (x_BD @ mixer.inputs_DC).split(mixer.sizes, dim=-1)
    seen_BKM = torch.cat([conv_BKM, mixed_BM[:, None]], dim=1)
    conv_BKM.copy_(seen_BKM[:, 1:])
    query_BHN, key_BHN, value_BHP = split_heads(config, (seen_BKM * mixer.taps_KM).sum(1))
    write_BH = F.softplus(rate_BH + mixer.rate_bias_H)
    memory_BHNP.mul_((write_BH * mixer.decay_H).exp()[..., None, None])
    memory_BHNP.addcmul_((key_BHN * write_BH[..., None])[..., None], value_BHP[..., None, :])
    read_BHP = (query_BHN[..., None, :] @ memory_BHNP).squeeze(-2) + mixer.skip_H1 * value_BHP
    return rms_norm(read_BHP).flatten(1) * F.silu(gate_BE)


@torch.no_grad()
def prefill_chunk(
    weights: NetworkWeights, token_T: Tensor, state: TorchState, *, every: bool = False
) -> tuple[Tensor, TorchState]:
    """Take in `token_T` of one story (an end of story only as its very first token, with the empty state).

    Returns the logits that follow the last token (1, V), or with `every` each one (T, V), and the new state.
    """
    config, time, start = weights.config, len(token_T), state.position
    device = token_T.device
    position_T = torch.arange(start, start + time, device=device)
    angle_T1Q = (position_T.double()[:, None] * weights.frequency_Q)[:, None]
    cos_T1Q, sin_T1Q = angle_T1Q.cos().float(), angle_T1Q.sin().float()
    unseen_TS = ~_visible(start, position_T, config.window)
    newest = min(time, config.window)  # of more tokens than the ring has places, the last ones stay
    slot_T = position_T[-newest:] % config.window
    x_TD = weights.normed_VD.index_select(0, token_T)
    ring_AWP = state.ring_AWP.clone()
    conv, memory = list[Tensor](), list[Tensor]()
    attentive = 0
    for layer in weights.layers:
        mixer = layer.mixer
        if isinstance(mixer, RecurrenceWeights):
            index = len(conv)
            y_TE, conv_KM, memory_HNP = _recur_chunk(
                config, mixer, rms_norm(x_TD), state.conv_RKM[index], state.memory_RHNP[index]
            )
            conv.append(conv_KM)
            memory.append(memory_HNP)
        else:
            heads_TGP, value_TP = _project(config, mixer, rms_norm(x_TD), cos_T1Q, sin_T1Q)
            key_TP = heads_TGP[:, -1]
            # S: the places of the ring as it was, then the tokens of this chunk.
            key_SP = torch.cat([state.ring_AWP[attentive], key_TP])
            value_SP = torch.cat([state.ring_AWP[attentive + 1], value_TP])
            score_HTS = heads_TGP[:, :-1].transpose(0, 1) @ key_SP.t()
            weight_HTS = score_HTS.masked_fill_(unseen_TS, -torch.inf).softmax(-1)
            y_TE = (weight_HTS @ value_SP).transpose(0, 1).flatten(1)
            ring_AWP[attentive].index_copy_(0, slot_T, key_TP[-newest:])
            ring_AWP[attentive + 1].index_copy_(0, slot_T, value_TP[-newest:])
            attentive += 2
        x_TD = _finish_layer(layer, x_TD, y_TE)
    logits_TV = rms_norm(x_TD if every else x_TD[-1:]) @ weights.output_DV
    conv_RKM = torch.stack(conv) if conv else state.conv_RKM
    memory_RHNP = torch.stack(memory) if memory else state.memory_RHNP
    return logits_TV, TorchState(start + time, conv_RKM, memory_RHNP, ring_AWP)


def _visible(start: int, position_T: Tensor, window: int) -> Tensor:
    """(T, W + T): whether a query may look at a place of the ring, and at a token that is fed with it."""
    place_W = torch.arange(window, device=position_T.device)
    held_W = start - 1 - (start - 1 - place_W) % window  # the position that each place holds; negative: none
    key_S, query_T1 = torch.cat([held_W, position_T]), position_T[:, None]
    return (key_S >= 0) & (key_S <= query_T1) & (key_S > query_T1 - window)


def _recur_chunk(
    config: ModelConfig, mixer: RecurrenceWeights, x_TD: Tensor, conv_KM: Tensor, memory_HNP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over a chunk: its output, and the new convolution inputs and memory."""
    time, taps = len(x_TD), config.conv_width
    mixed_TM, gate_TE, rate_TH = (x_TD @ mixer.inputs_DC).split(mixer.sizes, dim=-1)
    seen = torch.cat([conv_KM, mixed_TM])
    mixed_TM = torch.stack([seen[tap : tap + time] * mixer.taps_KM[tap] for tap in range(taps)]).sum(0)
    query, key, value = (part.transpose(0, 1) for part in split_heads(config, mixed_TM))
    write_TH = F.softplus(rate_TH + mixer.rate_bias_H)
    total_HT = (write_TH * mixer.decay_H).cumsum(0).t()
    key = key * write_TH.t()[..., None]
    # Token i reads token j <= i, faded by the decays between them; later ones are cut off before the
    # exponential, which would overflow there.
    later_TT = torch.ones(time, time, dtype=torch.bool, device=x_TD.device).triu(1)
    fade_HTT = (total_HT[:, :, None] - total_HT[:, None, :]).masked_fill_(later_TT, -torch.inf).exp()
    read = ((query @ key.transpose(1, 2)) * fade_HTT) @ value
    read = read + (query * total_HT.exp()[..., None]) @ memory_HNP
    to_end_HT1 = (total_HT[:, -1:] - total_HT).exp()[..., None]
    left_HNP = (key * to_end_HT1).transpose(1, 2) @ value
    memory_HNP = memory_HNP * total_HT[:, -1].exp()[:, None, None] + left_HNP
    read = (read + mixer.skip_H1[..., None] * value).transpose(0, 1)
    # A copy, so that a state does not hold the whole chunk's projections.
    return rms_norm(read).flatten(1) * F.silu(gate_TE), seen[time:].clone(), memory_HNP


def _project(
    config: ModelConfig, mixer: AttentionWeights, x_BD: Tensor, cos_B1Q: Tensor, sin_B1Q: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and, as the last head, the key, normed, rotated and scaled (B, H + 1, P); and the value (B, P)."""
    heads_BC, value_BP = (x_BD @ mixer.inputs_DC).split(((config.heads + 1) * config.head_dim, config.head_dim), dim=-1)
    heads_BGP = rms_norm(heads_BC.unflatten(-1, (config.heads + 1, config.head_dim)))
    left, right = heads_BGP.chunk(2, dim=-1)
    turned = torch.cat([left * cos_B1Q - right * sin_B1Q, right * cos_B1Q + left * sin_B1Q], dim=-1)
    return turned * mixer.gain_G1, value_BP


def _finish_layer(layer: LayerWeights, x_BD: Tensor, y_BE: Tensor) -> Tensor:
    """Add the mixer's output to the residual stream, then the MLP's."""
    x_BD = torch.addmm(x_BD, y_BE, layer.mixer.output_ED)
    return torch.addmm(x_BD, (rms_norm(x_BD) @ layer.up_DU).relu_().square_(), layer.down_UD)
