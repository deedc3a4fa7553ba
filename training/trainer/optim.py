"""Optimisers and the learning-rate schedule.

Muon (Jordan et al. 2024) for the matrices inside the blocks, whose update it makes orthogonal; AdamW for the
embedding and for vectors. A short warm-up, a plateau and a long linear warm-down (Hägele et al. 2024).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.trainer.recipe import OptimizerRecipe


def group_parameters(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by role: `matrix` (linear layers in blocks), `table` (embedding), `vector` (all else)."""
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "table": [], "vector": []}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                role = "table"
            elif isinstance(module, nn.Linear) and name == "weight" and min(parameter.shape) > 16:
                # A map to a handful of outputs (the decay rates) is not worth orthogonalising.
                role = "matrix"
            else:
                role = "vector"
            groups[role].append(parameter)
    return groups


class Optimizers:
    """The run's optimisers behind one face; `set_rate` scales every group's peak rate."""

    def __init__(self, network: nn.Module, recipe: OptimizerRecipe) -> None:
        groups = group_parameters(network)
        betas = (recipe.beta1, recipe.beta2)
        gentle = [
            {"params": groups["table"], "lr": recipe.table_lr, "weight_decay": recipe.table_decay},
            {"params": groups["vector"], "lr": recipe.vector_lr, "weight_decay": 0.0},
        ]
        matrices = {"params": groups["matrix"], "lr": recipe.matrix_lr, "weight_decay": recipe.weight_decay}
        self.parts: list[torch.optim.Optimizer]
        if recipe.name == "muon":
            kind = torch.optim.Muon if has_bf16(groups["table"][0].device) else PreciseMuon
            muon = kind([matrices], momentum=recipe.momentum)
            self.parts = [muon, torch.optim.AdamW(gentle, betas=betas, fused=True)]
        else:
            self.parts = [torch.optim.AdamW([*gentle, matrices], betas=betas, fused=True)]
        for group in self._groups():
            group["peak"] = group["lr"]

    def _groups(self) -> Iterator[dict[str, float]]:
        for part in self.parts:
            yield from part.param_groups

    def set_rate(self, share: float) -> None:
        for group in self._groups():
            group["lr"] = group["peak"] * share

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        """What the next step depends on besides parameters and gradients."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        """Take over moments and step counts; rates and decays stay those of this run's recipe."""
        for part, state in zip(self.parts, states, strict=True):
            ours = [dict(group) for group in part.param_groups]
            part.load_state_dict(state)
            for group, options in zip(part.param_groups, ours, strict=True):
                group.update(options)


def rate_share(recipe: OptimizerRecipe, step: int, progress: float) -> float:
    """Share of the peak rate at a 0-based `step`, when `progress` (0 to 1) of the budget is used."""
    warmup = min(1.0, (step + 1) / (recipe.warmup_steps + 1))
    left = min(1.0, (1.0 - progress) / recipe.warmdown) if recipe.warmdown > 0 else 1.0
    return warmup * (recipe.final_lr + (1.0 - recipe.final_lr) * max(0.0, left))


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz iteration: nearly the orthogonal factor of `matrix`, its singular values brought near 1."""
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class PreciseMuon(torch.optim.Muon):
    """`torch.optim.Muon` (with its way to scale the rate, and the same state), computed in fp32."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            keep = group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                moment = state["momentum_buffer"].lerp_(matrix.grad, 1 - keep)
                update = matrix.grad.lerp(moment, keep) if group["nesterov"] else moment
                update = orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, matrix.size(0) / matrix.size(1))))


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


def has_bf16(device: torch.device) -> bool:
    """True where bf16 matrix products are faster than fp32 (3x on AVX-512 BF16), not merely emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
