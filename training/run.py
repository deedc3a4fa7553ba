"""`story train`: put recipe, data, folder and observers together, in one process or several."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from model.architecture.folder import PRETRAINED, read_config
from model.errors import InputError, ModelError
from model.serving.http.server import free_port
from training.data.corpus import own_stories_folder
from training.data.prepare import PrepareOptions, prepare
from training.trainer.observers import Observer, ProgressObserver, RunEnd
from training.trainer.recipe import Recipe, overridden

GRACE_SECONDS = 10.0
"""How long the other processes of a group may go on when one has failed."""


def resumed_recipe(out: Path, overrides: list[str]) -> Recipe:
    """The recipe of the run in `out`, with `name=value` overrides. Raises `ModelError` and `InputError`."""
    from training.trainer.checkpoint import find_last

    folder = find_last(out)
    recipe = read_config(folder).get("recipe")
    if not isinstance(recipe, dict):
        raise ModelError(f"{folder / 'config.json'} holds no recipe; name one with --preset or --config")
    return Recipe.from_dict(overridden(recipe, overrides))


def train(
    recipe: Recipe,
    *,
    data: Path,
    out: Path,
    resume: bool = False,
    init: Path | None = None,
    minutes: float | None = None,
    track: bool = True,
    observers: Sequence[Observer] | None = None,
) -> RunEnd:
    """Train (or resume) in this process; under `torchrun`, as one process of the group.

    `init` is a model folder or checkpoint whose weights a new run starts from. `observers` replace the terminal's
    progress and MLflow. Raises `StoryError`.
    """
    import torch

    from training.tracking.observer import MlflowObserver
    from training.tracking.provenance import usable_cores
    from training.trainer.loop import Trainer
    from training.trainer.parallel import Group

    if minutes is not None:
        recipe = Recipe.from_dict(recipe.as_dict() | {"minutes": minutes})
    group = Group()
    if group.size > 1:
        torch.set_num_threads(max(1, usable_cores() // group.size))
    if observers is None:
        observers = [ProgressObserver(), *([MlflowObserver()] if track else [])] if group.first else []
    try:
        where: dict[str, Any] = {"data": data, "out": out, "resume": resume, "init": init}
        return Trainer(recipe, **where, observers=observers, group=group).run()
    finally:
        group.close()


def relaunch(processes: int, arguments: list[str]) -> int:
    """Run this same `story` command in `processes` processes of this machine; returns their exit status.

    They get the environment that `torchrun` would set. SIGINT and SIGTERM are passed on without a time limit for
    saving (torchrun's is half a minute). Raises `InputError`.
    """
    if processes < 1:
        raise InputError("processes", f"must be at least 1, got {processes}")
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    workers: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            worker.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for rank in range(processes):
            environment = os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(subprocess.Popen([sys.executable, "-m", "story", *arguments], env=environment))
        return _wait(workers)
    finally:
        for worker in workers:
            worker.kill()  # does nothing to one that has ended
            worker.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(workers: list[subprocess.Popen[bytes]]) -> int:
    """The first exit status that is not 0. Without one of its processes a group cannot go on, nor end."""
    deadline = math.inf
    while True:
        states = [worker.poll() for worker in workers]
        failed = [state for state in states if state]
        if None not in states or time.monotonic() > deadline:
            # A process that a signal ended has a negative status; a shell calls that 128 + the signal.
            return next((state if state > 0 else 128 - state for state in failed), 0)
        if failed and deadline == math.inf:
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(0.05)


SHARDS = Path("data/tinystories")
"""What `story data` makes, without --out."""
OWN_SHARDS = Path("data/own")
OWN_RECIPE = "own"


def find_start(
    data: Path | None, *, preset: str | None, init: Path | None, recipe_given: bool, say: Console
) -> tuple[Path, str | None, Path | None]:
    """Fill in defaults: returns folder of shards, preset and the folder of the initial weights.

    The data are `data/tinystories` where it exists; otherwise shards of the project's own stories are made. Those are
    too few to train on from scratch, so unless a recipe (`recipe_given`: by a file or a resumed run) or weights were
    chosen, training continues from the shipped model. Raises `DataError`.
    """
    if data is not None or SHARDS.is_dir():
        return data or SHARDS, preset, init
    tokenizer = PRETRAINED / "tokenizer.json"
    prepare(PrepareOptions(sources=(own_stories_folder(),), out=OWN_SHARDS, tokenizer=tokenizer), None)
    chosen = recipe_given or preset is not None or init is not None
    what = "training on our own few stories" if chosen else "the shipped model goes on with our own few stories"
    say.print(f"{SHARDS} is not there (`story data` makes it): {what}", soft_wrap=True)
    return (OWN_SHARDS, preset, init) if chosen else (OWN_SHARDS, OWN_RECIPE, PRETRAINED)
