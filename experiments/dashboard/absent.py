"""Whether there is a store to read at all, found out without MLflow and without making one."""

from __future__ import annotations

import importlib.util

from training.tracking.store import database_file

FILLED_BY = "`story train` fills it"


def why_absent(uri: str) -> str | None:
    """In one line for a visitor, why nothing can be shown of the store at `uri`; None: it can be asked."""
    if importlib.util.find_spec("mlflow") is None:
        return (
            "MLflow, which keeps the experiments, is not installed here; "
            "install the extra `train`, and `story train` fills this page."
        )
    if (database := database_file(uri)) is not None and not (database.is_file() and database.stat().st_size):
        return f"There is no experiment yet: this page shows what MLflow keeps, and {FILLED_BY}."
    return None
