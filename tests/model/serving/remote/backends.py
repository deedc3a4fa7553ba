"""Backends for these tests: real engines, real connections, and time-outs that a test can wait for."""

from __future__ import annotations

from collections.abc import Callable

from model.generation import Completion, GenerationRequest
from model.serving.backend import LocalBackend, ModelInfo
from model.serving.remote.client import Timeouts
from model.serving.remote.failover import FailoverBackend
from model.serving.remote.modal import Breaker, ModalBackend
from tests.model.serving.http.serving import paced

QUICK = Timeouts(connect=1.0, start=0.5, first_token=0.5, between_tokens=0.5)
CALM = Timeouts(connect=10.0, start=10.0, first_token=10.0, between_tokens=10.0)
"""For a service that does its part on a machine that may be busy."""
REMOTE = ModelInfo(name="a model elsewhere", version="fedcba9876543210" * 4)


def modal(
    endpoint: str | Callable[[], str],
    *,
    timeouts: Timeouts = QUICK,
    failures: int = 3,
    reset: float = 30.0,
    headers: dict[str, str] | None = None,
    fail_fast: bool = False,
) -> ModalBackend:
    """The service at `endpoint`."""
    return ModalBackend(
        endpoint if callable(endpoint) else lambda: endpoint,
        model=REMOTE,
        timeouts=timeouts,
        breaker=Breaker(failures, reset),
        headers=headers,
        fail_fast=fail_fast,
    )


def auto(
    endpoint: str | Callable[[], str],
    *,
    local: LocalBackend | None = None,
    timeouts: Timeouts = QUICK,
    failures: int = 3,
    reset: float = 30.0,
) -> FailoverBackend:
    """That service, with a real engine beside it whose stories end only at their length."""
    return FailoverBackend(
        modal(endpoint, timeouts=timeouts, failures=failures, reset=reset, fail_fast=True),
        local or paced(slots=4)[0],
    )


def alone(request: GenerationRequest) -> Completion:
    """What the engine of `auto` writes when nobody else has a hand in it."""
    with paced()[0].engine as engine:
        return engine.submit(request).wait(10)
