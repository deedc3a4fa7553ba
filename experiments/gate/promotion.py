"""Moving the alias `champion`: by a verdict only, one at a time, checked afterwards, and undone by one command.

MLflow moves an alias without asking where it stood. So whoever promotes first writes its name on the registered
model, and goes on only if that is the name that stands there a moment later; and it looks whether the champion is
still the one that the verdict was about. What was moved is read back before anything is said.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from experiments.common.thresholds import Thresholds
from experiments.gate.run import DIGEST, EXPERIMENT
from experiments.gate.verdict import EXIT_CODES, Verdict
from experiments.registry.versions import CHALLENGER, CHAMPION, NAME, PREVIOUS, Version, find, versions
from model.errors import StoryError
from training.tracking.store import open_experiment, open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LOCK = "promotion.lock"
SETTLE = 0.3
"""Seconds in which two that wrote at the same moment see who wrote last."""
STALE = 120.0
"""Seconds after which a lock belongs to a process that died."""
VERDICT_AGE = timedelta(days=7)
SAME_MOMENT = "another promotion began at the same moment; try again"


class PromotionError(StoryError):
    """The alias stays where it is; `exit_code` tells a failed check (1) from a missing one (3)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What was moved, or would be."""

    version: int
    digest: str
    champion_before: int | None
    gate_run: str
    applied: bool
    """False: a dry run."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def promote(uri: str, thresholds: Thresholds, *, version: str = CHALLENGER, apply: bool = False) -> Move:
    """Make a version the champion, if the newest verdict on its artifact is a pass under today's thresholds.

    Raises:
        PromotionError: the verdict is another one, is missing, too old, of other thresholds or about another
            champion; somebody else is promoting; or the alias does not read back as it was set.
        InputError: there is no such version, or the store cannot be used.
    """
    client = open_store(uri)
    chosen = find(uri, version)
    champion = _holder(uri, CHAMPION)
    if champion is not None and champion.number == chosen.number:
        raise PromotionError(f"version {chosen.number} is the champion already", 1)
    run = _verdict(client, chosen, champion, thresholds)
    before = None if champion is None else champion.number
    move = Move(
        version=chosen.number, digest=chosen.digest, champion_before=before, gate_run=str(run.info.run_id),
        applied=apply,
    )  # fmt: skip
    if not apply:
        return move
    with _locked(client):
        now = _holder(uri, CHAMPION)
        if (now.number if now else None) != before:
            raise PromotionError("another version became champion meanwhile; run `story gate` again", 3)
        tags = {
            "gate": "pass", "gate.run_id": str(run.info.run_id), "thresholds.digest": thresholds.digest,
            "promoted": _utc(),
        }  # fmt: skip
        for key, value in tags.items():
            client.set_model_version_tag(NAME, str(chosen.number), key, value)
        if before is not None:
            client.set_registered_model_alias(NAME, PREVIOUS, str(before))
        client.set_registered_model_alias(NAME, CHAMPION, str(chosen.number))
        if CHALLENGER in chosen.aliases:
            client.delete_registered_model_alias(NAME, CHALLENGER)
        _read_back(uri, champion=chosen.number, previous=before)
    _log(client, uri, "promote", move)
    return move


def rollback(uri: str, *, apply: bool = True) -> Move:
    """Give `champion` back to the version that had it before; the two change places, so that it can be undone.

    Raises:
        PromotionError: there is no previous version, or somebody else is moving the alias.
    """
    client = open_store(uri)
    champion, previous = _holder(uri, CHAMPION), _holder(uri, PREVIOUS)
    if previous is None:
        raise PromotionError("there is no previous champion to go back to", 1)
    before = None if champion is None else champion.number
    move = Move(
        version=previous.number, digest=previous.digest, champion_before=before,
        gate_run=previous.tags.get("gate.run_id", ""), applied=apply,
    )  # fmt: skip
    if not apply:
        return move
    with _locked(client):
        client.set_registered_model_alias(NAME, CHAMPION, str(previous.number))
        if before is not None:
            client.set_registered_model_alias(NAME, PREVIOUS, str(before))
            client.set_model_version_tag(NAME, str(before), "rolled_back", _utc())
        _read_back(uri, champion=previous.number, previous=before)
    _log(client, uri, "rollback", move)
    return move


