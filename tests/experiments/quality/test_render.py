"""What the terminal shows."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from experiments.quality.evidence import print_report, status
from experiments.quality.generation import FIGURES
from tests.experiments.quality.reports import report


def shown(evidence: dict[str, str], **changes: Any) -> str:
    target = io.StringIO()
    print_report(report(**changes), evidence, Console(file=target, width=120))
    return target.getvalue()


def test_each_figure_has_its_baseline_beside() -> None:
    text = shown({"run": "f00d"})
    lines = {line.strip().partition("  ")[0]: line for line in text.splitlines()}
    served, baseline = report().served, report().baseline
    assert baseline is not None
    assert f"{served.bits_per_byte:.4f} [" in lines["int8"]
    assert f"{baseline.figures.bits_per_byte:.4f}" in lines["baseline"]
    # These stories are over with their opening, so there is nothing behind it to look for names in.
    assert [name for name, meaning in FIGURES.items() if meaning.label not in lines] == ["opening_names_kept"]
    assert lines["keep all names of the prompt"].split()[-1] == "50.0%"
    place = report().places[0]
    assert f"{place.loss:.3f}" in lines["0 to 1"]
    assert f"{place.baseline_loss:.3f}" in lines["0 to 1"]
    assert "2 and on" in lines


def test_what_was_left_out_and_where_the_evidence_is_are_said() -> None:
    text = shown({"run": "f00d"})
    assert "not measured: torch: it is not installed" in text
    assert "not measured: judge: no judge was named" in text
    assert "evidence: MLflow run f00d" in text
    assert "longest copied run: 7 words" in text
    assert "rare names: 50.0% [" in text
    assert "held-out stories that occur in train.jsonl: 0" in text
    assert "no evidence: nothing was to be logged" in shown({"skipped": "nothing was to be logged"})


def test_without_baseline_and_written_stories_the_rest_is_shown() -> None:
    text = shown({"run": "f00d"}, baseline=None, written=None, baseline_written=None, data=("a[bold]b.jsonl",))
    assert "int8" in text
    assert "baseline:" not in text
    assert "generated stories" not in text
    assert "a[bold]b.jsonl" in text, "a bracket in a file's name is no markup"


def test_stories_of_one_kind_of_work_add_up() -> None:
    target = io.StringIO()
    console = Console(file=target, force_terminal=True, width=80)
    with status(console) as progress:
        for name, stories in (("fp32", 1200), ("fp32", 300), ("writing", 2)):
            progress(name, stories)
            console.print()  # draws the current line, so that the test waits for no clock
    shown = target.getvalue()
    assert "fp32: 1,200 stories" in shown
    assert "fp32: 1,500 stories" in shown
    assert "writing: 2 stories" in shown
