"""`story gate`, `promote` and `rollback`: decide by the evidence, log the decision, move the alias `champion` by it.

A decision is shown in the terminal, as Markdown for a pull request, and as JUnit XML for a CI server. The alias is
moved only by a logged decision, read back afterwards, and moved back by one command.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self
from xml.etree import ElementTree

from rich.console import Console

from experiments.arena.report import METRIC as ARENA
from experiments.common.evidence_runs import DIGEST, EvidenceStore, finished_runs
from experiments.common.tables import ABSENT, Table, markdown_text, shown
from experiments.common.thresholds import Thresholds
from experiments.gate.decide import EXIT_CODES, Decision, Evidence, Verdict, decide, gather, save_champion
from experiments.quality.evidence import QualityEvidence
from experiments.registry.versions import CHALLENGER, CHAMPION, PREVIOUS, Version, find, holder
from model.errors import InputError, StoryError
from model.serving.registry import NAME
from training.tracking.provenance import provenance
from training.tracking.store import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "story-gate"


def run_gate(
    uri: str,
    thresholds: Thresholds,
    *,
    version: str | None = "challenger",
    digest: str | None = None,
    against_file: Path | None = None,
    track: bool = True,
) -> Decision:
    """Decide on one version, or, with `digest`, on an artifact that need not be registered.

    Args:
        version: number, alias or digest of a registered version; not used with `digest`.
        against_file: a champion's losses in a file, instead of the store's champion.
        track: log the decision to `story-gate`; nothing can be promoted by a decision that is not logged.

    Raises:
        InputError: there is no such version, or the store cannot be used.
    """
    chosen: Version | None = None
    if digest is None:
        chosen = find(uri, version or "challenger")
        digest = chosen.digest
    champion = holder(uri, CHAMPION) if against_file is None else None
    evidence = gather(
        uri,
        digest,
        champion=champion.digest if champion else None,
        against_file=against_file,
        arena=any(threshold.metric == ARENA for threshold in thresholds),
    )
    decision = decide(evidence, thresholds, version=chosen.number if chosen else None)
    return _log_decision(uri, decision, evidence) if track else decision


def save_losses(uri: str, path: Path, *, version: str, digest: str | None = None) -> None:
    """Write an artifact's losses to `path`, to compare with them where this store is not available.

    Raises:
        InputError: there is no such version, or no evaluation of it.
    """
    digest = digest or find(uri, version).digest
    evidence = QualityEvidence.newest(uri, digest)
    if evidence is None:
        raise InputError("save-champion", f"needs an evaluation of {digest[:12]}; `story evaluate` makes one")
    save_champion(evidence, path)


def _log_decision(uri: str, decision: Decision, evidence: Evidence) -> Decision:
    tags = provenance().tags() | {
        DIGEST: decision.digest,
        "gate": decision.verdict,
        "thresholds.digest": decision.thresholds_digest,
        "champion.digest": decision.champion or "",
        "version": "" if decision.version is None else str(decision.version),
    }
    with EvidenceStore(uri, EXPERIMENT).run(f"gate {decision.digest[:8]}: {decision.verdict}", tags) as run:
        logged = dataclasses.replace(decision, run_id=run.run_id)
        run.log_metrics(
            {
                f"{check.threshold.scope}/{check.threshold.metric}": check.bounds.value
                for check in decision.checks
                if check.bounds is not None
            }
        )
        texts = {
            "decision.json": json.dumps(logged.as_dict(), ensure_ascii=False, indent=2) + "\n",
            "decision.md": markdown(logged),
            "decision.xml": junit(logged),
            "evidence.json": json.dumps(evidence.as_dict(), indent=2) + "\n",
        }
        run.log_texts(texts)
    return logged


MARK = "<!-- story-gate -->"
"""First line of the comment on a pull request: a later verdict replaces the comment that begins with it."""
WORDS: dict[Verdict, str] = {"pass": "PASS", "fail": "FAIL", "undecided": "UNDECIDED"}
COLORS: dict[Verdict, str] = {"pass": "green", "fail": "red", "undecided": "yellow"}
COLUMNS = ("verdict", "metric", "value", "threshold", "margin", "95 % bounds", "n")
TEXT = ("metric", "threshold")


def print_decision(decision: Decision, console: Console) -> None:
    """Print one row a check, the reasons of those that did not pass, and the verdict below."""
    console.print(_table(decision))
    for metric, why in _reasons(decision):
        console.print(f"{metric}: {why}", markup=False, highlight=False)
    for note in decision.notes:
        console.print(f"not checked: {note}", markup=False)
    console.print(_headline(decision), style=COLORS[decision.verdict], markup=False)


def markdown(decision: Decision) -> str:
    """For a job summary, and as the body of a comment that is replaced, not repeated."""
    lines = [MARK, f"### Model gate: {WORDS[decision.verdict]}", "", _headline(decision), ""]
    lines += _table(decision, "`").markdown()
    reasons = [f"- `{metric}`: {markdown_text(why)}" for metric, why in _reasons(decision)]
    notes = [f"- not checked: {markdown_text(note)}" for note in decision.notes]
    for part in (reasons, notes):
        lines += ["", *part] if part else []
    sources = ", ".join(f"{name} `{run}`" for name, run in sorted(decision.evidence.items()))
    lines += ["", f"Evidence: {sources or 'none'}. Thresholds `{decision.thresholds_digest[:12]}`."]
    return "\n".join(lines) + "\n"


def junit(decision: Decision) -> str:
    """One test case a check: failed checks are failures, undecided ones are errors."""
    counts = [check.verdict for check in decision.checks]
    suite = ElementTree.Element(
        "testsuite",
        name="story gate",
        tests=str(len(counts)),
        failures=str(counts.count("fail")),
        errors=str(counts.count("undecided")),
        skipped="0",
        timestamp=decision.decided.partition("+")[0],
    )
    for check in decision.checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"gate.{check.threshold.scope}", name=check.threshold.metric
        )
        if check.verdict != "pass":
            kind = "failure" if check.verdict == "fail" else "error"
            ElementTree.SubElement(case, kind, message=check.why, type=check.verdict)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _headline(decision: Decision) -> str:
    verdicts = [check.verdict for check in decision.checks]
    named = f"version {decision.version} " if decision.version is not None else ""
    counts = ", ".join(
        f"{verdicts.count(kind)} {text}"
        for kind, text in (("pass", "passed"), ("fail", "failed"), ("undecided", "undecided"))
        if kind in verdicts
    )
    against = f" against champion {decision.champion[:12]}" if decision.champion else ""
    return f"{WORDS[decision.verdict]}: {named}({decision.digest[:12]}){against}: {counts or 'no checks'}"


def _reasons(decision: Decision) -> list[tuple[str, str]]:
    return [(check.threshold.metric, check.why) for check in decision.checks if check.verdict != "pass"]


def _table(decision: Decision, quote: str = "") -> Table:
    rows = []
    for check in decision.checks:
        found = check.bounds
        spread = "" if found is None or found.low == found.high else f"{found.low:.4g} … {found.high:.4g}"
        rows.append(
            (
                WORDS[check.verdict],
                f"{quote}{check.threshold.metric}{quote}",
                shown(None if found is None else found.value),
                str(check.threshold),
                shown(check.margin, "+.4g"),
                ABSENT if found is None else spread,
                str(0 if found is None else found.n),
            )
        )
    styles = {WORDS[verdict]: color for verdict, color in COLORS.items()}
    return Table(COLUMNS, rows, text=TEXT, styles=styles, key=2)


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

    @property
    def plan(self) -> str:
        """Name what moves, from where and by which verdict: the same for a dry run and for what it announced."""
        return f"{self.version}/{self.digest}/{self.champion_before}/{self.gate_run}"

    def described(self, what: str) -> str:
        """Say in one line what happened to the version, or would: `would be promoted`."""
        known = "" if self.champion_before is None else f"; champion so far: version {self.champion_before}"
        return f"version {self.version} ({self.digest[:12]}) {what}{known}"

    @classmethod
    def to(cls, chosen: Version, champion: Version | None, gate_run: str, *, applied: bool) -> Self:
        before = None if champion is None else champion.number
        return cls(
            version=chosen.number, digest=chosen.digest, champion_before=before, gate_run=gate_run, applied=applied
        )


class StaleMoveError(PromotionError):
    """What would move now is not what was confirmed."""

    def __init__(self) -> None:
        super().__init__("the registry changed meanwhile, and nothing was moved", 3)


def promote(
    uri: str, thresholds: Thresholds, *, version: str = CHALLENGER, apply: bool = False, plan: str | None = None
) -> Move:
    """Make a version the champion, if the newest verdict on its artifact is a pass under today's thresholds.

    `plan`: of a dry run that was confirmed; anything else is not applied.

    Raises:
        StaleMoveError: `plan` is not what would move now.
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
    if plan not in (None, move.plan):
        raise StaleMoveError
    if holder(uri, CHAMPION) != champion:
        raise PromotionError("another version became champion meanwhile; run `story gate` again", 3)
    tags = {"gate": "pass", "gate.run_id": run_id, "thresholds.digest": thresholds.digest, "promoted": _utc()}
    for key, value in tags.items():
        client.set_model_version_tag(NAME, str(chosen.number), key, value)
    if CHALLENGER in chosen.aliases:
        client.delete_registered_model_alias(NAME, CHALLENGER)
    _move_aliases(client, uri, move)
    _log_move(uri, "promote", move)
    return move


def rollback(uri: str, *, apply: bool = True, plan: str | None = None) -> Move:
    """Give `champion` back to the version that had it before; the two swap, so that a rollback can be undone.

    `plan`: as in `promote`.

    Raises:
        StaleMoveError: `plan` is not what would move now.
        PromotionError: there is no previous version, or the alias does not read back as it was set.
    """
    client = open_store(uri)
    champion, previous = holder(uri, CHAMPION), holder(uri, PREVIOUS)
    if previous is None:
        raise PromotionError("there is no previous champion to go back to", 1)
    move = Move.to(previous, champion, previous.tags.get("gate.run_id", ""), applied=apply)
    if not apply:
        return move
    if plan not in (None, move.plan):
        raise StaleMoveError
    if champion is not None:
        client.set_model_version_tag(NAME, str(champion.number), "rolled_back", _utc())
    _move_aliases(client, uri, move)
    _log_move(uri, "rollback", move)
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


def _log_move(uri: str, what: str, move: Move) -> None:
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
