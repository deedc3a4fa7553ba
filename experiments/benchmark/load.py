"""How requests are sent: in a closed loop, in an open loop, and to two targets in turn. Every request leaves one row.

A closed loop has a fixed number of clients, each sending its next request when one has ended. It finds the highest
throughput, and hides waiting: while the target stalls, no client sends anything (coordinated omission). An open loop
sends requests at the times of a Poisson process, whether or not the target keeps up, and counts each latency from the
scheduled time, so a stall, or a load generator that is late, shows in every request that was due meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from experiments.benchmark.measures import Phase, Sample
from experiments.benchmark.plan import Plan
from experiments.benchmark.targets import Failed, Target
from model.generation import GenerationRequest

Done = Callable[[Sample], None]
PAUSE = 0.05
"""Seconds that a client waits after a failure, so that a target that refuses at once is not flooded."""


@dataclass(slots=True)
class Clock:
    """Seconds since it was made, by the running event loop's clock."""

    zero: float = field(default_factory=lambda: asyncio.get_running_loop().time())

    def now(self) -> float:
        """Seconds since zero."""
        return asyncio.get_running_loop().time() - self.zero


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Writes times of arrival into a row."""

    sample: Sample
    clock: Clock

    def arrived(self, tokens: int) -> None:
        self.sample.arrivals.append(self.clock.now())
        self.sample.counts.append(tokens)

    def complete(self) -> None:
        self.sample.ended = self.clock.now()


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
    """Send a request now and wait for its end, at most `timeout` seconds. A failure is a row too."""
    started = clock.now()
    sample = Sample(
        phase=phase,
        level=level,
        number=number,
        seed=request.sampling.seed,
        scheduled=started if scheduled is None else scheduled,
        started=started,
    )
    generate = target.generate_cold if phase == "cold" else target.generate
    try:
        async with asyncio.timeout(timeout):
            ending = await generate(request, _Recorder(sample, clock))
    except TimeoutError:
        sample.error, sample.message = "timeout", f"not done within {timeout:g} s"
    except Failed as failure:
        sample.error, sample.message = failure.kind, str(failure)
    else:
        sample.finish, sample.tokens = ending.finish, ending.tokens
    if sample.error is not None:
        sample.ended, sample.tokens = clock.now(), sum(sample.counts)
    return sample


async def closed_loop(
    target: Target,
    plan: Plan,
    clock: Clock,
    *,
    phase: Phase,
    clients: int,
    requests: int | None = None,
    done: Done = lambda sample: None,
) -> list[Sample]:
    """Keep `clients` requests open until `requests` are done (default: the plan's) or the plan's time is up."""
    limit = plan.limit if requests is None else requests
    until = None if plan.duration is None else clock.now() + plan.duration
    samples: list[Sample] = []
    next_number = 0

    async def client() -> None:
        nonlocal next_number
        while (limit is None or next_number < limit) and (until is None or clock.now() < until):
            number = next_number
            next_number += 1
            request = plan.request(phase, number, clients)
            sample = await ask(
                target, request, clock, phase=phase, level=clients, number=number, timeout=plan.timeout
            )
            samples.append(sample)
            done(sample)
            if not sample.ok:
                await asyncio.sleep(PAUSE)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return sorted(samples, key=lambda sample: sample.number)


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
        request, timeout = plan.request("open", number), plan.timeout
        sample = await ask(
            target, request, clock, phase="open", level=0, number=number, timeout=timeout, scheduled=due
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


async def in_turn(
    target: Target, against: Target, plan: Plan, clock: Clock, *, done: Done = lambda sample: None
) -> list[Sample]:
    """Send both targets the same requests in turn, so that a machine whose speed drifts slows them alike.

    A round is one request alone (`level` 1); each fourth round adds a batch of concurrent ones, which is `plan.batch`
    times the work. The seed decides which side goes first.
    """
    rng = np.random.default_rng([plan.seed, 0x7A12])
    until = None if plan.duration is None else clock.now() + plan.duration
    sides = {"target": target, "against": against}
    samples: list[Sample] = []
    number = 0
    while (plan.limit is None or number < plan.limit) and (until is None or clock.now() < until):
        order = list(sides) if rng.random() < 0.5 else list(reversed(sides))
        for level in (1, plan.batch) if number % 4 == 0 else (1,):
            requests = [plan.request("compare", number * plan.batch + i, level) for i in range(level)]
            for side in order:
                asked = (
                    ask(
                        sides[side],
                        request,
                        clock,
                        phase="compare",
                        level=level,
                        number=number,
                        timeout=plan.timeout,
                    )
                    for request in requests
                )
                for row in await asyncio.gather(*asked):
                    row.target = side
                    samples.append(row)
                    done(row)
        number += 1
    return samples
