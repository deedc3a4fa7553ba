"""A stand-in for CUDA graphs where there is no GPU: work is recorded as the operations it does, and those are replayed.

It shares with a graph what makes graphs treacherous. Work is run several times while it is recorded, over whatever the
memory holds. A replay runs no Python of the work: it repeats the same operations on the same tensors, so a number that
the host put in while recording, or a tensor that has been replaced since, shows at once as a wrong result. What a
capture forbids (asking for a value, shapes that depend on values, a copy between devices) is an error here too. What it
cannot show is anything of CUDA itself: streams, kernels, memory pools.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.runtimes.torch.forward import WARM_UPS, Work

FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item", "equal")


class Tape(TorchDispatchMode):
    """The operations that were done while it was on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in FORBIDDEN, f"{name} asks the device for a value, which a capture does not allow"
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        outputs = [each for each in _flat(results) if isinstance(each, Tensor)]
        inputs = {each.untyped_storage().data_ptr() for each in _flat((args, kwargs)) if isinstance(each, Tensor)}
        made = [each for each in outputs if each.untyped_storage().data_ptr() not in inputs]
        if made or func._schema.is_mutable:  # views need no repetition
            self.steps.append((func, args, kwargs, made))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.steps:
            results = [each for each in _flat(func(*args, **kwargs)) if isinstance(each, Tensor)]
            if made:
                for place, result in zip(made, results, strict=True):
                    place.copy_(result)


def _flat(values: Any) -> list[Any]:
    if isinstance(values, dict):
        values = list(values.values())
    return [leaf for each in values for leaf in _flat(each)] if isinstance(values, list | tuple) else [values]


class Tapes:
    """A recorder that counts what was recorded and which recording was replayed how often."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replays: Counter[int] = Counter()

    def __call__(self, work: Work) -> Work:
        for _ in range(WARM_UPS):
            work()
        tape, number = Tape(), self.recorded
        with tape:
            work()
        self.recorded += 1

        def launch() -> None:
            self.replays[number] += 1
            tape.replay()

        return launch