def _holder(uri: str, alias: str) -> Version | None:
    return next((each for each in versions(uri) if alias in each.aliases), None)


def _verdict(client: MlflowClient, chosen: Version, champion: Version | None, thresholds: Thresholds) -> Run:
    """The newest verdict on this artifact, if it lets it pass. Raises `PromotionError`."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = (
        client.search_runs(
            [experiment.experiment_id],
            f"tags.`{DIGEST}` = '{chosen.digest}' and tags.gate != '' and attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        if experiment is not None
        else []
    )
    name = f"version {chosen.number}"
    if not found:
        raise PromotionError(f"{name} was never judged; run `story gate --version {chosen.number}`", 3)
    run: Run = found[0]
    tags = run.data.tags
    verdict: Verdict = "undecided" if tags["gate"] not in EXIT_CODES else tags["gate"]
    if verdict != "pass":
        raise PromotionError(f"the gate's verdict on {name} is {verdict}, not pass", EXIT_CODES[verdict])
    if tags.get("thresholds.digest") != thresholds.digest:
        raise PromotionError(f"{name} was judged by other thresholds; run `story gate` again", 3)
    if tags.get("champion.digest", "") != (champion.digest if champion else ""):
        raise PromotionError(f"{name} was judged against another champion; run `story gate` again", 3)
    age = datetime.now(UTC) - datetime.fromtimestamp(int(run.info.start_time) / 1000, UTC)
    if age > VERDICT_AGE:
        raise PromotionError(f"the verdict on {name} is {age.days} days old; run `story gate` again", 3)
    return run


@contextlib.contextmanager
def _locked(client: MlflowClient) -> Iterator[None]:
    """Hold the registered model's lock, or raise `PromotionError`."""
    from mlflow.exceptions import MlflowException

    mine = f"{uuid.uuid4().hex} {time.time():.3f}"
    held = client.get_registered_model(NAME).tags.get(LOCK, "")
    if held and time.time() - float(held.split()[1]) < STALE:
        raise PromotionError("another promotion is under way; try again in a moment", 1)
    try:
        client.set_registered_model_tag(NAME, LOCK, mine)
    except MlflowException:
        # Of two that write a new tag at the same moment, a SQL store takes one and refuses the other.
        if not client.get_registered_model(NAME).tags.get(LOCK):
            raise
        raise PromotionError(SAME_MOMENT, 1) from None
    time.sleep(SETTLE)
    if client.get_registered_model(NAME).tags.get(LOCK) != mine:
        raise PromotionError(SAME_MOMENT, 1)
    try:
        yield
    finally:
        if client.get_registered_model(NAME).tags.get(LOCK) == mine:
            client.delete_registered_model_tag(NAME, LOCK)


def _read_back(uri: str, *, champion: int, previous: int | None) -> None:
    now = _holder(uri, CHAMPION)
    before = _holder(uri, PREVIOUS)
    if (now.number if now else None) != champion or (
        previous is not None and (before.number if before else None) != previous
    ):
        raise PromotionError(f"the alias champion does not read back as version {champion}; look at it", 1)


def _log(client: MlflowClient, uri: str, what: str, move: Move) -> None:
    """A run of its own, without a verdict: what was moved, and when."""
    tags = {
        "action": what, "gate": "", "version": str(move.version), DIGEST: move.digest,
        "champion.before": "" if move.champion_before is None else str(move.champion_before),
        "gate.run_id": move.gate_run,
    }  # fmt: skip
    experiment = open_experiment(client, uri, EXPERIMENT)
    run = client.create_run(experiment, run_name=f"{what} to version {move.version}", tags=tags)
    client.set_terminated(run.info.run_id)


def _utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
