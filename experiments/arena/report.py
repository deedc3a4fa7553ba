"""`story arena`: score the contestants by users' votes, show the scores, and log them to MLflow as evidence.

One run holds the scores. Where two versions fought with the same settings, a run for each of the two also holds the
votes between them, tied to both digests: the gate computes `arena_win_rate` from these rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import TypeAdapter

from experiments.ab.events import Choice
from experiments.arena.score import ENOUGH, Battle, Scores, notes, percent, score, win_rate
from experiments.arena.votes import Tally, read_votes, tally
from experiments.benchmark.evidence import AGAINST
from experiments.common.evidence_runs import DIGEST, EvidenceStore, StoredEvidence
from experiments.common.statistics import Estimate
from experiments.common.tables import Table, markdown_text
from model.errors import InputError, StoryError
from model.validation import Record
from training.tracking.provenance import provenance

if TYPE_CHECKING:
    from mlflow.entities import Run
    from rich.console import Console

EXPERIMENT = "story-arena"
METRIC = "arena_win_rate"
VOTES = "votes.json"
VOTES_DIGEST = "votes.digest"

Verdict = Literal["decided", "undecided"]
EXIT_CODES: dict[Verdict, int] = {"decided": 0, "undecided": 3}
COLORS: dict[Verdict, str] = {"decided": "green", "undecided": "yellow"}
COLUMNS = ("contestant", "digest", "battles", "win rate", "at equal length", "words")


@dataclass(frozen=True, slots=True)
class Report:
    """One look at the votes."""

    tally: Tally
    scores: Scores
    verdict: Verdict
    why: str
    """One line."""
    made: str

    @property
    def exit_code(self) -> int:
        """Return 0 if a contestant is better than the others, 3 if undecided."""
        return EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        scores = asdict(self.scores)
        for plain, each in zip(scores["contestants"], self.scores.contestants, strict=True):
            plain |= self.tally.contestants[each.name]._asdict() | {"meaningful": each.meaningful}
        return {
            "made": self.made,
            "verdict": self.verdict,
            "why": self.why,
            "votes": len(self.tally.votes),
            "left_out": self.tally.left_out,
            **scores,
        }


def look(url: str, since: float | None = None) -> Report:
    """Score the votes in the database at `url`. Raises `InputError` where there are none, or no such database."""
    counted = tally(read_votes(url, since))
    if not counted.battles:
        out = ", ".join(f"{reason}: {count}" for reason, count in counted.left_out.items())
        none = f"holds no votes that count ({out})" if out else "holds no votes yet"
        raise InputError("DATABASE_URL", f"{none}; users of the page Arena of `story demo` add them")
    return make_report(counted)


def make_report(counted: Tally) -> Report:
    """Score and decide."""
    scores = score(counted.battles)
    best = scores.contestants[0]
    verdict: Verdict = "undecided"
    others = "the other" if len(scores.contestants) == 2 else "an average other one"
    if not scores.battles:
        why = "no two different contestants have fought yet"
    elif not best.meaningful:
        why = f"{best.name} leads by {best.battles} battles; fewer than {ENOUGH} mean nothing yet"
    elif best.win_rate.low <= 0.5:
        why = f"{best.battles} battles of {best.name}, which leads, are not enough yet"
    else:
        verdict, why = "decided", f"{best.name} is preferred to {others} in {percent(best.win_rate)} of battles"
    return Report(counted, scores, verdict, why, datetime.now(UTC).isoformat(timespec="seconds"))


def print_report(report: Report, console: Console) -> None:
    """Print the table, the notes and the verdict."""
    console.print(_table(report))
    for note in notes(report.scores, report.tally.left_out):
        console.print(note, markup=False, highlight=False)
    console.print(f"[{COLORS[report.verdict]}]{report.verdict.upper()}[/]: ", end="")
    console.print(report.why, markup=False, highlight=False)


def markdown(report: Report) -> str:
    """The same as Markdown."""
    lines = [f"### Arena: {report.verdict.upper()}", "", markdown_text(report.why), "", *_table(report).markdown(), ""]
    return (
        "\n".join([*lines, *(f"- {markdown_text(note)}" for note in notes(report.scores, report.tally.left_out))])
        + "\n"
    )


def _table(report: Report) -> Table:
    rows = [
        (
            each.name,
            report.tally.contestants[each.name].digest[:12],
            str(each.battles),
            percent(each.win_rate),
            percent(each.equal_length),
            f"{each.words:.0f}",
        )
        for each in report.scores.contestants
    ]
    return Table(COLUMNS, rows, text=("digest",))


class VoteRow(Record):
    """One vote between two versions."""

    key: str
    first_digest: str
    second_digest: str
    choice: Choice
    first_words: int
    second_words: int


ROWS = TypeAdapter(tuple[VoteRow, ...])


class ArenaEvidence(StoredEvidence):
    """The votes between a version and another one, with the same settings."""

    experiment: ClassVar[str] = EXPERIMENT

    against: str
    """Digest of the other one."""
    votes: tuple[VoteRow, ...]

    @classmethod
    def contents(cls, run: Run, artifact: Callable[[str], bytes]) -> dict[str, Any]:
        """See `StoredEvidence`."""
        content, tags = artifact(VOTES), run.data.tags
        if hashlib.sha256(content).hexdigest() != tags[VOTES_DIGEST]:
            raise ValueError(f"{VOTES} is not the file that was logged")
        rows = ROWS.validate_json(content)
        pair = {tags[DIGEST], tags[AGAINST]}
        if not rows or any({row.first_digest, row.second_digest} != pair for row in rows):
            raise ValueError("its votes are not between the two versions that it is tagged for")
        return {"against": tags[AGAINST], "votes": rows}

    def win_rate(self) -> Estimate:
        """Of this version against the other one, with its interval at all looks together."""
        return rate_of(self.votes, self.digest)


def rate_of(votes: tuple[VoteRow, ...], digest: str) -> Estimate:
    """The win rate of the version `digest`."""
    return win_rate(
        [Battle(row.first_digest, row.second_digest, row.choice, row.first_words, row.second_words) for row in votes],
        digest,
    )


def log(uri: str, report: Report) -> dict[str, Any]:
    """Log the scores as a run, and evidence for the gate; a failure is returned as `failed`, not raised."""
    tags = provenance().tags()
    try:
        store = EvidenceStore(uri, EXPERIMENT)
        with store.run(f"arena: {report.verdict}", tags | {"arena.verdict": report.verdict}) as run:
            run.log_metrics({"votes": len(report.tally.votes), "length": report.scores.length})
            plain = json.dumps(report.as_dict(), ensure_ascii=False, indent=2)
            run.log_texts({"report.json": plain + "\n", "report.md": markdown(report)})
        evidence = [_log_pair(store, tags, *pair, rows) for pair, rows in between_versions(report.tally).items()]
    except StoryError as error:
        return {"failed": str(error)}
    return {"run_id": run.run_id, "experiment": EXPERIMENT, "evidence": evidence}


def between_versions(counted: Tally) -> dict[tuple[str, str], tuple[VoteRow, ...]]:
    """The votes between each two versions with the same settings, by their digests in both orders."""
    found: dict[tuple[str, str], list[VoteRow]] = {}
    for vote in counted.votes:
        first, second = vote.first_digest, vote.second_digest
        if first != second and vote.first_settings == vote.second_settings:
            row = VoteRow(**{name: getattr(vote, name) for name in VoteRow.model_fields})
            for pair in ((first, second), (second, first)):
                found.setdefault(pair, []).append(row)
    return {pair: tuple(rows) for pair, rows in found.items()}


def _log_pair(
    store: EvidenceStore, tags: dict[str, str], digest: str, against: str, rows: tuple[VoteRow, ...]
) -> dict[str, str]:
    content = ROWS.dump_json(rows, indent=2).decode()
    votes_digest = hashlib.sha256(content.encode()).hexdigest()
    about = {DIGEST: digest, AGAINST: against, VOTES_DIGEST: votes_digest}
    with store.run(f"arena {digest[:8]} against {against[:8]}", tags | about) as run:
        rate = rate_of(rows, digest)
        figures = {METRIC: rate.value, f"{METRIC}_low": rate.low, f"{METRIC}_high": rate.high, "votes": rate.n}
        run.log_metrics(figures)
        run.log_texts({VOTES: content})
    return {"run_id": run.run_id, "digest": digest, "against": against, VOTES_DIGEST: votes_digest}
