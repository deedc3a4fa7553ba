"""What is asked of a target, and how: fixed before the first request, so that a run can be repeated.

No two requests of a run are equal, so a cache in front of a model cannot answer for it. Two runs of one seed send the
same requests.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from experiments.benchmark.measures import Phase
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
