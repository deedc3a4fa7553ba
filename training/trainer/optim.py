"""Optimisers and the learning-rate schedule.

Muon (Jordan et al. 2024) for the matrices inside the blocks, whose update it makes orthogonal; AdamW for the
embedding and for vectors. A short warm-up, a plateau and a long linear warm-down (Hägele et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from training.trainer.muon import PreciseMuon
from training.trainer.precision import has_bf16
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
            {"params": groups["table"], "lr": recipe.table_lr, "weight_decay": 0.0},
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
        """Set every group's rate to `share` of its peak."""
        for group in self._groups():
            group["lr"] = group["peak"] * share

    def step(self) -> None:
        """Move every parameter by its gradient."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
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
