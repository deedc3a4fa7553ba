"""Data parallel over processes: each computes its share of the rows, gradients are summed.

Started by `torchrun` or `story train --processes`, which set RANK and WORLD_SIZE; without them there is one process and
every function here does nothing.
"""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist

# Imported before a group exists: its functions take the world's group as a default argument, and whatever imports it
# later (torch.compile and the optimisers do) would keep the group, with gloo's threads, beyond `close` to the end of
# the interpreter. A thread of gloo that lets go of a tensor then aborts the process behind a good run.
import torch.distributed.nn.functional  # noqa: F401
from torch import Tensor, nn


class Group:
    """The processes of one run."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1 and not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)))
                dist.init_process_group("cpu:gloo,cuda:nccl")
            else:
                dist.init_process_group("gloo")

    @property
    def first(self) -> bool:
        """True in the process that talks to the outside."""
        return self.rank == 0

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes, in one message."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def sum(self, value: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def agree(self, *values: float) -> list[float]:
        """Each value's largest over the processes: the slowest clock, and whether anyone was interrupted.

        Decided together, so that no process goes on to a step that another one has left.
        """
        shared = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return [float(value) for value in shared]

    def meet(self) -> None:
        self.agree(0.0)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
