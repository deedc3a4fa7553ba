"""From the store's events to what a test compares: one observation a visitor, in the order of arrival.

Arms are dealt to visitors, so visitors are what is independent; ten stories of one reader are not ten readers. Each
visitor therefore counts once in every figure, for the arm that she met first: with her first story, and for likes with
her first verdict. Later ones are stored, and counted as stories.

A figure belongs to an artifact. Where an arm has had several (an alias moved on), its newest one counts, and stories of
the others are left out and told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa

from experiments.ab.split import Split, parse_split
from experiments.ab.tables import endings, exposures, ratings
from model.errors import InputError

Metric = Literal["like", "finished", "stopped", "failed"]
METRICS: dict[Metric, str] = {
    "like": "liked, of those who gave a verdict",
    "finished": "the story told itself to its end",
    "stopped": "the reader stopped it or went away",
    "failed": "the story failed",
}
HIGHER_IS_BETTER: dict[Metric, bool] = {"like": True, "finished": True, "stopped": False, "failed": False}
OF_ENDINGS: tuple[Metric, ...] = ("finished", "stopped", "failed")
TELLING = frozenset({"finished", "length", "stopped", "failed"})
"""Endings that say something of the model; a story that found no place, or that a shutdown cut, does not."""


@dataclass(slots=True)
class Stream:
    """One figure's observations of one arm."""

    values: list[bool] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    """The split under which each was made."""


@dataclass(slots=True)
class Arm:
    """What one arm's newest artifact has to show."""

    name: str
    digest: str = ""
    version: str = ""
    stories: int = 0
    visitors: int = 0
    likes: int = 0
    dislikes: int = 0
    """Stories by their last verdict."""
    endings: dict[str, int] = field(default_factory=dict)
    """Stories by how they first ended."""
    tokens: list[int] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    streams: dict[Metric, Stream] = field(default_factory=lambda: {name: Stream() for name in METRICS})


@dataclass(slots=True)
class Evidence:
    """All that is known of one test."""

    test: str
    split: Split
    """The newest one."""
    arms: dict[str, Arm]
    """In the split's order; arms that it does not name any more come last."""
    first_seen: list[tuple[str, dict[str, int]]]
    """For each split that was in force, the new visitors that each arm got, whatever its artifact."""
    left_out: dict[str, int]
    """Stories of earlier artifacts, by arm."""


def known_tests(connection: sa.Connection) -> dict[str, int]:
    """The tests that have stories, and how many, the newest first."""
    rows = connection.execute(
        sa.select(exposures.c.test, sa.func.count(), sa.func.max(exposures.c.id)).group_by(exposures.c.test)
    ).all()
    return {str(name): int(count) for name, count, _ in sorted(rows, key=lambda row: -row[2])}


def gather(connection: sa.Connection, test: str, *, since: float | None = None) -> Evidence:
    """Read one test's events, from `since` (seconds since 1970) on where it is given.

    Raises `InputError` when there is no such test, naming those that are there.
    """
    wanted = [exposures.c.test == test]
    if since is not None:
        wanted.append(exposures.c.at >= since)
    chosen = sa.select(exposures).where(*wanted).order_by(exposures.c.id)
    rows = connection.execute(chosen).all()
    if not rows:
        known = known_tests(connection)
        if test in known:
            raise InputError("since", f"leaves no story of the test {test!r}")
        there = ", ".join(f"{name} ({count} stories)" for name, count in known.items())
        raise InputError("test", f"{test!r} has no stories; there is {there or 'none at all'}")
    split = parse_split(rows[-1].split, test)
    newest = {row.arm: row for row in rows}
    names = [share.arm for share in split.shares]
    names += [name for name in newest if name not in names]
    arms = {
        name: Arm(name, newest[name].digest, newest[name].version) if name in newest else Arm(name)
        for name in names
    }
    found = Evidence(test, split, arms, [], {})
    told, home, first = _stories(found, rows)
    of_test = sa.select(exposures.c.story).where(*wanted)
    _endings(found, told, first, connection.execute(
        sa.select(endings).where(endings.c.story.in_(of_test)).order_by(endings.c.id)
    ))  # fmt: skip
    _ratings(found, told, home, connection.execute(
        sa.select(ratings).where(ratings.c.story.in_(of_test)).order_by(ratings.c.id)
    ))  # fmt: skip
    return found


def _stories(found: Evidence, rows: Iterable[Any]) -> tuple[dict[str, Any], dict[str, str], set[str]]:
    """The stories that count, by id; each visitor's arm; and the ids of the first stories."""
    told: dict[str, Any] = {}
    first_of: dict[str, str] = {}
    home: dict[str, str] = {}
    for row in rows:
        if row.visitor not in home:
            home[row.visitor] = row.arm
            if not found.first_seen or found.first_seen[-1][0] != row.split:
                found.first_seen.append((row.split, {}))
            counts = found.first_seen[-1][1]
            counts[row.arm] = counts.get(row.arm, 0) + 1
        arm = found.arms[row.arm]
        if row.digest != arm.digest:
            found.left_out[row.arm] = found.left_out.get(row.arm, 0) + 1
            continue
        told[row.story] = row
        arm.stories += 1
        if row.visitor not in first_of and home[row.visitor] == row.arm:
            first_of[row.visitor] = row.story
            arm.visitors += 1
    return told, home, set(first_of.values())


def _endings(found: Evidence, told: dict[str, Any], first: set[str], rows: Iterable[Any]) -> None:
    ended: set[str] = set()
    for row in rows:
        story = told.get(row.story)
        if story is None or row.story in ended:
            continue
        ended.add(row.story)
        arm = found.arms[story.arm]
        arm.endings[row.outcome] = arm.endings.get(row.outcome, 0) + 1
        if row.tokens:
            arm.tokens.append(row.tokens)
        if row.ttft is not None:
            arm.ttfts.append(row.ttft)
        if row.rate is not None:
            arm.rates.append(row.rate)
        if row.story in first and row.outcome in TELLING:
            for name in OF_ENDINGS:
                _observe(arm, name, story, row.outcome == name)


def _ratings(found: Evidence, told: dict[str, Any], home: dict[str, str], rows: Iterable[Any]) -> None:
    last: dict[str, int] = {}
    judged: set[str] = set()
    for row in rows:
        story = told.get(row.story)
        if story is None:
            continue
        last[row.story] = row.rating
        if row.rating and story.visitor not in judged and home[story.visitor] == story.arm:
            judged.add(story.visitor)
            _observe(found.arms[story.arm], "like", story, row.rating > 0)
    for story_id, rating in last.items():
        arm = found.arms[told[story_id].arm]
        arm.likes += rating > 0
        arm.dislikes += rating < 0


def _observe(arm: Arm, name: Metric, story: Any, value: bool) -> None:
    arm.streams[name].values.append(value)
    arm.streams[name].splits.append(story.split)
