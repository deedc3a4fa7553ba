"""What the tests of the engine share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.model.engines import NO_END, runtime
from tests.model.fake_runtime import FakeRuntime


@pytest.fixture
def gated() -> Iterator[FakeRuntime]:
    """A network whose steps wait while its gate is closed; opened again whatever happens."""
    network = runtime(**NO_END)
    yield network
    network.gate.set()
