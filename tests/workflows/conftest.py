"""The store of the training tests, of which one migrated copy is made a session."""

from __future__ import annotations

from tests.training.conftest import _migrated_store, tracking_uri

__all__ = ["_migrated_store", "tracking_uri"]
