"""The store on a real PostgreSQL server, which the test starts for itself. Run by name: `-m slow`."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from experiments.ab.recorder import Recorder
from experiments.ab.report import look
from experiments.ab.store import HEAD, connect, endings, exposures, insert_events, migrate, ratings, revision
from experiments.arena.votes import read_votes
from tests.experiments.ab.events import exposure, users
from tests.experiments.arena.made import vote
from tests.postgres_server import postgres_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with postgres_server() as server:
        yield server.url


def test_replicas_that_start_together_migrate_once_and_lose_nothing(address: str) -> None:
    recorders = [Recorder(address, period=0.02) for _ in range(3)]
    events = list(users(300, {"champion": 0.3, "challenger": 0.8}))

    def write(recorder: Recorder, part: int) -> None:
        with recorder.running():
            for event in events[part::3]:
                recorder.add(event)

    threads = [threading.Thread(target=write, args=(recorder, part)) for part, recorder in enumerate(recorders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [recorder.tally().written for recorder in recorders] == [300] * 3
    assert sum(recorder.tally().lost for recorder in recorders) == 0
    engine = connect(address, writes=False)
    assert revision(engine) == HEAD
    with engine.connect() as connection:
        counts = [
            connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for table in (exposures, endings, ratings)
        ]
    assert counts == [300, 300, 300]
    engine.dispose()
    assert look(address, "t").verdict == "better"


def test_a_retry_adds_nothing_and_a_zero_byte_is_no_error(address: str) -> None:
    engine = connect(address.replace("postgresql://", "postgres://"), writes=True)
    migrate(engine)
    event = dataclasses.replace(exposure("zero", test="zero"), prompt="A fox\0 came")
    insert_events(engine, [event])
    insert_events(engine, [event])
    with engine.connect() as connection:
        found = connection.execute(sa.select(exposures.c.prompt).where(exposures.c.test == "zero")).scalars().all()
    assert found == ["A fox\ufffd came"]
    engine.dispose()


def test_votes_of_the_arena_come_back_as_they_were(address: str) -> None:
    engine = connect(address, writes=True)
    migrate(engine)
    made = [vote(at=2.0, seed=2**53 - 1), vote("new", "old", at=1.0, first_read=None, fault="an end was not seen")]
    insert_events(engine, made)
    insert_events(engine, made)
    engine.dispose()
    assert read_votes(address) == made
