"""An open loop: requests come at times of their own, as readers do, whether or not the target keeps up.

The times are a Poisson process drawn from the plan's seed, and each latency is counted from the time at which
its request was due. So a stall is seen by everybody who came during it, and so is a load generator that is late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import islice

import numpy as np

from experiments.benchmark.load.closed_loop import Done
from experiments.benchmark.load.one import Clock, ask
from experiments.benchmark.plan import Plan
from experiments.benchmark.sample import Sample
from experiments.benchmark.targets.base import Target


def arrival_times(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests are due: gaps are exponential with mean 1/`rate`."""
    rng = np.random.default_rng([seed, 0x0A11])
    time = 0.0
    while True:
        time += float(rng.exponential(1.0 / rate))
        yield time


async def open_loop(
    target: Target, plan: Plan, clock: Clock, *, done: Done = lambda sample: None
) -> list[Sample]:
    """Send the plan's requests at its rate, each at its time, and wait for the last to end."""
    begin = clock.now()
    samples: list[Sample] = []

    async def one(number: int, due: float) -> None:
        sample = await ask(
            target,
            plan.request("open", number),
            clock,
            phase="open",
            level=0,
            number=number,
            timeout=plan.timeout,
            scheduled=due,
        )
        samples.append(sample)
        done(sample)

    async with asyncio.TaskGroup() as group:
        for number, after in enumerate(islice(arrival_times(plan.rate, plan.seed), plan.limit)):
            if plan.duration is not None and after > plan.duration:
                break
            due = begin + after
            await asyncio.sleep(max(0.0, due - clock.now()))
            group.create_task(one(number, due))
    return sorted(samples, key=lambda sample: sample.number)
