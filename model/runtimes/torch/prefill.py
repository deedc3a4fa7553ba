"""A run of tokens of one story at once in PyTorch: from a state to the next, and the last token's logits.

The step form would launch its 243 small operations for every token of a prompt; this form launches about as many for
a whole piece. Inside the piece the recurrence is a masked matrix product (as in `StoryNetwork.forward`), what was
before it comes in by the state. States are values here: nothing that is handed in is changed.

Shapes: T tokens; the others as in `model.runtimes.torch.step`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.architecture.config import ModelConfig
from model.architecture.network import rms_norm
from model.runtimes.torch.step import (
    RecurrenceWeights,
    StepBuffers,
    StepWeights,
    finish_layer,
    project,
    split_heads,
)


@dataclass(frozen=True, slots=True, eq=False)
class TorchState:
    """One stream's memory on the device: about half a megabyte, however long the story."""

    position: int
    """Tokens taken in since the story began."""
    conv_RKM: Tensor
    memory_RHNP: Tensor
    ring_AWP: Tensor

    @property
    def nbytes(self) -> int:
        return self.conv_RKM.nbytes + self.memory_RHNP.nbytes + self.ring_AWP.nbytes


def empty_state(config: ModelConfig, device: torch.device) -> TorchState:
    """The state before the first token of a story."""
    one = StepBuffers.make(config, 1, device)
    return TorchState(0, one.conv_RBKM[:, 0], one.memory_RBHNP[:, 0], one.ring_ABWP[:, 0])


@torch.no_grad()
def prefill_piece(weights: StepWeights, token_T: Tensor, state: TorchState) -> tuple[Tensor, TorchState]:
    """Take in `token_T` of one story (an end of story only as its very first token, with the empty state).

    Returns the logits (V,) that follow the last token, and the new state.
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
            y_TE, conv_KM, memory_HNP = _recur(
                config, mixer, rms_norm(x_TD), state.conv_RKM[index], state.memory_RHNP[index]
            )
            conv.append(conv_KM)
            memory.append(memory_HNP)
        else:
            heads_TGP, value_TP = project(config, mixer, rms_norm(x_TD), cos_T1Q, sin_T1Q)
            key_TP = heads_TGP[:, -1]
            # S: the places of the ring as it was, then the tokens of this piece.
            key_SP = torch.cat([state.ring_AWP[attentive], key_TP])
            value_SP = torch.cat([state.ring_AWP[attentive + 1], value_TP])
            score_HTS = heads_TGP[:, :-1].transpose(0, 1) @ key_SP.t()
            weight_HTS = score_HTS.masked_fill_(unseen_TS, -torch.inf).softmax(-1)
            y_TE = (weight_HTS @ value_SP).transpose(0, 1).flatten(1)
            ring_AWP[attentive].index_copy_(0, slot_T, key_TP[-newest:])
            ring_AWP[attentive + 1].index_copy_(0, slot_T, value_TP[-newest:])
            attentive += 2
        x_TD = finish_layer(layer, x_TD, y_TE)
    logits_V = (rms_norm(x_TD[-1:]) @ weights.output_DV)[0]
    conv_RKM = torch.stack(conv) if conv else state.conv_RKM
    memory_RHNP = torch.stack(memory) if memory else state.memory_RHNP
    return logits_V, TorchState(start + time, conv_RKM, memory_RHNP, ring_AWP)


def _visible(start: int, position_T: Tensor, window: int) -> Tensor:
    """(T, W + T): whether a query may look at a place of the ring, and at a token that is fed with it."""
    place_W = torch.arange(window, device=position_T.device)
    held_W = start - 1 - (start - 1 - place_W) % window  # the position that each place holds; negative: none
    key_S, query_T1 = torch.cat([held_W, position_T]), position_T[:, None]
    return (key_S >= 0) & (key_S <= query_T1) & (key_S > query_T1 - window)


def _recur(
    config: ModelConfig, mixer: RecurrenceWeights, x_TD: Tensor, conv_KM: Tensor, memory_HNP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over a piece: its output, and the new convolution inputs and memory."""
    time, taps = len(x_TD), config.conv_width
    mixed_TM, gate_TE, rate_TH = (x_TD @ mixer.inputs_DC).split(mixer.sizes, dim=-1)
    seen = torch.cat([conv_KM, mixed_TM])
    mixed_TM = torch.stack([seen[tap : tap + time] * mixer.taps_KM[tap] for tap in range(taps)]).sum(0)
    query, key, value = (part.transpose(0, 1) for part in split_heads(config, F.silu(mixed_TM)))
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
    # A copy, so that a state does not hold the whole piece's projections.
    return rms_norm(read).flatten(1) * F.silu(gate_TE), seen[time:].clone(), memory_HNP
