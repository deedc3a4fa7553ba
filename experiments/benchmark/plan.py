"""What is asked of a target, and how: fixed before the first request, so that a run can be repeated.

No two requests of a run are the same, so that a cache in front of a model cannot answer for it; two runs of one
seed ask the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

from experiments.benchmark.sample import Phase
from model.errors import InputError
from model.generation import MAX_TOKENS, GenerationRequest, SamplingParams

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
CHOICES: tuple[Phase, ...] = ("cold", "single", "concurrent", "stress", "open", "compare")
DEFAULT_PHASES: tuple[Phase, ...] = CHOICES[:-1]
REQUESTS = 30
"""Enough to claim 80 % success with 95 % confidence if all but two succeed."""
WARMUP = 3
"""Readers of the warm-up, of two stories each."""
LONGEST_SEED = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The options of a run. Raises `InputError` that names the bad one."""

    requests: int | None = None
    """Of each phase (of each level of the stress phase). None: 30, or as many as `duration` takes."""
    concurrency: int = 8
    """Requests open at once in the concurrent phase; the stress phase goes to four times that."""
    rate: float = 2.0
    """Requests a second, on average, in the open loop."""
    duration: float | None = None
    """Seconds after which a phase starts no more requests."""
    seed: int = 0
    max_tokens: int = 200
    phases: tuple[Phase, ...] = DEFAULT_PHASES
    timeout: float = 60.0
    """Seconds that one request may take."""
    ttft_limit: float = 1.0
    """A good request's first token comes within so many seconds of when it was due,"""
    itl_limit: float = 0.1
    """and its tokens follow each other, on average, within so many seconds."""

    def __post_init__(self) -> None:
        if self.requests is not None and not 1 <= self.requests <= 100_000:
            raise InputError("requests", f"must be between 1 and 100000, got {self.requests}")
        if not 1 <= self.concurrency <= 512:
            raise InputError("concurrency", f"must be between 1 and 512, got {self.concurrency}")
        if not 1 <= self.max_tokens <= MAX_TOKENS:
            raise InputError("max_tokens", f"must be between 1 and {MAX_TOKENS}, got {self.max_tokens}")
        if not 0 <= self.seed <= LONGEST_SEED:
            raise InputError("seed", f"must be between 0 and {LONGEST_SEED}, got {self.seed}")
        for name, high in (("rate", 10_000), ("timeout", 3600), ("ttft_limit", 3600), ("itl_limit", 3600)):
            value = getattr(self, name)
            if not 0 < value <= high:
                raise InputError(name, f"must be above 0 and at most {high}, got {value:g}")
        if self.duration is not None and not 0 < self.duration <= 86_400:
            raise InputError("duration", f"must be above 0 and at most 86400 seconds, got {self.duration:g}")
        unknown = [name for name in self.phases if name not in CHOICES]
        if unknown or not self.phases:
            got = ", ".join(unknown) or "none"
            raise InputError("phases", f"must be among {', '.join(CHOICES)}, got {got}")

    @property
    def limit(self) -> int | None:
        """Most requests of a phase; None: only `duration` ends it."""
        return REQUESTS if self.requests is None and self.duration is None else self.requests

    @property
    def levels(self) -> tuple[int, ...]:
        """The stress phase's numbers of open requests: powers of two, up to four times `concurrency`."""
        top = 4 * self.concurrency
        return (*(2**power for power in range(top.bit_length()) if 2**power < top), top)

    def request(self, phase: Phase, number: int, level: int = 0) -> GenerationRequest:
        """The `number`th request of a phase and level."""
        # 48 bits: seeds that never meet, and that any reader of JSON takes as they are.
        mixed = hashlib.blake2b(f"{self.seed} {phase} {level} {number}".encode(), digest_size=6).digest()
        seed = int.from_bytes(mixed, "big")
        prompt = PROMPTS[number % len(PROMPTS)]
        return GenerationRequest(
            prompt=prompt, max_tokens=self.max_tokens, sampling=SamplingParams(seed=seed)
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "phases": list(self.phases), "requests": self.limit}
