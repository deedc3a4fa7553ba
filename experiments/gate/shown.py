"""A decision for whoever reads it: terminal, Markdown for a job or a pull request, JUnit XML for a CI server."""

from __future__ import annotations

from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

from experiments.gate.verdict import Check, Decision, Verdict

MARK = "<!-- story-gate -->"
"""First line of the comment on a pull request: a later verdict replaces the comment that begins so."""
WORDS: dict[Verdict, str] = {"pass": "PASS", "fail": "FAIL", "undecided": "UNDECIDED"}
COLORS: dict[Verdict, str] = {"pass": "green", "fail": "red", "undecided": "yellow"}


def print_decision(decision: Decision, console: Console) -> None:
    """A row a check, and the verdict below."""
    table = Table("verdict", "metric", "value", "threshold", "margin", "95 % bounds", "n", "why")
    for check in decision.checks:
        value, margin, bounds, n = _cells(check)
        word = f"[{COLORS[check.verdict]}]{WORDS[check.verdict]}[/]"
        why = "" if check.verdict == "pass" else check.why
        table.add_row(word, check.threshold.metric, value, str(check.threshold), margin, bounds, n, why)
    console.print(table)
    for note in decision.notes:
        console.print(f"not asked: {note}")
    console.print(f"[{COLORS[decision.verdict]}]{_headline(decision)}[/]")


def markdown(decision: Decision) -> str:
    """For a job summary, and as the body of a comment that is replaced, not repeated."""
    lines = [
        MARK, f"### Model gate: {WORDS[decision.verdict]}", "", _headline(decision), "",
        "| verdict | metric | value | threshold | margin | 95 % bounds | n |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for check in decision.checks:
        value, margin, bounds, n = _cells(check)
        lines.append(
            f"| {WORDS[check.verdict]} | `{check.threshold.metric}` | {value} | {check.threshold} | {margin} "
            f"| {bounds} | {n} |"
        )
    open_ones = [check for check in decision.checks if check.verdict != "pass"]
    if open_ones:
        lines += ["", *(f"- `{check.threshold.metric}`: {_plain(check.why)}" for check in open_ones)]
    lines += ["", *(f"- not asked: {_plain(note)}" for note in decision.notes)] if decision.notes else []
    sources = ", ".join(f"{name} `{run}`" for name, run in sorted(decision.evidence.items()))
    lines += ["", f"Evidence: {sources or 'none'}. Thresholds `{decision.thresholds_digest[:12]}`."]
    return "\n".join(lines) + "\n"


def junit(decision: Decision) -> str:
    """A test case a check: failed checks fail, undecided ones are errors, so that neither passes for green."""
    counts = [check.verdict for check in decision.checks]
    suite = ElementTree.Element(
        "testsuite", name="story gate", tests=str(len(counts)), failures=str(counts.count("fail")),
        errors=str(counts.count("undecided")), skipped="0", timestamp=decision.decided.partition("+")[0],
    )  # fmt: skip
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


def _cells(check: Check) -> tuple[str, str, str, str]:
    bounds = check.bounds
    if bounds is None:
        return "-", "-", "-", "0"
    margin = f"{check.margin:+.4g}"
    spread = "" if bounds.low == bounds.high else f"{bounds.low:.4g} … {bounds.high:.4g}"
    return f"{bounds.value:.4g}", margin, spread, str(bounds.n)


def _plain(text: str) -> str:
    """Text that cannot leave its line or be read as markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
