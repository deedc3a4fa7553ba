"""The recurrence that was not chosen: RG-LRU (De et al. 2024, "Griffin", section 2.4), kept to measure against.

Same interface as `model.architecture.network.Recurrence`, so that one can stand in for the other. Its state is one
number a channel; its scan is elementwise, by doubling inside chunks of 32 and in a loop between them, which
torch.compile turns into a few fused kernels. `experiments/studies/layer_choice.py` is its only user.

Shapes: B batch, T time, D width, E channels, K convolution taps.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.architecture.config import ModelConfig

BLOCK = 64
"""Channels whose gates are computed together (block-diagonal gates)."""
SPEED = 8.0
"""The paper's constant c."""
CHUNK = 32


class RglruState(NamedTuple):
    """What one layer remembers."""

    conv_BKE: Tensor
    memory_BE: Tensor


class Rglru(nn.Module):
    """Real-gated linear recurrent unit behind a short convolution, gated by a GELU branch."""

    def __init__(self, config: ModelConfig, channels: int = 320) -> None:
        super().__init__()
        self.channels, self.taps = channels, config.conv_width
        blocks = channels // BLOCK
        self.inputs = nn.Linear(config.width, 2 * channels, bias=False)
        self.conv = nn.Parameter(torch.zeros(config.conv_width, channels))
        self.gates = nn.Parameter(torch.randn(blocks, BLOCK, 2 * BLOCK) * BLOCK**-0.5)
        self.gate_bias = nn.Parameter(torch.zeros(blocks, 2 * BLOCK))
        kept = torch.linspace(0.9, 0.999, channels)
        self.slowness = nn.Parameter(torch.expm1(-kept.log() / SPEED).log())
        self.output = nn.Linear(channels, config.width, bias=False)
        nn.init.normal_(self.inputs.weight, std=config.width**-0.5)
        nn.init.zeros_(self.output.weight)
        with torch.no_grad():
            self.conv[-1] = 1.0

    def _gated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolved input (..., E) to (log of the decay, gated input), both fp32."""
        gates = torch.einsum("...nc,nce->...ne", x.unflatten(-1, (-1, BLOCK)), self.gates.to(x.dtype))
        recur, let_in = (gates + self.gate_bias.to(x.dtype)).float().sigmoid().chunk(2, dim=-1)
        log_decay = -SPEED * F.softplus(self.slowness.float()) * recur.flatten(-2)
        return log_decay, let_in.flatten(-2) * x.float()

    def forward(self, x_BTD: Tensor, story_BT: Tensor) -> Tensor:
        line, gate = self.inputs(x_BTD).chunk(2, dim=-1)
        taps = self.conv.to(line.dtype)
        mixed = line * taps[-1]
        for back in range(1, min(self.taps, line.size(1))):
            same = (story_BT[:, back:] == story_BT[:, :-back]).to(line.dtype)[..., None]
            mixed = mixed + F.pad(line[:, :-back] * same * taps[-1 - back], (0, 0, back, 0))
        log_decay, entering = self._gated(mixed)
        same = F.pad((story_BT[:, 1:] == story_BT[:, :-1]).float(), (1, 0))[..., None]
        decay = log_decay.exp() * same
        entering = entering * torch.where(same > 0, (1 - (2 * log_decay).exp()).clamp(min=1e-6).sqrt(), 1.0)
        return cast(Tensor, self.output(_scan(decay, entering).to(x_BTD.dtype) * F.gelu(gate)))

    def initial_state(self, batch: int) -> RglruState:
        like = self.inputs.weight
        conv = like.new_zeros(batch, self.taps - 1, self.channels)
        return RglruState(conv, like.new_zeros(batch, self.channels))

    def step(self, x_BD: Tensor, state: RglruState, fresh_B: Tensor) -> tuple[Tensor, RglruState]:
        keep = (~fresh_B).to(x_BD.dtype)[:, None]
        line, gate = self.inputs(x_BD).chunk(2, dim=-1)
        seen_BKE = torch.cat([state.conv_BKE * keep[..., None], line[:, None]], dim=1)
        log_decay, entering = self._gated((seen_BKE * self.conv).sum(1))
        scale = torch.where(keep > 0, (1 - (2 * log_decay).exp()).clamp(min=1e-6).sqrt(), 1.0)
        memory = state.memory_BE * log_decay.exp() * keep + entering * scale
        y_BD: Tensor = self.output(memory * F.gelu(gate))
        return y_BD, RglruState(seen_BKE[:, 1:], memory)


def _scan(decay_BTE: Tensor, entering_BTE: Tensor) -> Tensor:
    """h_t = decay_t * h_(t-1) + entering_t over T, from zero."""
    time = decay_BTE.size(1)
    extra = -time % CHUNK
    a, b = (F.pad(part, (0, 0, 0, extra)).unflatten(1, (-1, CHUNK)) for part in (decay_BTE, entering_BTE))
    reach = 1
    while reach < CHUNK:
        b = torch.cat([b[:, :, :reach], b[:, :, reach:] + a[:, :, reach:] * b[:, :, :-reach]], dim=2)
        a = torch.cat([a[:, :, :reach], a[:, :, reach:] * a[:, :, :-reach]], dim=2)
        reach *= 2
    memory = torch.zeros_like(b[:, 0, 0])
    before = []
    for chunk in range(b.size(1)):
        before.append(memory)
        memory = b[:, chunk, -1] + a[:, chunk, -1] * memory
    states = b + a * torch.stack(before, dim=1)[:, :, None]
    return cast(Tensor, states.flatten(1, 2)[:, :time])
