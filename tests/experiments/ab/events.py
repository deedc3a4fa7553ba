"""Events of made-up users: their stories, how these ended, and the ratings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import sqlalchemy as sa

from experiments.ab.assignment import parse_split
from experiments.ab.events import Ending, Event, Exposure, Outcome, Rating, hashed
from experiments.ab.store import exposures

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


def insert_first_revision_rows(engine: sa.Engine) -> None:
    """A story of a database at revision 0001, whose columns had other names: generated, then aborted."""
    story = {"story": "old", "at": 1.0, "test": "t", "split": EVEN, "arm": "champion", "visitor": hashed("lily", "")}
    story |= {"digest": DIGESTS["champion"], "version": ""}
    end = {"key": "k", "story": "old", "at": 2.0, "outcome": "cut", "tokens": 5, "duration": 0.1, "writer": "local"}
    with engine.begin() as connection:
        for table, row in (("story_exposures", story), ("story_endings", end)):
            names, marks = ", ".join(f'"{name}"' for name in row), ", ".join(f":{name}" for name in row)
            connection.execute(sa.text(f"INSERT INTO {table} ({names}) VALUES ({marks})"), row)


def read_back(engine: sa.Engine) -> list[tuple[object, ...]]:
    """(story, variant, user's hash, prompt) of each exposure."""
    columns = (exposures.c.story, exposures.c.variant, exposures.c.user_hash, exposures.c.prompt)
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.select(*columns).order_by(exposures.c.id))]
