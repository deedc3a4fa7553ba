"""A store whose champion went the whole way once: registered, measured, judged, promoted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiments.gate.promoted import Place, copied, evaluated


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """The store after the promotion and an evaluation of the challenger, to be written to."""
    return copied(tmp_path, evaluated())
