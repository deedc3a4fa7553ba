"""What goes with a backend that notes its stories: an id for each reader, and figures for the operator.

How many events were stored or lost is no secret; which arm did what is, and is not told here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.middleware import Middleware

from demo.routing.split import SplitBackend
from demo.routing.visitor import VisitorCookie

if TYPE_CHECKING:
    from experiments.ab.recorder import Recorder
    from model.serving.backend import Backend
    from model.serving.http.app import Service


def middleware(backend: Backend) -> list[Middleware]:
    """What gives readers an id, where that is of any use."""
    return [Middleware(VisitorCookie)] if isinstance(backend, SplitBackend) else []


def add_figures(service: Service, backend: Backend) -> None:
    """Have the service's `/metrics` tell what became of the events, where there are any."""
    if isinstance(backend, SplitBackend):
        service.meter.registry.register(_Figures(backend.recorder))


class _Figures(Collector):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        tally = self._recorder.tally()
        events = CounterMetricFamily(
            "story_events", "What was noted of stories and readers, by what became of it.", labels=["state"]
        )
        events.add_metric(["written"], tally.written)
        events.add_metric(["lost"], tally.lost)
        yield events
        yield GaugeMetricFamily("story_events_waiting", "Notes that are still to be stored.", tally.waiting)
