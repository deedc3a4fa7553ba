"""From stored events to what a test compares: one observation per user, in order of arrival.

Variants are assigned to users, so users are the independent units: ten stories of one user are not ten observations.
Each user counts once in every metric, for the first variant: with the first story, and for likes with the first rating.
Later stories are stored and counted as stories.

A metric belongs to an artifact. Where a variant has served several (an alias moved), only the newest one counts; the
number of stories left out is reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa

from experiments.ab.assignment import TrafficSplit, parse_split
from experiments.ab.store import endings, exposures, ratings
from experiments.common.statistics import Estimate, wilson
from model.errors import InputError

Metric = Literal["like", "finished", "stopped", "failed"]
METRICS: dict[Metric, str] = {
    "like": "liked, of those who rated",
    "finished": "the model ended the story",
    "stopped": "the user stopped it or disconnected",
    "failed": "the generation failed",
}
HIGHER_IS_BETTER: dict[Metric, bool] = {"like": True, "finished": True, "stopped": False, "failed": False}
ENDING_METRICS: tuple[Metric, ...] = ("finished", "stopped", "failed")
INFORMATIVE = frozenset({"finished", "length", "stopped", "failed"})
"""Outcomes that say something about the model; a refusal or a shutdown does not."""


@dataclass(slots=True)
class VariantEvidence:
    """What is known about one variant's newest artifact."""

    name: str
    digest: str = ""
    version: str = ""
    stories: int = 0
    users: int = 0
    likes: int = 0
    dislikes: int = 0
    """Stories by their last rating."""
    endings: Counter[str] = field(default_factory=Counter)
    """Stories by their first outcome."""
    tokens: list[int] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    observed: dict[Metric, list[tuple[bool, str]]] = field(default_factory=lambda: {name: [] for name in METRICS})
    """Each observation, and the split under which it was made."""

    def rate(self, metric: Metric) -> Estimate | None:
        """Return the share of users with a positive observation; None without any."""
        values = [value for value, _ in self.observed[metric]]
        return wilson(sum(values), len(values)) if values else None


@dataclass(slots=True)
class Evidence:
    """Everything that is known about one test."""

    test: str
    split: TrafficSplit
    """The newest one."""
    variants: dict[str, VariantEvidence]
    """In the split's order; variants that it no longer names come last."""
    new_users: list[tuple[str, Counter[str]]] = field(default_factory=list)
    """For each split that was in force, the new users of each variant, whatever its artifact."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Stories of earlier artifacts, by variant."""


def known_tests(connection: sa.Connection) -> dict[str, int]:
    """Return the tests that have stories, and how many, newest first."""
    newest = sa.func.max(exposures.c.id)
    rows = connection.execute(
        sa.select(exposures.c.test, sa.func.count()).group_by(exposures.c.test).order_by(newest.desc())
    )
    return {str(name): int(count) for name, count in rows}


def gather(connection: sa.Connection, test: str, *, since: float | None = None) -> Evidence:
    """Read one test's events, optionally only those since a time (seconds since 1970).

    Raises `InputError` when there is no such test; the message names the existing ones.
    """
    wanted = [exposures.c.test == test]
    if since is not None:
        wanted.append(exposures.c.at >= since)
    rows = connection.execute(sa.select(exposures).where(*wanted).order_by(exposures.c.id)).all()
    if not rows:
        known = known_tests(connection)
        if test in known:
            raise InputError("since", f"leaves no story of the test {test!r}")
        there = ", ".join(f"{name} ({count} stories)" for name, count in known.items())
        raise InputError("test", f"{test!r} has no stories; there is {there or 'none at all'}")
    split = parse_split(rows[-1].split, test)
    newest = {row.variant: row for row in rows}
    variants = {variant.name: VariantEvidence(variant.name) for variant in split.variants}
    for name, row in newest.items():
        variants[name] = VariantEvidence(name, row.digest, row.version)
    evidence = Evidence(test, split, variants)
    counted, home, first = _add_stories(evidence, rows)
    of_test = sa.select(exposures.c.story).where(*wanted)

    def events(table: sa.Table) -> Iterator[tuple[Any, Any]]:
        """Yield the table's rows in order, each with the exposure of its story."""
        for row in connection.execute(sa.select(table).where(table.c.story.in_(of_test)).order_by(table.c.id)):
            if row.story in counted:
                yield row, counted[row.story]

    ended: set[str] = set()
    for row, story in events(endings):
        if row.story in ended:
            continue
        ended.add(row.story)
        variant = variants[story.variant]
        variant.endings[row.outcome] += 1
        measured = (variant.tokens, row.tokens or None), (variant.ttfts, row.ttft), (variant.rates, row.rate)
        for values, value in measured:
            if value is not None:
                values.append(value)
        if row.story in first and row.outcome in INFORMATIVE:
            for metric in ENDING_METRICS:
                variant.observed[metric].append((row.outcome == metric, story.split))
    last: dict[str, tuple[str, int]] = {}
    rated: set[str] = set()
    for row, story in events(ratings):
        last[row.story] = story.variant, row.rating
        if row.rating and story.user_hash not in rated and home[story.user_hash] == story.variant:
            rated.add(story.user_hash)
            variants[story.variant].observed["like"].append((row.rating > 0, story.split))
    for name, rating in last.values():
        variants[name].likes += rating > 0
        variants[name].dislikes += rating < 0
    return evidence


def _add_stories(evidence: Evidence, rows: Iterable[Any]) -> tuple[dict[str, Any], dict[str, str], set[str]]:
    """Return the stories that count, by id; each user's variant; and the ids of users' first stories."""
    counted: dict[str, Any] = {}
    first_of: dict[str, str] = {}
    home: dict[str, str] = {}
    for row in rows:
        if row.user_hash not in home:
            home[row.user_hash] = row.variant
            if not evidence.new_users or evidence.new_users[-1][0] != row.split:
                evidence.new_users.append((row.split, Counter()))
            evidence.new_users[-1][1][row.variant] += 1
        variant = evidence.variants[row.variant]
        if row.digest != variant.digest:
            evidence.left_out[row.variant] += 1
            continue
        counted[row.story] = row
        variant.stories += 1
        if row.user_hash not in first_of and home[row.user_hash] == row.variant:
            first_of[row.user_hash] = row.story
            variant.users += 1
    return counted, home, set(first_of.values())
