"""No request waits for the database and no loss is silent: outages, a full disk, a full queue, a bad event."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from experiments.ab.events import Rating
from experiments.ab.recorder import Recorder, Tally
from experiments.ab.store import connect, metadata, ratings
from tests.experiments.ab.events import ending, exposure

ADDRESS = "sqlite:///stories.db"

FULL_DISK = """
import logging, resource, signal, time
from experiments.ab.recorder import Recorder
from tests.experiments.ab.events import exposure
from tests.experiments.ab.test_recorder import ADDRESS, wait_until

logging.basicConfig(format="%(message)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
recorder = Recorder(ADDRESS, period=0.05, pause=0.05)
with recorder.running():
    recorder.add(exposure("before"))
    wait_until(lambda: recorder.tally().written == 1)
    # No file of this process may grow: what a full disk looks like to SQLite.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    recorder.add(exposure("meanwhile"))
    time.sleep(0.5)
    assert (recorder.tally().written, recorder.tally().waiting) == (1, 1), recorder.tally()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_until(lambda: recorder.tally().written == 2)
"""


def recorder(**options: float) -> Recorder:
    return Recorder(ADDRESS, period=0.02, pause=0.02, **options)  # type: ignore[arg-type]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def count(table: sa.Table) -> int:
    with connect(ADDRESS, writes=False).connect() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def test_all_events_are_stored_including_the_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.ab.recorder.CLOSE_TIMEOUT", 60.0)  # it includes making the database
    events = Recorder(ADDRESS, period=3600)
    with events.running():
        for number in range(2000):
            events.add(exposure(f"s{number}"))
            events.add(ending(f"s{number}"))
        events.add(Rating(story="s1", rating=-1))
    assert events.tally() == Tally(written=4001, waiting=0, lost=0)
    assert [count(table) for table in metadata.sorted_tables] == [2000, 2000, 1, 0]


def test_an_outage_delays_nobody_is_logged_once_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    Path("stories.db").mkdir()  # no database can be opened there
    events = recorder()
    with events.running():
        for number in range(100):
            events.add(exposure(f"s{number}"))
        wait_until(lambda: len(caplog.records) == 1)
        time.sleep(0.3)  # a dozen more tries
        assert events.tally() == Tally(written=0, waiting=100, lost=0)
        Path("stories.db").rmdir()
        wait_until(lambda: events.tally().written == 100)
        wait_until(lambda: len(caplog.records) == 2)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("events cannot be stored for now (")
    assert "\n" not in first
    assert "INSERT" not in first
    assert second == "events are being stored again"
    assert count(metadata.tables["story_exposures"]) == 100


def test_events_that_do_not_fit_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    Path("stories.db").mkdir()
    events = recorder(limit=10)
    with events.running():
        for number in range(25):
            events.add(exposure(f"s{number}"))
        wait_until(lambda: any("cannot be stored" in record.getMessage() for record in caplog.records))
        assert events.tally() == Tally(written=0, waiting=10, lost=15)
    said = [record.getMessage() for record in caplog.records]
    assert sum("are being lost" in line for line in said) == 1
    assert said[-1].startswith("25 events were not stored")
    assert events.tally() == Tally(written=0, waiting=0, lost=25)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit of file sizes")
def test_a_full_disk_delays_events_only(repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == 2, run.stderr
    assert "they are kept and retried" in lines[0]
    assert count(metadata.tables["story_exposures"]) == 2


def test_a_removed_database_is_created_again() -> None:
    events = recorder()
    with events.running():
        events.add(exposure("a"))
        wait_until(lambda: events.tally().written == 1)
        for file in Path().glob("stories.db*"):
            file.unlink()
        events.add(exposure("b"))
        wait_until(lambda: events.tally().written == 2)
    assert count(metadata.tables["story_exposures"]) == 1


def test_an_invalid_event_does_not_keep_the_others_out(caplog: pytest.LogCaptureFixture) -> None:
    events = recorder()
    with events.running():
        events.add(Rating(story="a", rating=1))
        events.add(Rating(story="a", rating=None))  # type: ignore[arg-type]
        events.add(Rating(story="b", rating=-1))
        wait_until(lambda: events.tally() == Tally(written=2, waiting=0, lost=1))
    assert count(ratings) == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_a_password_stays_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    events = Recorder("postgresql://lily:hunter2@127.0.0.1:1/x", period=0.02, pause=0.02)
    with events.running():
        events.add(exposure("a"))
        wait_until(lambda: bool(caplog.records))
    assert "hunter2" not in caplog.text
    assert events.tally().lost == 1


def test_events_added_before_it_runs_are_counted_as_lost() -> None:
    events = recorder()
    events.add(exposure("a"))
    assert events.tally() == Tally(written=0, waiting=0, lost=1)
    assert not Path("stories.db").exists()
