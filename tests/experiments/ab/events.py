"""Events of made-up users: their stories, how these ended, and the ratings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.ab.assignment import parse_split
from experiments.ab.events import Ending, Event, Exposure, Outcome, Rating, hashed

DIGESTS = {"champion": "c" * 64, "challenger": "d" * 64}
EVEN = "champion:1,challenger:1"


def exposure(
    story: str,
    variant: str = "champion",
    *,
    user: str = "lily",
    split: str = EVEN,
    digest: str | None = None,
    test: str = "t",
    at: float = 1_800_000_000.0,
) -> Exposure:
    return Exposure(
        story=story,
        test=test,
        split=split,
        variant=variant,
        user_hash=hashed(user, ""),
        at=at,
        digest=DIGESTS.get(variant, "e" * 64) if digest is None else digest,
    )


def ending(story: str, outcome: Outcome = "finished", *, tokens: int = 200) -> Ending:
    return Ending(story=story, outcome=outcome, tokens=tokens, ttft=0.01, duration=0.2, rate=1000.0, served_by="local")


def served(story: str, outcome: Outcome = "finished", variant: str = "champion", **given: Any) -> list[Event]:
    return [exposure(story, variant, **given), ending(story, outcome)]


def users(count: int, likes: dict[str, float], *, split: str = EVEN, test: str = "t", seed: int = 0) -> Iterator[Event]:
    """`count` users: each gets one story of the assigned variant, and likes it with that variant's probability."""
    rng, assigned = np.random.default_rng(seed), parse_split(split, test)
    for number in range(count):
        user, story = f"user-{seed}-{number}", f"{test}-{seed}-{number}"
        variant = assigned.assign(user)
        yield exposure(story, variant, user=user, split=split, test=test)
        yield ending(story, "finished" if rng.random() < 0.9 else "stopped")
        yield Rating(story=story, rating=1 if rng.random() < likes[variant] else -1)
