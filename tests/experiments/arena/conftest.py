"""An MLflow store for each test, copied from one that is migrated once."""

from tests.training.conftest import _migrated_store, tracking_uri

__all__ = ["_migrated_store", "tracking_uri"]
