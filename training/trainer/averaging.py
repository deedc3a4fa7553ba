"""A running average of the weights, which predicts better than the weights of any one step.

Steps at a rate that is not tiny jump about in a valley; their average lies nearer to its floor (Polyak & Juditsky
1992; for networks Izmailov et al. 2018). It costs one pass over the weights a step, and no evaluation more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Average:
    """The exponential average of a network's parameters, which keeps `keep` of itself at each `update`.

    Over the first steps it keeps less, and so forgets the weights it began with: after n updates it spans
    about the last n / 10 of them, until `keep` allows no more.
    """

    def __init__(self, network: nn.Module, keep: float) -> None:
        self.keep, self.updates = keep, 0
        self.parameters: list[torch.Tensor] = list(network.parameters())
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network's present weights."""
        keep = min(self.keep, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, self.parameters, 1.0 - keep)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network has the averaged weights; it gets its own back, bit for bit, however this ends."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        # In place: optimisers and compiled code hold these very tensors.
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs; the tensors are this object's own."""
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with this object's own `keep`."""
        self.updates = state["updates"]
        for ours, theirs in zip(self.values, state["values"], strict=True):
            ours.copy_(theirs)
