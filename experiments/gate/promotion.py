"""Moving the alias `champion`: only by a verdict of the gate, read back afterwards, and undone by one command."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Self

from experiments.common.evidence_runs import DIGEST, EvidenceStore, finished_runs
from experiments.common.thresholds import Thresholds
from experiments.gate.decide import EXIT_CODES, Verdict
from experiments.gate.run import EXPERIMENT
from experiments.registry.versions import CHALLENGER, CHAMPION, PREVIOUS, Version, find, holder
from model.errors import StoryError
from model.serving.registry import NAME
from training.tracking.store import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

VERDICT_AGE = timedelta(days=7)


class PromotionError(StoryError):
    """The alias was not moved; `exit_code` distinguishes a failed check (1) from a missing one (3)."""

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

    @classmethod
    def to(cls, chosen: Version, champion: Version | None, gate_run: str, *, applied: bool) -> Self:
        before = None if champion is None else champion.number
        return cls(
            version=chosen.number, digest=chosen.digest, champion_before=before, gate_run=gate_run, applied=applied
        )


def promote(uri: str, thresholds: Thresholds, *, version: str = CHALLENGER, apply: bool = False) -> Move:
    """Make a version the champion, if the newest verdict on its artifact is a pass under today's thresholds.

    Raises:
        PromotionError: the verdict is another one, is missing, too old, of other thresholds or about another
            champion; another version became champion meanwhile; or the alias does not read back as it was set.
        InputError: there is no such version, or the store cannot be used.
    """
    client = open_store(uri)
    chosen = find(uri, version)
    champion = holder(uri, CHAMPION)
    if champion is not None and champion.number == chosen.number:
        raise PromotionError(f"version {chosen.number} is the champion already", 1)
    run_id = str(_verdict(client, chosen, champion, thresholds).info.run_id)
    move = Move.to(chosen, champion, run_id, applied=apply)
    if not apply:
        return move
    if holder(uri, CHAMPION) != champion:
        raise PromotionError("another version became champion meanwhile; run `story gate` again", 3)
    tags = {"gate": "pass", "gate.run_id": run_id, "thresholds.digest": thresholds.digest, "promoted": _utc()}
    for key, value in tags.items():
        client.set_model_version_tag(NAME, str(chosen.number), key, value)
    if CHALLENGER in chosen.aliases:
        client.delete_registered_model_alias(NAME, CHALLENGER)
    _move_aliases(client, uri, move)
    _log(uri, "promote", move)
    return move


def rollback(uri: str, *, apply: bool = True) -> Move:
    """Give `champion` back to the version that had it before; the two swap, so that a rollback can be undone.

    Raises:
        PromotionError: there is no previous version, or the alias does not read back as it was set.
    """
    client = open_store(uri)
    champion, previous = holder(uri, CHAMPION), holder(uri, PREVIOUS)
    if previous is None:
        raise PromotionError("there is no previous champion to go back to", 1)
    move = Move.to(previous, champion, previous.tags.get("gate.run_id", ""), applied=apply)
    if not apply:
        return move
    if champion is not None:
        client.set_model_version_tag(NAME, str(champion.number), "rolled_back", _utc())
    _move_aliases(client, uri, move)
    _log(uri, "rollback", move)
    return move


def _verdict(client: MlflowClient, chosen: Version, champion: Version | None, thresholds: Thresholds) -> Run:
    """The newest verdict on this artifact, if it is a pass. Raises `PromotionError`."""
    found = finished_runs(client, EXPERIMENT, f"tags.`{DIGEST}` = '{chosen.digest}' and tags.gate != ''")
    name = f"version {chosen.number}"
    if not found:
        raise PromotionError(f"{name} was never judged; run `story gate --version {chosen.number}`", 3)
    run = found[0]
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


def _move_aliases(client: MlflowClient, uri: str, move: Move) -> None:
    """Set `champion` and `previous`, and read both back. MLflow moves an alias without asking where it was."""
    wanted = {CHAMPION: move.version}
    if move.champion_before is not None:
        wanted[PREVIOUS] = move.champion_before
    for alias, number in wanted.items():
        client.set_registered_model_alias(NAME, alias, str(number))
    for alias, number in wanted.items():
        held = holder(uri, alias)
        if held is None or held.number != number:
            raise PromotionError(f"the alias {alias} does not read back as version {number}; look at it", 1)


def _log(uri: str, what: str, move: Move) -> None:
    """Log what was moved, and when, as a run without a verdict."""
    tags = {
        "action": what,
        "gate": "",
        "version": str(move.version),
        DIGEST: move.digest,
        "champion.before": "" if move.champion_before is None else str(move.champion_before),
        "gate.run_id": move.gate_run,
    }
    with EvidenceStore(uri, EXPERIMENT).run(f"{what} to version {move.version}", tags):
        pass


def _utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
