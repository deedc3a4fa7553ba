"""Votes of the arena: which of those in the database count, and whose battles they are.

A vote counts once for a user, a prompt and a pair of contestants: the first without a fault. A contestant is an
artifact with its settings, whatever it was called when it fought.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from experiments.ab.events import Vote
from experiments.arena.score import Battle

REPEATED = "voted before on this prompt and pair"


class Identity(NamedTuple):
    """What a contestant is known by."""

    digest: str
    settings: str


@dataclass(slots=True)
class Tally:
    """The votes that count, as battles in their order, and why others do not."""

    contestants: dict[str, Identity] = field(default_factory=dict)
    """By a name that no other one has."""
    votes: list[Vote] = field(default_factory=list)
    battles: list[Battle] = field(default_factory=list)
    """Of these votes; between the contestants' names."""
    faults: dict[str, str] = field(default_factory=dict)
    """Of each vote that does not count, by its key, the reason."""

    @property
    def left_out(self) -> Counter[str]:
        """How many votes do not count, by the reason."""
        return Counter(self.faults.values())


def sides(vote: Vote) -> tuple[Identity, Identity]:
    """The contestants of a vote, the left one first."""
    return (Identity(vote.first_digest, vote.first_settings), Identity(vote.second_digest, vote.second_settings))


def tally(votes: Iterable[Vote]) -> Tally:
    """Count votes, which come in their order of arrival."""
    found = Tally()
    seen: set[tuple[str, str, frozenset[Identity]]] = set()
    called: dict[Identity, str] = {}
    for vote in votes:
        pair = sides(vote)
        ballot = vote.user_hash, vote.prompt_digest, frozenset(pair)
        if vote.fault or ballot in seen:
            found.faults[vote.key] = vote.fault or REPEATED
            continue
        seen.add(ballot)
        found.votes.append(vote)
        called |= dict(zip(pair, (vote.first, vote.second), strict=True))  # the newest name
    shared = Counter(called.values())
    names = {
        each: name if shared[name] == 1 else f"{name} ({each.digest[:8]}, {each.settings})"
        for each, name in called.items()
    }
    found.contestants = {name: each for each, name in names.items()}
    for vote in found.votes:
        first, second = (names[each] for each in sides(vote))
        found.battles.append(Battle(first, second, vote.choice, vote.first_words, vote.second_words))
    return found


def read_votes(url: str, since: float | None = None) -> list[Vote]:
    """All votes in the database at `url`, in their order of arrival, or those since a time (seconds since 1970).

    Raises `InputError` when the database does not exist or cannot be used.
    """
    import sqlalchemy as sa

    from experiments.ab.store import reading, votes

    columns = [column for column in votes.columns if column.name != "id"]
    wanted = sa.select(*columns).order_by(votes.c.id)
    if since is not None:
        wanted = wanted.where(votes.c.at >= since)
    with reading(url) as connection:
        return [Vote(**row) for row in connection.execute(wanted).mappings()]
