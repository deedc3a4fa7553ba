"""A notebook's own folder and MLflow store, and small models that are trained in a minute.

A notebook works inside its folder, so running it again changes nothing else, and no path that it shows names a machine.
Its models are real in every part, and too small to write stories: `story train` does the same with the recipe `small`.
"""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from training.data.corpus import own_stories_folder
from training.data.prepare import PrepareOptions, PrepareReport, prepare
from training.tracking.observer import MlflowObserver
from training.tracking.store import open_store
from training.trainer.loop import Trainer
from training.trainer.observers import Observer, ProgressObserver
from training.trainer.recipe import Recipe, load_recipe

Value = TypeVar("Value")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "notebooks"
VOCABULARY = 512
SMALL_MODEL = (
    *("model.width=96", "model.mlp_width=256", "model.heads=3", "model.head_dim=32", "model.window=64"),
    *("rows=8", "micro_rows=8", "eval_stories=0", "optimizer.warmup_steps=10"),
)
"""Changes to the recipe `tiny`: 0.3 million parameters, a thousand tokens a step."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """What a notebook's later cells need to know."""

    uri: str
    """The notebook's own MLflow store: what it registers and promotes affects nobody else."""
    small: bool

    def pick(self, full: Value, small: Value) -> Value:
        """Return `small` for a quick run of the notebook, else `full`."""
        return small if self.small else full


def begin(name: str, *, small: bool = False, folder: str | Path | None = None) -> Workspace:
    """Make an empty folder `name` in `folder` (None: runs/notebooks of this checkout) and change to it.

    Raises:
        InputError: the store cannot be created.
    """
    home = Path(folder or FOLDER).resolve()
    mine = home / name
    shutil.rmtree(mine, ignore_errors=True)
    mine.mkdir(parents=True)
    os.chdir(mine)
    # A notebook is read as a page: warnings for developers of libraries do not belong there.
    warnings.filterwarnings("ignore")
    for logger in ("mlflow", "training"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_num_threads(1)  # for networks this small, more threads cost more than they gain
    empty = home / empty_store()
    uri = f"sqlite:///{mine}/mlflow.db"
    if empty.exists():
        shutil.copy(empty, mine / "mlflow.db")
    open_store(uri)
    if not empty.exists():
        shutil.copy(mine / "mlflow.db", empty)
    return Workspace(uri, small)


def empty_store() -> str:
    """Return the name of the file that new stores are copied from; creating one takes seconds."""
    return f"empty-{version('mlflow')}.db"


def own_shards(out: Path) -> PrepareReport:
    """Make token shards of our own stories in `out`; a tenth is kept for validation."""
    return prepare(PrepareOptions(sources=(own_stories_folder(),), out=out, vocab_size=VOCABULARY, val_fraction=0.1))


def small_recipe(steps: int, *changes: str, evaluations: int = 8) -> Recipe:
    """Return the recipe of a small model with `evaluations` evaluations; `changes` are `name=value`.

    Raises:
        InputError: a change is not allowed.
    """
    pace = (f"steps={steps}", f"eval_every={max(1, steps // evaluations)}", f"save_every={steps}")
    return load_recipe("tiny", overrides=[*SMALL_MODEL, *pace, *changes])


def train_quietly(recipe: Recipe, data: Path, out: Path, uri: str, *, show: bool = False) -> str:
    """Train, logged to the store at `uri`; return the MLflow run's id. `show`: print each evaluation.

    Raises:
        StoryError: recipe or data are not usable, or the loss stopped being finite.
    """
    tracked = MlflowObserver(uri, system_seconds=None)
    observers: list[Observer] = [tracked]
    if show:
        # Plain lines on standard output, and none by the clock: a page has no moving parts.
        console = Console(file=sys.stdout, force_jupyter=False, force_terminal=False, width=110)
        observers.append(ProgressObserver(console, every=1e9))
    Trainer(recipe, data=data, out=out, observers=observers).run()
    return tracked.run_id


def sample_lines(rows: Sequence[Sequence[object]], columns: Sequence[str], *, letters: int = 150) -> list[str]:
    """Return the first sample story at each step of a run's table, cut to `letters`: "step 40: Once …"."""
    step, prompt, continuation = (columns.index(name) for name in ("step", "prompt", "continuation"))
    first: dict[object, str] = {}
    for row in rows:
        first.setdefault(row[step], " ".join(f"{row[prompt]}{row[continuation]}".split()))
    width = max((len(str(number)) for number in first), default=0)
    return [
        f"step {number!s:>{width}}: {text[:letters]}{'…' if len(text) > letters else ''}"
        for number, text in first.items()
    ]
