"""What the Status page shows, compared with streams that were sent on purpose and with Prometheus' own quantiles."""

from __future__ import annotations

import asyncio
import json
import math
from bisect import bisect_left

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from demo.status import FAILURES, LABELS, STEP, UNITS, WINDOW, StatusSource, _read, in_words, quantile
from experiments.common.thresholds import METRICS, load_thresholds
from model.errors import StoryError
from model.generation import GenerationRequest
from model.serving.backend import Backend, Health
from model.serving.metrics import OUTCOMES, Meter
from model.serving.session import GenerationManager
from tests.demo.engines import local_backend
from tests.demo.scripted import ScriptedBackend, busy

BOUNDS = (0.1, 0.5, 1.0, 5.0)


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def source_of(backend: Backend, clock: Clock | None = None) -> tuple[GenerationManager, StatusSource]:
    meter = Meter(backend)
    manager = GenerationManager(backend, observers=[meter])
    return manager, StatusSource(manager, meter, list(load_thresholds()), clock=clock or Clock())


async def tell(manager: GenerationManager, stories: int, max_tokens: int = 8) -> None:
    """Request stories one after the other, and read each to its end or its error."""
    for _ in range(stories):
        try:
            async with manager.session([GenerationRequest(prompt="One day", max_tokens=max_tokens)]) as session:
                async for _event in session.events(5.0):
                    pass
        except StoryError:
            continue


def figures(status: dict[str, object]) -> dict[str, dict[str, object]]:
    shown = status["figures"]
    assert isinstance(shown, list)
    return {each["metric"]: each for each in shown}


@given(st.lists(st.floats(0.001, 20), min_size=1, max_size=60), st.sampled_from([0.01, 0.5, 0.95, 1.0]))
@example([0.26] * 3, 1.0)
def test_a_quantile_lies_in_the_bucket_of_the_observation_of_that_rank(values: list[float], share: float) -> None:
    histogram = Histogram("h", "h", buckets=BOUNDS, registry=CollectorRegistry())
    for value in values:
        histogram.observe(value)
    buckets, total = _read(histogram)
    assert total == pytest.approx(sum(values))
    found = quantile(buckets, share)
    assert found is not None
    exact = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    place = bisect_left(BOUNDS, exact)
    assert (0.0, *BOUNDS)[place if place < len(BOUNDS) else -1] <= found <= BOUNDS[min(place, len(BOUNDS) - 1)]


def test_a_quantile_is_that_of_prometheus() -> None:
    # promtool: histogram_quantile over le="0.1" 2, le="0.5" 6, le="+Inf" 10
    buckets = ((0.1, 2.0), (0.5, 6.0), (math.inf, 10.0))
    assert quantile(buckets, 0.1) == pytest.approx(0.05)
    assert quantile(buckets, 0.4) == pytest.approx(0.1 + 0.4 * 2 / 4)
    assert quantile(buckets, 0.9) == 0.5, "the highest finite bound"
    assert quantile(((0.1, 0.0), (math.inf, 0.0)), 0.5) is None


def test_streams_of_a_real_engine_are_counted_and_held_against_the_documented_thresholds() -> None:
    async def go() -> None:
        backend = local_backend(slots=4, end_bias=-50)
        manager, source = source_of(backend)
        async with manager.running():
            before = figures(source.status())
            assert before["ttft_p95"]["text"] == ""
            assert before["ttft_p95"]["holds"] is None, "nothing was measured"
            await tell(manager, 5)
            now = source.status()
        assert (now["state"], now["served_by"], now["runtime"]) == ("ready", "local", backend.engine.runtime_name)
        assert (now["slots"], now["active"], now["waiting"], now["stories"]) == (4, 0, 0, 5)
        shown = figures(now)
        assert shown["success_rate"]["value"] == 1.0
        assert all(shown[name]["holds"] for name in ("ttft_p95", "success_rate", "avg_generation_time", "error_rate"))
        assert (shown["concurrent_handling"]["value"], shown["concurrent_handling"]["holds"]) == (4, True)
        between = [shown[name]["value"] for name in ("itl_p50", "itl_p95")]
        assert 0 < between[0] <= between[1]  # type: ignore[operator]
        bounds = {name: shown[name]["threshold"] for name in ("ttft_p95", "success_rate", "memory_percent", "itl_p50")}
        assert bounds == {"ttft_p95": "≤ 1 s", "success_rate": "≥ 80 %", "memory_percent": "< 80 %", "itl_p50": ""}
        assert now["failures"] == []

    asyncio.run(go())


def test_failures_are_counted_by_kind_and_hold_nothing_of_the_error() -> None:
    async def go() -> None:
        broken = ScriptedBackend("A story.", finish="error")
        manager, source = source_of(broken)
        await tell(manager, 2)
        broken.fail = busy()
        await tell(manager, 1)
        now = source.status()
        assert [(each["kind"], each["count"]) for each in now["failures"]] == [("refused", 1), ("error", 2)]
        shown = figures(now)
        assert (shown["error_rate"]["value"], shown["error_rate"]["holds"]) == (1.0, False)
        assert (shown["success_rate"]["text"], shown["success_rate"]["holds"]) == ("0.0 %", False)
        assert now["state"] == "not ready"
        assert "pen broke" not in json.dumps(now)
        assert "slots are taken" not in json.dumps(now)

    asyncio.run(go())


def test_figures_are_of_the_last_minutes_and_the_past_does_not_grow() -> None:
    async def go() -> None:
        clock = Clock()
        manager, source = source_of(ScriptedBackend("One two three."), clock)
        await tell(manager, 3)
        clock.now += STEP
        assert source.status()["stories"] == 3
        for _ in range(1000):
            clock.now += 3
            source.status()
        assert len(source._past) <= WINDOW / STEP + 2
        await tell(manager, 2)
        now = source.status()
        assert now["stories"] == 2, "the first three were too long ago"
        assert WINDOW <= now["window_seconds"] < WINDOW + 2 * STEP
        clock.now += 3600
        assert source.status()["window_seconds"] >= 3600, "nobody asked meanwhile, and it says so"

    asyncio.run(go())


def test_the_longest_story_is_known_by_its_bucket() -> None:
    assert in_words("max_generation_time", 2.5) == "at most 2.5 s"
    assert in_words("max_generation_time", math.inf) == "more than 120 s"
    assert [in_words("ttft_p50", value) for value in (0.0123, 0.9999, None)] == ["12.3 ms", "1.00 s", ""]
    assert (in_words("success_rate", 0.975), in_words("tokens_per_second", 9284.2)) == ("97.5 %", "9,284 tokens/s")


def test_units_and_thresholds_are_the_documented_ones() -> None:
    assert {name: METRICS[name].unit for name in LABELS} == UNITS
    documented = {each.metric for each in load_thresholds() if each.reason.startswith("Documented.")}
    assert documented <= set(LABELS)
    assert set(FAILURES) < set(OUTCOMES)


class Detailed(ScriptedBackend):
    """A backend whose detail is for an operator."""

    def health(self) -> Health:
        return Health(ready=False, served_by="modal", detail="https://lily.example: /srv/lily is full", engine=None)


def test_everything_is_json_and_names_no_place() -> None:
    _, source = source_of(Detailed("A story."))
    status = source.status()
    assert json.loads(json.dumps(status)) == status
    assert "lily" not in json.dumps(status)
    assert (status["state"], status["served_by"]) == ("not ready", "modal")
    assert set(status["model"]) == {"name", "alias", "digest"}
    assert len(status["model"]["digest"]) == 12
