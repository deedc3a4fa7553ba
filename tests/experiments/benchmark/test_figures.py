"""Pictures that are really drawn, of what there is to draw, the same for the same rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

from experiments.benchmark.figures import draw_figures
from tests.experiments.benchmark.made import samples
from tests.experiments.benchmark.rows import failed, row

ALL = ["latency_cdf", "ttft_histogram", "itl_histogram", "throughput", "timeline"]


def test_all_five_are_drawn_and_are_no_empty_pages(tmp_path: Path) -> None:
    paths = draw_figures(samples(), tmp_path / "figures")
    assert [path.stem for path in paths] == ALL
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size == (770, 462)
            colors = picture.convert("RGB").getcolors(maxcolors=1 << 20)
        assert colors is not None
        assert len(colors) > 20, f"{path.name} shows nothing"


def test_equal_rows_give_equal_files_and_other_rows_other_ones(tmp_path: Path) -> None:
    once, again = (draw_figures(samples(), tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
    slower = [*samples(), row("open", level=0, number=9, due=30.0, arrivals=(35.0, 36.0), ended=39.0)]
    other = {path.stem: path.read_bytes() for path in draw_figures(slower, tmp_path / "c")}
    changed = [path.stem for path in once if other[path.stem] != path.read_bytes()]
    assert changed == ["latency_cdf", "ttft_histogram", "itl_histogram", "timeline"]


def test_what_was_not_run_is_not_drawn(tmp_path: Path) -> None:
    assert draw_figures([], tmp_path) == []
    drawn = draw_figures([row("single"), failed("single")], tmp_path)
    assert [path.stem for path in drawn] == ["latency_cdf", "ttft_histogram", "itl_histogram"]
    only_failed = draw_figures([failed("open"), failed("open", due=1.0)], tmp_path)
    assert [path.stem for path in only_failed] == ["timeline"]


def test_no_display_and_no_global_state_is_used() -> None:
    program = (
        "import sys; from pathlib import Path; from experiments.benchmark.figures import draw_figures\n"
        "from tests.experiments.benchmark.made import samples; draw_figures(samples(), Path('.'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules; print('drawn')"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{program}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.returncode) == ("drawn\n", 0), run.stderr
