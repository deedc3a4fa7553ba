"""`story gate`: fetch the evidence, decide, and log the decision where promotion looks for it.

A decision is shown in the terminal, as Markdown for a pull request, and as JUnit XML for a CI server.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console

from experiments.common.evidence_runs import DIGEST, EvidenceStore
from experiments.common.tables import ABSENT, Table, markdown_text, shown
from experiments.common.thresholds import Thresholds
from experiments.gate.decide import Decision, Verdict, decide
from experiments.gate.evidence import Evidence, gather, save_champion
from experiments.quality.evidence import QualityEvidence
from experiments.registry.versions import CHAMPION, Version, find, holder
from model.errors import InputError
from training.tracking.provenance import provenance

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
    evidence = gather(uri, digest, champion=champion.digest if champion else None, against_file=against_file)
    decision = decide(evidence, thresholds, version=chosen.number if chosen else None)
    return _log(uri, decision, evidence) if track else decision


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


def _log(uri: str, decision: Decision, evidence: Evidence) -> Decision:
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
