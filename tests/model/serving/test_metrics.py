"""Stories are counted by who wrote them and how they ended, whoever asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from model.errors import BusyError
from model.generation import Chunk, Completion, FinishReason, GenerationRequest, Usage
from model.serving import metrics
from model.serving.backend import Health, ModelInfo
from model.serving.metrics import MOST_NAMES, Meter, memory_limit, resident
from model.serving.session import GenerationManager

ASKED = GenerationRequest(prompt="Once", max_tokens=9)


class ScriptedStream:
    """A stream of three tokens that ends in a given way; scripted, for an engine chooses its own ending."""

    fingerprint = None

    def __init__(self, reason: FinishReason, served_by: str, failure: Exception | None) -> None:
        self.served_by, self._failure = served_by, failure
        self.cancelled = False
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        usage = Usage(prompt_tokens=5, completion_tokens=3, queued=0.25, ttft=0.3, duration=0.5)
        self.completion = Completion("a b c", reason, usage)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        yield Chunk("a", (1,))
        await self.goes_on.wait()
        yield Chunk(" b c", (2, 3))
        if self._failure is not None:
            raise self._failure

    def cancel(self) -> None:
        self.cancelled = True


class Scripted:
    name, capacity = "auto", 4
    model = ModelInfo("small", "0123456789abcdef")

    def __init__(self) -> None:
        self.next: ScriptedStream | Exception = ScriptedStream("stop", "local", None)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    def health(self) -> Health:
        return Health(True, "local", "writes", None, "open")

    async def submit(self, request: GenerationRequest) -> ScriptedStream:
        if isinstance(self.next, Exception):
            raise self.next
        return self.next


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
def meter(scripted: Scripted) -> Meter:
    return Meter(scripted, "green")


def count_of(meter: Meter, outcome: str, served_by: str) -> float:
    labels = {"outcome": outcome, "served_by": served_by, "version": "0123456789ab", "deployment": "green"}
    return meter.registry.get_sample_value("story_streams_total", labels) or 0


def metered(scripted: Scripted, meter: Meter) -> GenerationManager:
    return GenerationManager(scripted, observers=[meter])


async def read(manager: GenerationManager) -> str:
    async with manager.session([ASKED]) as session:
        events = [event async for event in session.events(60)]
    return "".join(event.chunk.text for event in events if event is not None and event.chunk is not None)


async def test_a_story_counts_under_its_ending_backend_version_and_deployment(scripted: Scripted, meter: Meter) -> None:
    scripted.next = ScriptedStream("length", "modal", None)
    assert await read(metered(scripted, meter)) == "a b c"
    assert count_of(meter, "length", "modal") == 1
    value = meter.registry.get_sample_value
    assert value("story_tokens_total", {"kind": "completion"}) == 3
    assert value("story_tokens_total", {"kind": "prompt"}) == 5
    assert (value("story_ttft_seconds_count"), value("story_itl_seconds_count")) == (1, 2)
    assert (value("story_queue_wait_seconds_sum"), value("story_streams_open")) == (0.25, 0)


async def test_a_story_that_breaks_in_the_middle_is_an_error_and_the_error_passes(
    scripted: Scripted, meter: Meter
) -> None:
    scripted.next = ScriptedStream("stop", "local", RuntimeError("inner"))
    with pytest.raises(RuntimeError, match="inner"):
        await read(metered(scripted, meter))
    assert (count_of(meter, "error", "local"), count_of(meter, "stop", "local")) == (1, 0)


async def test_a_client_who_leaves_in_the_middle_or_before_it_is_counted_once(scripted: Scripted, meter: Meter) -> None:
    manager = metered(scripted, meter)
    assert isinstance(scripted.next, ScriptedStream)
    scripted.next.goes_on.clear()
    async with manager.session([ASKED]) as session:
        await anext(session.events(60))
    assert count_of(meter, "cancelled", "local") == 1
    async with manager.session([ASKED]) as unread:
        assert meter.registry.get_sample_value("story_streams_open") == 1
    await unread.close()
    assert count_of(meter, "cancelled", "local") == 2
    assert meter.registry.get_sample_value("story_streams_open") == 0


async def test_what_never_begins_is_counted_by_why(scripted: Scripted, meter: Meter) -> None:
    manager = metered(scripted, meter)
    for scripted.next in (BusyError("full", 1.0), RuntimeError("no model")):
        with pytest.raises(type(scripted.next)):
            await read(manager)
    assert count_of(meter, "refused", "local") == 1
    assert count_of(meter, "error", "local") == 1
    assert meter.registry.get_sample_value("story_streams_open") == 0


async def test_names_from_elsewhere_cannot_grow_without_end(scripted: Scripted, meter: Meter) -> None:
    manager = metered(scripted, meter)
    for number in range(40):
        scripted.next = ScriptedStream("stop", f"backend-{number}", None)
        await read(manager)
    samples = [s for family in meter.registry.collect() for s in family.samples]
    writers = {s.labels["served_by"] for s in samples if s.name == "story_streams_total"}
    assert len(writers) == MOST_NAMES + 1
    assert count_of(meter, "stop", "other") == 40 - (MOST_NAMES - 1)  # `local` was known from the start


def test_the_breaker_and_what_writes_can_be_seen(meter: Meter) -> None:
    value = meter.registry.get_sample_value
    assert [value("story_breaker", {"state": s}) for s in ("closed", "open", "half-open")] == [0, 1, 0]
    assert value("story_info", {"deployment": "green", "version": "0123456789ab", "served_by": "local"}) == 1


def test_where_the_system_does_not_report_memory_nothing_is_claimed(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "resident", lambda: None)
    names = {family.name for family in Meter(scripted).registry.collect()}
    assert not any(name.startswith("story_memory") for name in names)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    memory_limit.cache_clear()


def test_resident_memory_grows_with_what_is_touched_and_stays_below_the_peak() -> None:
    before = resident()
    assert before is not None
    held = bytearray(os.urandom(1 << 20) * 64)
    after = resident()
    assert after is not None
    assert after - before > 50 << 20
    assert after <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert len(held) == 64 << 20


@pytest.mark.parametrize(("text", "limited"), [("123456789\n", True), ("max\n", False), ("9" * 18, False)])
def test_the_limit_is_the_containers_or_else_the_machines(
    text: str, limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(metrics, "CGROUP_LIMITS", (tmp_path / "none", tmp_path / "memory.max"))
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_limit() == (123456789 if limited else machine)


def test_where_there_is_no_such_file_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "STATM", tmp_path / "none")
    assert resident() is None
