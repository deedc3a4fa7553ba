"""What is asked of a target, and how: in a closed loop, in an open loop, or of two targets in turn.

A plan is fixed before the first request, so that a run can be repeated: two runs of one seed send the same requests. No
two requests of a run are equal, so a cache in front of a model cannot answer for it. Every request leaves one row.

A closed loop has a fixed number of clients, each sending its next request when one has ended. It finds the highest
throughput, and hides waiting: while the target stalls, no client sends anything (coordinated omission). An open loop
sends requests at the times of a Poisson process, whether or not the target keeps up, and counts each latency from the
scheduled time, so a stall, or a load generator that is late, shows in every request that was due meanwhile.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field

from experiments.benchmark.measures import Listener, Phase, Sample
from experiments.benchmark.targets import Failed, Target
from model.generation import MAX_TOKENS, GenerationRequest, SamplingParams
from model.validation import Options

PROMPTS = (
    "Once upon a time",
    "Lily had a red kite. One windy day, she took it up the hill.",
    "The old dog sat by the door and waited for the boy to come home from school.",
    "One rainy day, Sam found a small box under his bed.",
    '"Can we go to the sea?" asked Mia. Her father looked at the clouds and smiled.',
    "There was a bear who did not like honey. All the other bears laughed at him, but he did not mind.",
    "Ben and Anna were building a tower of blocks. It was taller than Ben, and then it was taller than Anna.",
    "Far away, behind the green mountain,",
)
Choice = Literal["cold", "single", "concurrent", "stress", "open", "compare"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
DEFAULT_PHASES = CHOICES[:-1]
REQUESTS = 30
"""Enough to claim 80 % success with 95 % confidence if all but two succeed."""
WARMUP_CLIENTS = 3
"""Clients of the warm-up, with two requests each."""
Seconds = Annotated[float, Field(gt=0, le=3600)]


class Plan(Options):
    """The options of a run."""

    requests: int | None = Field(default=None, ge=1, le=100_000)
    """Of each phase (of each level of the stress phase). None: 30, or as many as `duration` allows."""
    concurrency: int = Field(default=8, ge=1, le=512)
    """Open requests in the concurrent phase; the stress phase goes to four times that."""
    rate: float = Field(default=2.0, gt=0, le=10_000)
    """Requests a second, on average, in the open loop."""
    duration: float | None = Field(default=None, gt=0, le=86_400)
    """Seconds after which a phase starts no more requests."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    max_tokens: int = Field(default=200, ge=1, le=MAX_TOKENS)
    phases: Annotated[tuple[Choice, ...], Field(min_length=1)] = DEFAULT_PHASES
    timeout: Seconds = 60.0
    """Seconds that one request may take."""
    ttft_limit: Seconds = 1.0
    """Goodput counts requests whose first token comes within so many seconds of the scheduled time,"""
    itl_limit: Seconds = 0.1
    """and whose tokens follow each other, on average, within so many seconds."""

    @property
    def limit(self) -> int | None:
        """Most requests of a phase; None: only `duration` ends it."""
        return REQUESTS if self.requests is None and self.duration is None else self.requests

    @property
    def levels(self) -> tuple[int, ...]:
        """Open requests in the stress phase: powers of two, up to four times `concurrency`."""
        top = 4 * self.concurrency
        return (*(2**power for power in range(top.bit_length()) if 2**power < top), top)

    @property
    def batch(self) -> int:
        """Requests that a round of the comparison sends at once, after the single one."""
        return max(2, self.concurrency)

    def request(self, phase: Phase, number: int, level: int = 0) -> GenerationRequest:
        """The `number`th request of a phase and level."""
        # 48 bits: seeds do not collide, and every JSON parser reads them exactly.
        mixed = hashlib.blake2b(f"{self.seed} {phase} {level} {number}".encode(), digest_size=6).digest()
        return GenerationRequest(
            prompt=PROMPTS[number % len(PROMPTS)],
            max_tokens=self.max_tokens,
            sampling=SamplingParams(seed=int.from_bytes(mixed, "big")),
        )

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json") | {"requests": self.limit}

    def expected_requests(self, cold_starts: int) -> int | None:
        """Requests of a whole run without warm-up; None when only the time decides."""
        limit = self.limit
        if limit is None or self.duration is not None:
            return None
        counts = {
            "cold": cold_starts,
            "single": limit,
            "concurrent": limit,
            "stress": sum(max(limit, 2 * level) for level in self.levels),
            "open": limit,
            "compare": 2 * (limit + self.batch * -(-limit // 4)),
        }
        return sum(counts[phase] for phase in self.phases)


COLD_TIMEOUT = 300.0
"""Seconds that a cold start may take, however short the timeout of other requests is."""
PAUSE = 0.05
"""Seconds that a client waits after a failure, so that a target that refuses at once is not flooded."""


@dataclass(slots=True)
class Clock:
    """Seconds since its first reading, by the running event loop's clock."""

    zero: float | None = None

    def now(self) -> float:
        time = asyncio.get_running_loop().time()
        if self.zero is None:
            self.zero = time
        return time - self.zero


def arrival_times(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests are due: gaps are exponential with mean 1/`rate`."""
    rng = np.random.default_rng([seed, 0x0A11])
    time = 0.0
    while True:
        time += float(rng.exponential(1.0 / rate))
        yield time


@dataclass(frozen=True, slots=True)
class LoadGenerator:
    """Sends the requests of a plan; `done` is called with the row of each."""

    plan: Plan
    done: Callable[[Sample], None] = lambda sample: None
    clock: Clock = field(default_factory=Clock)

    async def ask(
        self,
        target: Target,
        phase: Phase,
        request: GenerationRequest,
        *,
        number: int = 0,
        level: int = 1,
        side: str = "target",
        scheduled: float | None = None,
    ) -> Sample:
        """Send a request now and wait for its end or its timeout. A failure is a row too."""
        started = self.clock.now()
        seconds = COLD_TIMEOUT if phase == "cold" else self.plan.timeout
        sample = Sample(
            phase=phase,
            level=level,
            number=number,
            seed=request.sampling.seed,
            scheduled=started if scheduled is None else scheduled,
            started=started,
            target=side,
        )
        try:
            async with asyncio.timeout(seconds):
                ending = await target.generate(request, Listener(sample, self.clock.now), cold=phase == "cold")
        except TimeoutError:
            sample.error, sample.message = "timeout", f"not done within {seconds:g} s"
        except Failed as failure:
            sample.error, sample.message = failure.kind, str(failure)
        else:
            sample.finish, sample.tokens = ending.finish, ending.tokens
        if sample.error is not None:
            sample.ended, sample.tokens = self.clock.now(), sum(sample.counts)
        self.done(sample)
        return sample

    async def cold_starts(self, target: Target) -> list[Sample]:
        return [
            await self.ask(target, "cold", self.plan.request("cold", number), number=number)
            for number in range(target.cold_starts)
        ]

    async def closed_loop(
        self, target: Target, phase: Phase, clients: int, *, requests: int | None = None, side: str = "target"
    ) -> list[Sample]:
        """Keep `clients` requests open until `requests` are done (default: the plan's) or the plan's time is up."""
        goes_on = self._budget(self.plan.limit if requests is None else requests)
        samples: list[Sample] = []
        next_number = 0

        async def client() -> None:
            nonlocal next_number
            while goes_on(next_number):
                number = next_number
                next_number += 1
                request = self.plan.request(phase, number, clients)
                sample = await self.ask(target, phase, request, number=number, level=clients, side=side)
                samples.append(sample)
                if not sample.ok:
                    await asyncio.sleep(PAUSE)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        return sorted(samples, key=lambda sample: sample.number)

    async def open_loop(self, target: Target) -> list[Sample]:
        """Send the plan's requests at its rate, each at its time, and wait for the last to end."""
        begin = self.clock.now()
        tasks: list[asyncio.Task[Sample]] = []
        async with asyncio.TaskGroup() as group:
            times = islice(arrival_times(self.plan.rate, self.plan.seed), self.plan.limit)
            for number, after in enumerate(times):
                if self.plan.duration is not None and after > self.plan.duration:
                    break
                due = begin + after
                await asyncio.sleep(max(0.0, due - self.clock.now()))
                request = self.plan.request("open", number)
                asked = self.ask(target, "open", request, number=number, level=0, scheduled=due)
                tasks.append(group.create_task(asked))
        return [task.result() for task in tasks]

    async def in_turn(self, target: Target, against: Target) -> list[Sample]:
        """Send both targets the same requests in turn, so that a machine whose speed drifts slows them alike.

        A round is one request alone (`level` 1); each fourth round adds a batch of concurrent ones, which is
        `plan.batch` times the work. The seed decides which side goes first.
        """
        rng = np.random.default_rng([self.plan.seed, 0x7A12])
        sides = [("target", target), ("against", against)]
        batch = self.plan.batch
        goes_on = self._budget(self.plan.limit)
        samples: list[Sample] = []
        number = 0
        while goes_on(number):
            order = sides if rng.random() < 0.5 else sides[::-1]
            for level in (1, batch) if number % 4 == 0 else (1,):
                requests = [self.plan.request("compare", number * batch + i, level) for i in range(level)]
                for side, asked in order:
                    rows = (
                        self.ask(asked, "compare", request, number=number, level=level, side=side)
                        for request in requests
                    )
                    samples += await asyncio.gather(*rows)
            number += 1
        return samples

    def _budget(self, limit: int | None) -> Callable[[int], bool]:
        """Whether request or round `number` may still begin, by the number of requests and the plan's duration."""
        until = None if self.plan.duration is None else self.clock.now() + self.plan.duration
        return lambda number: (limit is None or number < limit) and (until is None or self.clock.now() < until)
