"""Move the alias `champion` for the page's operator, as `story promote` and `story rollback` do, in another process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from experiments.common.background import background
from model.errors import StoryError, one_line

Action = Literal["promote", "rollback"]


class Answer(NamedTuple):
    """What moved or would move, or why nothing does."""

    line: str
    """For the operator."""
    plan: str = ""
    """Of a dry run: by this it is confirmed; empty where there is nothing to confirm."""
    done: bool = False
    """Whether something moved."""
    error: str = ""
    """For the log."""


def move(uri: str, thresholds: Path, idle_timeout: float, action: Action, version: str, plan: str) -> Answer:
    """Show what `action` would move in the store at `uri`, or, with the `plan` of such a dry run, move it.

    `version` and `thresholds` are for `promote`: a number or an alias, and the file that the gate's verdict must be by.
    A plan that no longer fits moves nothing: the answer has the new one. The process ends when nobody asks for
    `idle_timeout` s.
    """
    with background(idle_timeout):
        return answer(uri, thresholds, action, version, plan)


def answer(uri: str, thresholds: Path, action: Action, version: str, plan: str) -> Answer:
    """Answer as `move`, in this process."""
    try:
        return _moved(uri, thresholds, action, version, plan)
    except StoryError as error:
        return Answer(str(error))
    except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
        reason = f"{type(error).__name__}: {one_line(error)}"
        return Answer("The store of the experiments cannot be changed; the server's log says why.", error=reason)


def _moved(uri: str, thresholds: Path, action: Action, version: str, plan: str) -> Answer:
    from experiments.common.thresholds import load_thresholds
    from experiments.gate.run import Move, StaleMoveError, promote, rollback

    def run(*, apply: bool) -> Move:
        if action == "promote":
            return promote(uri, load_thresholds(thresholds), version=version, apply=apply, plan=plan or None)
        return rollback(uri, apply=apply, plan=plan or None)

    words = "promoted" if action == "promote" else "champion again"
    changed = ""
    if plan:
        try:
            return Answer(run(apply=True).described(f"is {words}"), done=True)
        except StaleMoveError as error:
            changed = f"{error}. Now: "
    would = run(apply=False)
    return Answer(changed + would.described(f"would be {words}"), would.plan)
