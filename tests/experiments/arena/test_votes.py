"""Which votes count, and whose they are, through a real SQLite database."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.ab.store import connect, insert_events, migrate
from experiments.arena.score import Battle
from experiments.arena.votes import REPEATED, read_votes, tally
from model.errors import InputError
from tests.experiments.arena.made import DIGESTS, SETTINGS, vote

ADDRESS = "sqlite:///stories.db"


def test_votes_come_back_from_the_database_as_they_were_in_their_order() -> None:
    engine = connect(ADDRESS, writes=True)
    migrate(engine)
    made = [
        vote(at=3.0, prompt="One day"),
        vote("new", "old", at=1.0, first_read=None, fault="an end was not seen", seed=2**53 - 1),
        vote(at=2.0, user="rose"),
    ]
    insert_events(engine, made)
    insert_events(engine, made)
    assert read_votes(ADDRESS) == made
    assert read_votes(ADDRESS, since=2.0) == [made[0], made[2]]


def test_without_a_database_one_line_says_so() -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_votes(ADDRESS)


def test_one_vote_counts_for_a_user_a_prompt_and_a_pair_whichever_sides_they_had() -> None:
    counted = tally(
        [
            vote(choice="both bad"),
            vote("new", "old", "first"),  # the same pair the other way round
            vote(user="rose"),
            vote(prompt="Another day"),
            vote("old", "third"),
            vote("old", "old", "first"),
        ]
    )
    assert counted.left_out == {REPEATED: 1}
    assert counted.battles == [
        Battle("old", "new", "both bad", 120, 120),
        Battle("old", "new", "second", 120, 120),
        Battle("old", "new", "second", 120, 120),
        Battle("old", "third", "second", 120, 120),
        Battle("old", "old", "first", 120, 120),
    ]


def test_a_faulty_vote_is_kept_and_not_counted_and_does_not_take_the_place_of_a_good_one() -> None:
    counted = tally([vote(fault="too fast"), vote()])
    assert counted.left_out == {"too fast": 1}
    assert len(counted.battles) == 1


def test_a_contestant_is_an_artifact_with_its_settings_and_has_a_name_of_its_own() -> None:
    hot = vote("default", "default", settings=("temperature=0.85", "temperature=1"))
    moved = replace(vote("default", "other"), first_digest=DIGESTS["new"])
    renamed = replace(vote("champion", "other", user="rose"), first_digest=DIGESTS["new"])
    assert set(tally([hot]).contestants) == {
        "default (eeeeeeee, temperature=0.85)",
        "default (eeeeeeee, temperature=1)",
    }
    counted = tally([moved, renamed])
    assert {name: each.digest for name, each in counted.contestants.items()} == {
        "champion": DIGESTS["new"],
        "other": "e" * 64,
    }, "by its newest name"
    assert counted.contestants["champion"].settings == SETTINGS
    assert [battle.first for battle in counted.battles] == ["champion", "champion"]
