"""Each runtime in turn."""

from __future__ import annotations

from typing import Any

import pytest

from tests.model.runtimes.shared import EMBEDDED, shipped, small


@pytest.fixture(scope="session", params=[*EMBEDDED, "torch"])
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of runtime."""
    return str(request.param)


@pytest.fixture(scope="session")
def runtime(kind: str) -> Any:
    """The small model in every kind of runtime."""
    return small(kind)


@pytest.fixture(scope="session")
def shipped_runtime(kind: str) -> Any:
    """The shipped model in every kind of runtime."""
    return shipped(kind)
