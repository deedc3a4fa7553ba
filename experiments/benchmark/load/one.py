"""One request: sent, timed as its tokens come, and turned into a row whatever happens to it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from experiments.benchmark.sample import Phase, Sample
from experiments.benchmark.targets.base import Failed, Target
from model.generation import GenerationRequest


@dataclass(slots=True)
class Clock:
    """Seconds since it was made."""

    zero: float = field(default_factory=time.perf_counter)

    def now(self) -> float:
        """Seconds since zero."""
        return time.perf_counter() - self.zero


async def ask(
    target: Target,
    request: GenerationRequest,
    clock: Clock,
    *,
    phase: Phase,
    level: int,
    number: int,
    timeout: float,
    scheduled: float | None = None,
) -> Sample:
    """Send a request now, and wait for its end for at most `timeout` seconds. A failure is a row too."""
    started = clock.now()
    sample = Sample(
        phase=phase,
        level=level,
        number=number,
        seed=request.sampling.seed,
        scheduled=started if scheduled is None else scheduled,
        started=started,
    )

    write = target.write_cold if phase == "cold" else target.write
    try:
        async with asyncio.timeout(timeout):
            ending = await write(request, _Listener(sample, clock))
    except TimeoutError:
        sample.error, sample.message = "timeout", f"not done within {timeout:g} s"
    except Failed as failure:
        sample.error, sample.message = failure.kind, str(failure)
    else:
        sample.finish, sample.tokens = ending.finish, ending.tokens
    if sample.error is not None:
        sample.ended, sample.tokens = clock.now(), sum(sample.counts)
    return sample


@dataclass(frozen=True, slots=True)
class _Listener:
    """Writes the times into a row."""

    sample: Sample
    clock: Clock

    def arrived(self, tokens: int) -> None:
        self.sample.arrivals.append(self.clock.now())
        self.sample.counts.append(tokens)

    def whole(self) -> None:
        self.sample.ended = self.clock.now()
