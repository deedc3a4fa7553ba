"""The line in the terminal counts up, each kind of work for itself."""

from __future__ import annotations

import io

from rich.console import Console

from experiments.quality.status import working


def test_stories_of_one_kind_of_work_add_up() -> None:
    target = io.StringIO()
    console = Console(file=target, force_terminal=True, width=80)
    with working(console) as tell:
        for name, stories in (("fp32", 1200), ("fp32", 300), ("writing", 2)):
            tell(name, stories)
            console.print()  # draws the line that stands now, so that the test waits for no clock
    shown = target.getvalue()
    assert "fp32: 1,200 stories" in shown
    assert "fp32: 1,500 stories" in shown
    assert "writing: 2 stories" in shown
