"""Readers made up: what they read, how it ended, what they thought, as events of the store."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from experiments.ab.events import Ending, Event, Exposure, Outcome, Rating, hashed
from experiments.ab.split import parse_split

DIGESTS = {"champion": "c" * 64, "challenger": "d" * 64}


def exposure(story: str, arm: str = "champion", *, visitor: str = "lily", split: str = "champion:1,challenger:1",
             digest: str | None = None, test: str = "t", at: float = 1_800_000_000.0) -> Exposure:  # fmt: skip
    return Exposure(
        story=story, test=test, split=split, arm=arm, visitor=hashed(visitor, ""), at=at,
        digest=DIGESTS.get(arm, "e" * 64) if digest is None else digest,
    )  # fmt: skip


def ending(story: str, outcome: Outcome = "finished", *, tokens: int = 200) -> Ending:
    return Ending(
        story=story, outcome=outcome, tokens=tokens, ttft=0.01, duration=0.2, rate=1000.0, writer="local"
    )


def readers(
    count: int,
    likes: dict[str, float],
    *,
    split: str = "champion:1,challenger:1",
    test: str = "t",
    seed: int = 0,
) -> Iterator[Event]:
    """`count` visitors, dealt as the split says, each of whom reads one story and likes it with its arm's chance."""
    dice, dealt = np.random.default_rng(seed), parse_split(split, test)
    for number in range(count):
        visitor, story = f"visitor-{seed}-{number}", f"{test}-{seed}-{number}"
        arm = dealt.arm_of(visitor)
        yield exposure(story, arm, visitor=visitor, split=split, test=test)
        yield ending(story, "finished" if dice.random() < 0.9 else "stopped")
        yield Rating(story=story, rating=1 if dice.random() < likes[arm] else -1)
