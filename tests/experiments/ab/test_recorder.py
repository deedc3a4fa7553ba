"""No story waits for the store, and nothing is lost in silence: outages, a full disk, a full queue, a bad event."""

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

from experiments.ab.database import connect
from experiments.ab.events import Rating
from experiments.ab.recorder import Recorder, Tally
from experiments.ab.tables import metadata, ratings
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
    began = time.perf_counter()
    recorder.add(exposure("meanwhile"))
    assert time.perf_counter() - began < 0.1
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


def test_what_is_put_down_is_stored_also_the_last_of_it() -> None:
    notes = Recorder(ADDRESS, period=3600)
    with notes.running():
        for number in range(2000):
            notes.add(exposure(f"s{number}"))
            notes.add(ending(f"s{number}"))
        notes.add(Rating(story="s1", rating=-1))
    assert notes.tally() == Tally(written=4001, waiting=0, lost=0)
    assert [count(table) for table in metadata.sorted_tables] == [2000, 2000, 1]


def test_an_outage_holds_nobody_up_is_logged_once_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    Path("stories.db").mkdir()  # no database can be opened there
    notes = recorder()
    with notes.running():
        began = time.perf_counter()
        for number in range(100):
            notes.add(exposure(f"s{number}"))
        assert time.perf_counter() - began < 1
        wait_until(lambda: len(caplog.records) == 1)
        time.sleep(0.3)  # a dozen more tries
        assert notes.tally() == Tally(written=0, waiting=100, lost=0)
        Path("stories.db").rmdir()
        wait_until(lambda: notes.tally().written == 100)
        wait_until(lambda: len(caplog.records) == 2)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("stories and verdicts cannot be stored for now (")
    assert "\n" not in first
    assert "INSERT" not in first
    assert second == "stories and verdicts are being stored again"
    assert count(metadata.tables["story_exposures"]) == 100


def test_what_no_longer_fits_is_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    Path("stories.db").mkdir()
    notes = recorder(limit=10)
    with notes.running():
        for number in range(25):
            notes.add(exposure(f"s{number}"))
        wait_until(lambda: any("cannot be stored" in record.getMessage() for record in caplog.records))
        assert notes.tally() == Tally(written=0, waiting=10, lost=15)
    said = [record.getMessage() for record in caplog.records]
    assert sum("are being lost" in line for line in said) == 1
    assert said[-1].startswith("25 events of stories and verdicts were not stored")
    assert notes.tally() == Tally(written=0, waiting=0, lost=25)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit of file sizes")
def test_a_full_disk_delays_the_notes_and_nothing_else(repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == 2, run.stderr
    assert "they are kept and tried again" in lines[0]
    assert count(metadata.tables["story_exposures"]) == 2


def test_a_store_that_is_taken_away_is_made_again() -> None:
    notes = recorder()
    with notes.running():
        notes.add(exposure("a"))
        wait_until(lambda: notes.tally().written == 1)
        for file in Path().glob("stories.db*"):
            file.unlink()
        notes.add(exposure("b"))
        wait_until(lambda: notes.tally().written == 2)
    assert count(metadata.tables["story_exposures"]) == 1


def test_an_event_that_cannot_be_stored_does_not_keep_the_others_from_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    notes = recorder()
    with notes.running():
        notes.add(Rating(story="a", rating=1))
        notes.add(Rating(story="a", rating=None))  # type: ignore[arg-type]
        notes.add(Rating(story="b", rating=-1))
        wait_until(lambda: notes.tally() == Tally(written=2, waiting=0, lost=1))
    assert count(ratings) == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_a_password_stays_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    notes = Recorder("postgresql://lily:hunter2@127.0.0.1:1/x", period=0.02, pause=0.02)
    with notes.running():
        notes.add(exposure("a"))
        wait_until(lambda: bool(caplog.records))
    assert "hunter2" not in caplog.text
    assert notes.tally().lost == 1


def test_before_it_runs_nothing_is_written_and_that_is_counted() -> None:
    notes = recorder()
    notes.add(exposure("a"))
    assert notes.tally() == Tally(written=0, waiting=0, lost=1)
    assert not Path("stories.db").exists()
