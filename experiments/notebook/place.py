"""Where a notebook works: a folder and a store of its own, so that running it again changes nothing else.

A notebook shows paths as it uses them. It works inside its folder, so none of them names a machine.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch

from training.tracking.store import open_store

Value = TypeVar("Value")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "notebooks"


@dataclass(frozen=True, slots=True)
class Place:
    """What a notebook's later cells need to know."""

    uri: str
    """The notebook's own MLflow store: what it registers and promotes is nobody else's."""
    small: bool

    def either(self, whole: Value, small: Value) -> Value:
        """`small` where everything is to be little, else `whole`."""
        return small if self.small else whole


def begin(name: str, *, small: bool = False, folder: str | Path | None = None) -> Place:
    """Make an empty folder `name` in `folder` (None: runs/notebooks of this checkout) and go there.

    Raises:
        InputError: the store cannot be made.
    """
    home = Path(folder or FOLDER).resolve()
    mine = home / name
    shutil.rmtree(mine, ignore_errors=True)
    mine.mkdir(parents=True)
    os.chdir(mine)
    # A notebook is read as a page: what libraries mean for their developers does not belong there.
    warnings.filterwarnings("ignore")
    for logger in ("mlflow", "training"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    # All networks here are little: more threads would meet more often than they would help.
    torch.set_num_threads(1)
    empty = home / empty_store()
    if not empty.exists():
        open_store(f"sqlite:///{mine}/mlflow.db")
        shutil.copy(mine / "mlflow.db", empty)
    shutil.copy(empty, mine / "mlflow.db")
    uri = f"sqlite:///{mine}/mlflow.db"
    open_store(uri)
    return Place(uri, small)


def empty_store() -> str:
    """Name of the file that new stores are copied from: to make one takes seconds. Each MLflow has its own tables."""
    return f"empty-{version('mlflow')}.db"
