"""The output: the terminal, JSON, and a folder of pictures and tables."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import story
from experiments.compare.frames import choose, curves, differences, table
from experiments.compare.render import draw_curves, print_comparison, thinned
from model.errors import InputError
from tests.experiments.compare.conftest import Place


@pytest.fixture(autouse=True)
def _this_store(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.uri)


def test_the_terminal_shows_figures_differences_and_no_empty_row(place: Place) -> None:
    chosen = choose(place.uri, ["fox", place.runs["other twin"]])
    shown = io.StringIO()
    print_comparison(table(place.uri, chosen), differences(chosen), Console(file=shown, width=160))
    text = shown.getvalue()
    assert all(words in text for words in ("fox", "twin", "1.1250", "5,200,000", "model.width"))
    assert "whole story, mean" not in text, "no subject has that figure"


def test_json_has_null_where_nothing_is_known(place: Place) -> None:
    result = CliRunner().invoke(story.app, ["compare", "fox", place.runs["twin"], "--json"])
    assert result.exit_code == 0, result.stderr
    output = json.loads(result.stdout)
    assert [run["name"] for run in output["runs"]] == ["fox", "twin"]
    assert (output["runs"][0]["tokens_per_second"], output["runs"][1]["tokens_per_second"]) == (900.0, None)
    assert output["differences"]["seed"] == {"fox": "0", "twin": "1"}


def test_a_folder_of_pictures_and_tables_is_written(place: Place, tmp_path: Path) -> None:
    result = CliRunner().invoke(story.app, ["compare", "--out", "kept"])
    assert result.exit_code == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert names == [
        "compare.md",
        "curves.csv",
        "differences.csv",
        "table.csv",
        "train_loss.png",
        "val_bits_per_byte.png",
    ]
    page = (tmp_path / "kept/compare.md").read_text("utf-8")
    assert "![val bits per byte](val_bits_per_byte.png)" in page
    assert "| seed |" in page
    assert len(pandas.read_csv(tmp_path / "kept/curves.csv")) == 8 + 8 + 12 + 2 + 2 + 3
    with Image.open(tmp_path / "kept/val_bits_per_byte.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20) or ()) > 20


def test_an_unknown_name_is_one_line_and_exit_code_2() -> None:
    result = CliRunner().invoke(story.app, ["compare", "nobody"])
    assert result.exit_code == 2
    assert result.stderr.startswith("story: run must be a run or a registered version, got 'nobody'; runs: ")
    assert result.stderr.count("\n") == 1


def test_the_same_runs_give_the_same_picture_and_each_line_is_one_run(place: Place) -> None:
    frame = curves(place.uri, choose(place.uri))
    by_tokens, by_time = draw_curves(frame).axes
    assert [len(axes.get_lines()) for axes in (by_tokens, by_time)] == [3, 3]
    drawn = dict(zip(("one", "two", "fox"), by_tokens.get_lines(), strict=True))
    assert np.asarray(drawn["fox"].get_ydata()).tolist() == [1.25, 1.125]
    assert np.asarray(drawn["fox"].get_xdata()).tolist() == [4 * 512, 8 * 512]
    with pytest.raises(InputError, match="must be one that these runs have logged"):
        draw_curves(frame, "val/nothing")


@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.floats(0, 1e5), st.floats(-100, 100)), max_size=80, unique=True),
    st.integers(1, 30),
)
def test_thinning_keeps_order_mean_and_bound(points: list[tuple[int, float, float]], most: int) -> None:
    rows = [(step, *point) for step, point in enumerate(sorted(points))]
    line = pandas.DataFrame(rows, columns=["step", "tokens", "minutes", "value"], dtype=float)
    made = thinned(line, most)
    assert len(made) == min(most, len(points))
    assert made["tokens"].is_monotonic_increasing
    if points and len(points) % len(made) == 0:  # then each new point stands for equally many
        assert made["value"].mean() == pytest.approx(line["value"].mean(), abs=1e-6)
