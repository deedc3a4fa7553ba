"""Rows made by hand, on whose figures one can work out by hand."""

from __future__ import annotations

from typing import Any

from experiments.benchmark.sample import Phase, Sample


def row(
    phase: Phase = "single",
    *,
    due: float = 0.0,
    arrivals: tuple[float, ...] = (0.5, 1.0, 1.5),
    ended: float = 2.0,
    **options: Any,
) -> Sample:
    """A story of one token a message, sent when it was due."""
    values: dict[str, Any] = {
        "level": 1,
        "number": 0,
        "seed": 0,
        "started": due,
        "tokens": len(arrivals),
        "counts": [1] * len(arrivals),
        "finish": "stop",
        **options,
    }
    return Sample(phase=phase, scheduled=due, arrivals=list(arrivals), ended=ended, **values)


def failed(phase: Phase = "single", *, error: str = "busy", due: float = 0.0, **options: Any) -> Sample:
    """A request that brought nothing."""
    return row(phase, due=due, arrivals=(), ended=due + 0.1, error=error, finish="", message="no", **options)
