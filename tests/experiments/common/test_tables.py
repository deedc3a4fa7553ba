"""Tables in a terminal of any width: nothing is cut off, whatever does not fit comes below."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from experiments.common.tables import Table
from experiments.common.thresholds import METRICS

CELLS = st.text("abc[]/", min_size=1, max_size=20)


@given(
    columns=st.lists(CELLS, min_size=2, max_size=8, unique=True),
    count=st.integers(0, 3),
    width=st.integers(44, 120),
    data=st.data(),
)
def test_every_cell_is_there_whole_and_no_line_is_longer_than_the_terminal(
    columns: list[str], count: int, width: int, data: st.DataObject
) -> None:
    rows = [[data.draw(CELLS) for _ in columns] for _ in range(count)]
    output = io.StringIO()
    Console(file=output, width=width).print(Table(columns, rows))
    lines = output.getvalue().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    parts = [part.splitlines() for part in output.getvalue().split("\n\n")]
    for number, cells in enumerate([columns, *rows]):
        first, *others = cells
        shown = [part[number].split() for part in parts]
        assert [line[0] for line in shown] == [first] * len(parts), "each part says whose figures it has"
        assert [cell for line in shown for cell in line[1:]] == others


@pytest.mark.parametrize("width", [24, 40, 80])
def test_names_are_whole_however_long_they_are(width: int) -> None:
    """Metrics as a gate shows them, and a run whose name alone is wider than the terminal."""
    run = "a_run_that_was_named_after_each_field_of_its_recipe_and_then_after_the_machine_that_it_ran_on"
    rows = [["UNDECIDED", name, "0.6127", "< 0.6 bits per byte"] for name in [*METRICS, run]]
    output = io.StringIO()
    table = Table(("verdict", "metric", "value", "threshold"), rows, text=("metric", "threshold"), key=2)
    Console(file=output, width=width).print(table)
    assert "…" not in output.getvalue()
    if width == 80:
        assert set(METRICS) <= set(output.getvalue().split())
    named = io.StringIO()
    Console(file=named, width=width).print(Table(["", run], [["loss", "1"]]))
    assert run in "".join(named.getvalue().split())


def test_a_wide_terminal_gets_one_table() -> None:
    output = io.StringIO()
    Console(file=output, width=60).print(Table(["name", "a", "b"], [["x", "1", "22"]], title="Figures"))
    assert output.getvalue().splitlines() == ["Figures      ".rstrip().ljust(11), "name  a   b", "x     1  22"]
