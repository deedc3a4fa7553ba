"""The report: figures at the top of the JSON, thresholds, the same sections in every format, and pictures."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from experiments.benchmark.evidence import draw_figures, markdown, print_report, progress_line, sections, verdict
from experiments.benchmark.report import Report
from experiments.common.tables import markdown_text
from experiments.common.thresholds import METRICS, load_thresholds
from tests.experiments.benchmark.made import DIGEST, comparison, failed, report, row, samples

CONTRACT = (
    "avg_generation_time",
    "median_generation_time",
    "min_generation_time",
    "max_generation_time",
    "p95_generation_time",
    "p99_generation_time",
    "success_rate",
    "error_rate",
    "concurrent_handling",
    "tokens_per_second",
    "total_tokens_per_second",
    "ttft_p50",
    "ttft_p95",
    "ttft_p99",
    "itl_p50",
    "itl_p95",
    "itl_p99",
    "goodput",
    "memory_percent",
    "peak_rss_mb",
    "cold_start_s",
    "requests",
)


def test_the_json_has_the_contracts_figures_at_the_top() -> None:
    output = json.loads(json.dumps(report().as_dict(), allow_nan=False))
    assert [name for name in CONTRACT if name not in output] == []
    assert (output["target"], output["digest"], output["passed"]) == ("local", DIGEST, True)
    assert output["requests"] == 11
    assert output["n"]["success_rate"] == 11
    assert output["error_rate"] == 0.25
    assert (output["cold_start_s"], output["peak_rss_mb"]) == (1.25, 150.0)
    assert output["latency_phase"] == "open"
    assert output["ttft_p50"] == pytest.approx(0.2)
    assert {(part["phase"], part["level"]) for part in output["phases"]} == {
        ("single", 1),
        ("concurrent", 4),
        ("stress", 1),
        ("stress", 4),
        ("open", 0),
    }
    concurrent = next(part for part in output["phases"] if part["phase"] == "concurrent")
    assert concurrent["failures"] == {"busy": 1}


def test_every_headline_figure_can_have_a_threshold() -> None:
    made = report(compared=comparison())
    assert set(made.figures) <= set(METRICS)
    measured = {name for name, metric in METRICS.items() if metric.scope == "benchmark"}
    assert set(report().figures) == measured


def test_each_threshold_has_its_line_with_value_and_verdict() -> None:
    checks = {check.threshold.metric: check for check in report().checks}
    assert set(checks) == {entry.metric for entry in load_thresholds() if entry.scope == "benchmark"}
    assert {check.verdict for check in checks.values()} == {"PASS"}
    assert checks["success_rate"].as_dict() == {
        "metric": "success_rate",
        "value": pytest.approx(10 / 11),
        "unit": "share",
        "bound": "at_least",
        "threshold": 0.8,
        "n": 11,
        "passed": True,
        "reason": "Documented. Four stories in five must arrive whole.",
    }


def test_one_failing_request_in_three_fails_the_run() -> None:
    rows = [row("single", number=n) if n % 3 else failed("single", number=n) for n in range(30)]
    made = report(rows)
    assert not made.passed
    assert verdict(made) == "FAILED (success_rate, tokens_per_second, goodput_share)"
    # The pace of these rows, 2 tokens a second, is below what our own thresholds ask as well.


def test_what_was_not_measured_neither_passes_nor_fails() -> None:
    made = report([row("single", arrivals=(0.1, 0.12, 0.14), ended=0.2)], memory={})
    checks = {check.threshold.metric: (check.verdict, check.value, check.n) for check in made.checks}
    assert checks["error_rate"] == ("NOT MEASURED", None, 0)
    assert checks["memory_percent"] == ("NOT MEASURED", None, 0)
    assert made.passed
    assert verdict(made) == "PASSED (3 not measured)"
    assert made.notes == ("the serving process is not on this machine or not visible: memory was not measured",)


def test_a_target_without_a_digest_is_said_to_be_evidence_for_nothing() -> None:
    assert "evidence for no version" in report(digest=None).notes[0]


def test_a_comparison_is_judged_by_its_ratios_and_only_then() -> None:
    metrics = {check.threshold.metric for check in report().checks}
    compared = {check.threshold.metric: check.verdict for check in report(compared=comparison()).checks}
    new = {name: verdict for name, verdict in compared.items() if name not in metrics}
    # Bits per byte are another verb's to measure.
    assert new == {"total_tokens_per_second_ratio": "NOT MEASURED", "ttft_ratio": "PASS"}
    output = report(compared=comparison()).as_dict()
    assert output["ttft_ratio"] == 1.1
    assert output["comparison"]["ratios"]["ttft_ratio"] == {"value": 1.1, "low": 0.9, "high": 1.3, "n": 20}


def test_the_other_sides_rows_are_no_figures_of_the_target() -> None:
    slow = [*samples(), *(row("single", due=0, ended=500.0, target="against") for _ in range(5))]
    assert report(slow).figures == report().figures


def printed(made: Report, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_report(made, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_has_the_documented_sections_in_their_order() -> None:
    text = printed(report(compared=comparison()), 110)
    titles = [
        "MODEL BENCHMARK REPORT",
        "Performance summary",
        "Failed requests",
        "Timing metrics",
        "Stress test results",
        "Against local (older), in turn",
        "Validation results",
        "Overall validation: PASSED (1 not measured)",
    ]
    assert [text.index(title) for title in titles] == sorted(text.index(title) for title in titles)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Total requests 11" in lines
    assert "Success rate 90.9 %" in lines
    assert "busy 1 no" in lines
    assert "Average generation time 1.30 s" in lines
    assert "stress 4 4 100.0 % 2.50 s 500 ms 1.00 s 4.8 4" in lines
    assert "success_rate 0.909 ≥ 0.8 PASS" in lines
    assert "tokens_per_second 0.500 0.450 to 0.550 20 differs" in lines
    assert "ttft 1.100 0.900 to 1.300 20 no difference shown" in lines


def test_failures_are_counted_by_reason_wherever_they_were() -> None:
    """Also where no figure comes from: cold start, warm-up, the other side of a comparison."""
    refusal: dict[str, Any] = {"error": "rejected", "message": "HTTP 401 (no key)"}
    refused = [failed("cold", **refusal), failed("warmup", **refusal), failed("single", **refusal)]
    refused.append(failed("compare", target="against", **refusal))
    slow = [failed("open", error="error", message=f"request {n} failed") for n in range(5)]
    made = report([*refused, *slow])
    assert made.as_dict()["reasons"] == {
        "rejected": {"HTTP 401 (no key)": 3},
        "rejected (against)": {"HTTP 401 (no key)": 1},
        "error": {f"request {n} failed": 1 for n in range(5)},
    }
    lines = [" ".join(line.split()) for line in printed(made, 80).splitlines()]
    start = lines.index("kind failed reason")
    assert lines[start + 1 : start + 7] == [
        "rejected 3 HTTP 401 (no key)",
        "rejected (against) 1 HTTP 401 (no key)",
        *(f"error 1 request {n} failed" for n in range(3)),
        "error 2 other reasons",
    ]


def test_no_word_or_figure_is_broken_on_a_narrow_terminal() -> None:
    lines = [" ".join(line.split()) for line in printed(report(), 80).splitlines()]
    assert max(map(len, printed(report(), 80).splitlines())) <= 80
    assert "phase load n success average TTFT p95 ITL p95 tokens/s at once" in lines
    assert "concurrent 4 4 75.0 % 2.00 s 390 ms 790 ms 3 3" in lines
    assert "concurrent_handling 4 ≥ 3 streams PASS" in lines


def test_markdown_says_the_same_in_tables() -> None:
    made = report(compared=comparison())
    page = markdown(made)
    for section in sections(made):
        assert f"## {section.title}" in page
        for cells in section.rows:
            assert f"| {' | '.join(map(markdown_text, cells))} |" in page
    assert page.endswith("**Overall validation: PASSED (1 not measured)**\n")
    assert "- model: abababababab" in page
    assert "- machine: 2 cores, Z80, load 0.5 before and 1.5 after" in page
    columns = [line.count(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert min(columns) >= 1


def test_a_failed_threshold_is_named_last(tmp_path: Path) -> None:
    strict = tmp_path / "strict.yaml"
    strict.write_text(
        "thresholds:\n- {metric: max_generation_time, unit: s, at_most: 1, scope: benchmark, reason: strict}\n"
    )
    made = report(thresholds=load_thresholds(strict))
    assert not made.passed
    assert "max_generation_time  2.00" not in markdown(made)
    assert "| max_generation_time | 2 | ≤ 1 s | FAIL |" in markdown(made)
    assert "**Overall validation: FAILED (max_generation_time)**" in markdown(made)


def test_the_progress_line_says_where_the_run_is_and_what_failed() -> None:
    assert progress_line(row("stress", level=8)) == "stress at 8"
    assert progress_line(row("open", level=0)) == "open"
    assert progress_line(failed("single", error="truncated")) == "single: truncated"


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
        "import sys; from pathlib import Path; from experiments.benchmark.evidence import draw_figures\n"
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
