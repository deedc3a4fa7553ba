"""The shipped model behind the service, loaded once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from model.serving.backend import LocalBackend
from model.settings import Settings
from tests.model.serving.http.serving import Running, serving


@pytest.fixture(scope="session")
def shipped() -> Iterator[Running]:
    """The service over the shipped model, as a stranger would start it."""
    with serving(LocalBackend.load(Settings())) as running:
        yield running
