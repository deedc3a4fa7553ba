"""A closed loop: a fixed number of readers, each asking for the next story when one has ended.

This finds what a target can do at most. It does not tell how long readers wait: while the target stalls, nobody
asks, so the stall is seen by as many requests as there are readers and by none of those that would have come
(coordinated omission). `open_loop` is for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from experiments.benchmark.load.one import Clock, ask
from experiments.benchmark.plan import Plan
from experiments.benchmark.sample import Phase, Sample
from experiments.benchmark.targets.base import Target

Done = Callable[[Sample], None]
PAUSE = 0.05
"""Seconds that a reader waits after a failure, so that a target that refuses at once is not stormed."""


async def closed_loop(
    target: Target,
    plan: Plan,
    clock: Clock,
    *,
    phase: Phase,
    readers: int,
    requests: int | None = None,
    done: Done = lambda sample: None,
) -> list[Sample]:
    """Keep `readers` requests open until `requests` are done (default: the plan's) or the plan's time is up."""
    limit = plan.limit if requests is None else requests
    until = None if plan.duration is None else clock.now() + plan.duration
    samples: list[Sample] = []
    next_number = 0

    async def reader() -> None:
        nonlocal next_number
        while (limit is None or next_number < limit) and (until is None or clock.now() < until):
            number = next_number
            next_number += 1
            request = plan.request(phase, number, readers)
            sample = await ask(
                target, request, clock, phase=phase, level=readers, number=number, timeout=plan.timeout
            )
            samples.append(sample)
            done(sample)
            if not sample.ok:
                await asyncio.sleep(PAUSE)

    async with asyncio.TaskGroup() as group:
        for _ in range(readers):
            group.create_task(reader())
    return sorted(samples, key=lambda sample: sample.number)
