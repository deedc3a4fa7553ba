"""The buffer and its background thread: order, batches, failures, a full buffer, a destination that hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from model.outbox import BATCH, Leftover, Outbox

NEVER = 3600.0


class Store:
    """A destination that fails and recovers on demand."""

    def __init__(self) -> None:
        self.items: list[str] = []
        self.batches: list[int] = []
        self.files: dict[str, str] = {}
        self.gone = False
        self.asked = threading.Event()

    def take_items(self, items: list[str]) -> None:
        self.asked.set()
        if self.gone:
            raise ConnectionError("the store\nis gone")
        self.items += items
        self.batches.append(len(items))

    def take_file(self, path: str, text: str) -> None:
        if self.gone:
            raise ConnectionError("the store is gone")
        self.files[path] = text


def items(count: int, first: int = 0) -> list[str]:
    return [f"item {number}" for number in range(first, first + count)]


def outbox(
    store: Store,
    *,
    limit: int = 100_000,
    on_failure: Callable[[str], None] = lambda error: None,
    on_recovery: Callable[[], None] = lambda: None,
) -> Outbox[str]:
    return Outbox(
        store.take_items,
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


def test_items_arrive_once_in_order_and_in_batches() -> None:
    store = Store()
    box = outbox(store)
    box.add(items(2 * BATCH + 50))
    left = box.close()
    assert store.items == items(2 * BATCH + 50)
    assert max(store.batches) <= BATCH
    assert left == Leftover((), {}, 0, None)


def test_nothing_is_sent_before_it_is_time_or_asked_for() -> None:
    store = Store()
    box = outbox(store)
    box.add(items(5))
    assert not store.asked.wait(0.1)
    box.flush()
    wait_until(lambda: len(store.items) == 5)
    box.close()


def test_a_full_batch_is_sent_at_once() -> None:
    store = Store()
    box = outbox(store)
    box.add(items(BATCH))
    wait_until(lambda: len(store.items) == BATCH)
    box.close()


def test_what_a_store_did_not_take_is_sent_when_it_is_back() -> None:
    store = Store()
    failures: list[str] = []
    recoveries: list[int] = []
    box = outbox(store, on_failure=failures.append, on_recovery=lambda: recoveries.append(1))
    store.gone = True
    box.add(items(10))
    box.flush()
    wait_until(lambda: bool(failures))
    box.add_file("samples/a.md", "old")
    box.add_file("samples/a.md", "new")
    store.asked.clear()
    box.flush()
    assert store.asked.wait(30)  # a second failure, not reported again
    store.gone = False
    box.add(items(10, first=10))
    box.flush()
    wait_until(lambda: bool(recoveries))
    left = box.close()
    assert store.items == items(20)
    assert store.files == {"samples/a.md": "new"}
    assert failures == ["the store is gone"]
    assert recoveries == [1]
    assert left.error is None


def test_what_never_arrived_is_handed_back() -> None:
    store = Store()
    store.gone = True
    box = outbox(store)
    box.add(items(3))
    box.add_file("a.md", "text")
    left = box.close()
    assert left == Leftover(tuple(items(3)), {"a.md": "text"}, 0, "the store is gone")


def test_a_full_buffer_drops_the_oldest_and_counts_them() -> None:
    store = Store()
    store.gone = True
    box = outbox(store, limit=100)
    box.add(items(130))
    left = box.close()
    assert left.items == tuple(items(100, first=30))
    assert left.dropped == 30


def test_adding_never_waits_for_a_store_that_hangs() -> None:
    release = threading.Event()

    def hang(batch: list[str]) -> None:
        release.wait(30)

    box = Outbox(hang, lambda path, text: None, period=NEVER)
    box.add(items(BATCH))
    box.add(items(5, first=BATCH))
    box.flush()
    left = box.close(timeout=0.1)
    release.set()
    assert left.error == "no answer in 0.1 s"
    assert left.items == tuple(items(BATCH + 5))
