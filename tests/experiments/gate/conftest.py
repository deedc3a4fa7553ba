"""A store whose champion went the whole way once: registered, measured, judged, promoted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiments.gate.promoted import Place, copied


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """The store as it stood after the promotion, to be written to."""
    return copied(tmp_path)
