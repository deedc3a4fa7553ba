"""A target that keeps a pace, to be measured in virtual time: its figures are then exact, and cost no time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from experiments.benchmark.measures import Listener
from experiments.benchmark.targets import Ending, Failed
from model.generation import GenerationRequest


@dataclass
class Paced:
    """Writes a token every `step` seconds for each request, and fails each `every`th of them."""

    step: float
    log: list[tuple[str, int]] = field(default_factory=list)
    name: str = "paced"
    digest: str | None = None
    tokens: int = 4
    every: int = 0
    cold_start_means = "nothing: it is always warm"
    cold_starts = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    async def generate(self, request: GenerationRequest, listener: Listener, *, cold: bool = False) -> Ending:
        self.log.append((self.name, request.sampling.seed))
        if self.every and len(self.log) % self.every == 0:
            raise Failed("busy", "no")
        for _ in range(self.tokens):
            await asyncio.sleep(self.step)
            listener.arrived(1)
        listener.complete()
        return Ending("length", self.tokens)

    def processes(self) -> list[int]:
        return []
