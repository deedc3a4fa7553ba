"""A model that is trained in a minute, for the notebooks: real in every part, and too small to tell a story by.

The step from "it runs" to "it writes" is only one of size: `story train` does the same with the recipe `small`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from training.data.corpus import own_stories_folder
from training.data.prepare import PrepareOptions, PrepareReport, prepare
from training.tracking.observer import MlflowObserver
from training.trainer.loop import Trainer
from training.trainer.observers import Observer, ProgressObserver
from training.trainer.recipe import Recipe, load_recipe

PIECES = 512
LITTLE = (
    "model.width=96", "model.mlp_width=256", "model.heads=3", "model.head_dim=32", "model.window=64",
    "rows=8", "micro_rows=8", "eval_stories=0", "optimizer.warmup_steps=10",
)  # fmt: skip
"""What is changed in the recipe `tiny`: 0.3 million parameters, a thousand tokens a step."""


def own_shards(out: Path) -> PrepareReport:
    """Our own stories as token shards in `out`, a tenth of them kept for validation."""
    return prepare(
        PrepareOptions(sources=(own_stories_folder(),), out=out, vocab_size=PIECES, val_fraction=0.1)
    )


def little_recipe(steps: int, *changes: str, evaluations: int = 8) -> Recipe:
    """The recipe of a little model, evaluated `evaluations` times; `changes` are `name=value`.

    Raises:
        InputError: a change is not allowed.
    """
    pace = (f"steps={steps}", f"eval_every={max(1, steps // evaluations)}", f"save_every={steps}")
    return load_recipe("tiny", overrides=[*LITTLE, *pace, *changes])


def train_quietly(recipe: Recipe, data: Path, out: Path, uri: str, *, tell: bool = False) -> str:
    """Train, logged to the store at `uri`; returns the MLflow run's id. `tell`: print each evaluation.

    Raises:
        StoryError: recipe or data are not usable, or the loss stopped being finite.
    """
    tracked = MlflowObserver(uri, system_seconds=None)
    observers: list[Observer] = [tracked]
    if tell:
        # To standard output, as plain lines, and none by the clock: a page has no moving parts.
        console = Console(file=sys.stdout, force_jupyter=False, force_terminal=False, width=110)
        observers.append(ProgressObserver(console, every=1e9))
    Trainer(recipe, data=data, out=out, observers=observers).run()
    return tracked.run_id


def sample_lines(
    rows: Sequence[Sequence[object]], columns: Sequence[str], *, letters: int = 150
) -> list[str]:
    """The first sample story at each step of a run's table of stories, cut to `letters`: "step 40: Once …"."""
    step, prompt, told = (columns.index(name) for name in ("step", "prompt", "continuation"))
    first: dict[object, str] = {}
    for row in rows:
        first.setdefault(row[step], " ".join(f"{row[prompt]}{row[told]}".split()))
    width = max((len(str(number)) for number in first), default=0)
    return [
        f"step {number!s:>{width}}: {text[:letters]}{'…' if len(text) > letters else ''}"
        for number, text in first.items()
    ]
