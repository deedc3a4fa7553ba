from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.tracking.outbox import BATCH, Leftover, Outbox, Point, read_leftover, write_leftover

NEVER = 3600.0


class Store:
    """Stands for a tracking store, because only a store of our own goes away and comes back on demand."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.batches: list[int] = []
        self.files: dict[str, str] = {}
        self.gone = False
        self.asked = threading.Event()

    def take_points(self, points: list[Point]) -> None:
        self.asked.set()
        if self.gone:
            raise ConnectionError("the store\nis gone")
        self.points += points
        self.batches.append(len(points))

    def take_file(self, path: str, text: str) -> None:
        if self.gone:
            raise ConnectionError("the store is gone")
        self.files[path] = text


def points(count: int, first: int = 0) -> list[Point]:
    return [Point("train/loss", float(step), 1_700_000_000_000, step) for step in range(first, first + count)]


def outbox(
    store: Store,
    *,
    limit: int = 100_000,
    on_failure: Callable[[str], None] = lambda error: None,
    on_recovery: Callable[[], None] = lambda: None,
) -> Outbox[Point]:
    return Outbox(
        store.take_points,
        store.take_file,
        period=NEVER,
        limit=limit,
        first_pause=0.01,
        on_failure=on_failure,
        on_recovery=on_recovery,
    )


def wait_until(condition: Callable[[], bool]) -> None:
    turn = threading.Event()
    for _ in range(3000):
        if condition():
            return
        turn.wait(0.01)
    pytest.fail("it did not happen within 30 seconds")


def test_points_arrive_once_in_order_and_in_batches() -> None:
    store = Store()
    box = outbox(store)
    box.add(points(2 * BATCH + 50))
    left = box.close()
    assert store.points == points(2 * BATCH + 50)
    assert max(store.batches) <= BATCH
    assert left == Leftover((), {}, 0, None)


def test_nothing_is_sent_before_it_is_time_or_asked_for() -> None:
    store = Store()
    box = outbox(store)
    box.add(points(5))
    assert not store.asked.wait(0.1)
    box.flush()
    wait_until(lambda: len(store.points) == 5)
    box.close()


def test_a_full_batch_is_sent_at_once() -> None:
    store = Store()
    box = outbox(store)
    box.add(points(BATCH))
    wait_until(lambda: len(store.points) == BATCH)
    box.close()


def test_what_a_store_did_not_take_is_sent_when_it_is_back() -> None:
    store = Store()
    failures: list[str] = []
    recoveries: list[int] = []
    box = outbox(store, on_failure=failures.append, on_recovery=lambda: recoveries.append(1))
    store.gone = True
    box.add(points(10))
    box.flush()
    wait_until(lambda: bool(failures))
    box.add_file("samples/a.md", "old")
    box.add_file("samples/a.md", "new")
    store.asked.clear()
    box.flush()
    assert store.asked.wait(30)  # a second failure, not told again
    store.gone = False
    box.add(points(10, first=10))
    box.flush()
    wait_until(lambda: bool(recoveries))
    left = box.close()
    assert store.points == points(20)
    assert store.files == {"samples/a.md": "new"}
    assert failures == ["the store is gone"]
    assert recoveries == [1]
    assert left.error is None


def test_what_never_arrived_is_handed_back() -> None:
    store = Store()
    store.gone = True
    box = outbox(store)
    box.add(points(3))
    box.add_file("a.md", "text")
    left = box.close()
    assert left == Leftover(tuple(points(3)), {"a.md": "text"}, 0, "the store is gone")


def test_a_full_buffer_drops_the_oldest_and_counts_them() -> None:
    store = Store()
    store.gone = True
    box = outbox(store, limit=100)
    box.add(points(130))
    left = box.close()
    assert left.points == tuple(points(100, first=30))
    assert left.dropped == 30


def test_adding_never_waits_for_a_store_that_hangs() -> None:
    release = threading.Event()

    def hang(batch: list[Point]) -> None:
        release.wait(30)

    box = Outbox(hang, lambda path, text: None, period=NEVER)
    box.add(points(BATCH))
    box.add(points(5, first=BATCH))
    box.flush()
    left = box.close(timeout=0.1)
    release.set()
    assert left.error == "no answer in 0.1 s"
    assert left.points == tuple(points(BATCH + 5))


@given(
    kept=st.lists(
        st.builds(Point, st.text(), st.floats(allow_nan=False), st.integers(0, 2**62), st.integers(0, 2**62))
    ),
    files=st.dictionaries(st.text(), st.text()),
)
def test_leftovers_read_back_from_their_file(
    kept: list[Point], files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("unsent") / "unsent.jsonl"
    write_leftover(path, Leftover(tuple(kept), files, 0, None))
    assert read_leftover(path) == (kept, files)


@pytest.mark.parametrize("text", ["{", "[1]\n", '{"other": 1}\n', '{"point": [1]}\n', '{"path": "a"}\n'])
def test_a_damaged_file_of_leftovers_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "unsent.jsonl").write_text(text)
    with pytest.raises((ValueError, TypeError, KeyError)):
        read_leftover(tmp_path / "unsent.jsonl")
