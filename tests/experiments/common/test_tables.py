"""Tables in a terminal of any width: nothing is cut off, whatever does not fit comes below."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from experiments.common.tables import Table

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


def test_a_wide_terminal_gets_one_table() -> None:
    output = io.StringIO()
    Console(file=output, width=60).print(Table(["name", "a", "b"], [["x", "1", "22"]], title="Figures"))
    assert output.getvalue().splitlines() == ["Figures      ".rstrip().ljust(11), "name  a   b", "x     1  22"]
