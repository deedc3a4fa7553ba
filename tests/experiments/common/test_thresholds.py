"""The file of thresholds: what it may say, and that each mistake is reported with its line."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.common.thresholds import METRICS, THRESHOLDS, Threshold, ThresholdsError, load_thresholds

GOOD = """\
# a comment
thresholds:
  - metric: avg_generation_time
    unit: s
    at_most: 10
    scope: benchmark
    reason: Documented.
  - metric: success_rate
    unit: share
    at_least: 0.8
    scope: benchmark
    reason: Documented.
    min_n: 30
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "limits.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def threshold(metric: str, unit: str, scope: str, **bound: float) -> Threshold:
    return Threshold.model_validate({"metric": metric, "unit": unit, "scope": scope, "reason": "r", **bound})


def test_the_documented_thresholds_are_all_there_with_their_bounds() -> None:
    output = {entry.metric: str(entry) for entry in load_thresholds() if entry.reason.startswith("Documented.")}
    assert output == {
        "avg_generation_time": "≤ 10 s",
        "max_generation_time": "≤ 15 s",
        "success_rate": "≥ 0.8",
        "concurrent_handling": "≥ 3 streams",
        "error_rate": "< 0.5",
        "memory_percent": "< 80 percent",
    }


def test_our_own_judge_speed_quality_and_the_challenger() -> None:
    thresholds = load_thresholds()
    found = {(entry.scope, entry.metric) for entry in thresholds}
    assert found >= {("benchmark", "ttft_p95"), ("benchmark", "goodput_share"), ("quality", "bits_per_byte")}
    assert found >= {("compare", "bits_per_byte_difference"), ("compare", "ttft_ratio")}


def test_the_digest_is_the_files_own() -> None:
    assert load_thresholds().digest == hashlib.sha256(THRESHOLDS.read_bytes()).hexdigest()


def test_a_file_is_read_in_its_order(tmp_path: Path) -> None:
    loaded = load_thresholds(write(tmp_path, GOOD))
    assert [(entry.metric, entry.bound, entry.limit, entry.min_n) for entry in loaded] == [
        ("avg_generation_time", "at_most", 10.0, None),
        ("success_rate", "at_least", 0.8, 30),
    ]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("avg_generation_time", "avg_generation_tme", 3, "'avg_generation_tme' is not measured; known are "),
        ("    unit: s\n", "", 3, "unit is missing"),
        ("unit: s\n", "unit: ms\n", 4, "avg_generation_time is measured in s, got 'ms'"),
        ("    at_most: 10\n", "", 3, "avg_generation_time needs a bound: one of at_least, above, at_most, below"),
        ("at_most: 10", "at_least: 10", 5, "contradicts the metric: of avg_generation_time lower is better"),
        ("at_most: 10", "at_most: 10\n    below: 5", 6, "contradicts at_most; a threshold has one bound"),
        ("at_most: 10", "at_most: 10\n    at_least: 20", 5, "contradicts at_least; a threshold has one bound"),
        ("at_most: 10", "at_most: ten", 5, "at_most input should be a valid number"),
        ("at_most: 10", "at_most: .inf", 5, "at_most input should be a finite number"),
        ("at_most: 10", "at_most: -1", 5, "-1 is outside of what avg_generation_time can be: 0 to inf"),
        ("at_most: 10", "below: 0", 5, "no avg_generation_time can ever be below 0"),
        ("at_least: 0.8", "at_least: 80", 10, "80 is outside of what success_rate can be: 0 to 1"),
        ("at_least: 0.8", "above: 1", 10, "no success_rate can ever be above 1"),
        ("scope: benchmark", "scope: quality", 6, "avg_generation_time belongs to benchmark, got quality"),
        ("scope: benchmark", "scope: speed", 6, "scope input should be 'benchmark', 'quality' or 'compare'"),
        ("reason: Documented.", "reason: ''", 7, "reason string should have at least 1 character"),
        ("min_n: 30", "min_n: 0", 13, "min_n input should be greater than or equal to 1"),
        ("min_n: 30", "min_m: 30", 13, "min_m is not known here"),
        ("unit: s\n", "unit: s\n    unit: s\n", 5, "unit is given twice"),
        ("success_rate", "avg_generation_time", 9, "is measured in s, got 'share'"),
        ("unit: s\n", "unit: [s\n", 5, "not valid YAML"),
        ("thresholds:", "limits:", 2, "must be one list called 'thresholds'"),
    ],
)
def test_a_mistake_is_reported_with_file_and_line(old: str, new: str, line: int, message: str, tmp_path: Path) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ThresholdsError) as caught:
        load_thresholds(path)
    output = str(caught.value)
    assert output.startswith(f"{path}, line "), output
    assert message in output
    # A broken flow list is noticed where the next line begins.
    assert f", line {line}: " in output


@pytest.mark.parametrize("written", ["10", "1e1", "1E+1", "10.", "10.0", "1_0", "100e-1"])
def test_a_number_is_read_as_everywhere_else(written: str, tmp_path: Path) -> None:
    first, *_ = load_thresholds(write(tmp_path, GOOD.replace("at_most: 10", f"at_most: {written}", 1)))
    assert first.limit == 10


@pytest.mark.parametrize("written", ["010", "1:30", "0x10", "1e", '"10"'])
def test_what_yaml_1_1_takes_for_a_number_is_none(written: str, tmp_path: Path) -> None:
    with pytest.raises(ThresholdsError, match="at_most input should be a valid number"):
        load_thresholds(write(tmp_path, GOOD.replace("at_most: 10", f"at_most: {written}", 1)))


def test_the_same_metric_twice_is_reported_with_both_lines(tmp_path: Path) -> None:
    again = GOOD + GOOD.partition("thresholds:\n")[2]
    with pytest.raises(ThresholdsError, match=r"line 14: avg_generation_time already has a bound in line 3$"):
        load_thresholds(write(tmp_path, again))


@pytest.mark.parametrize("text", ["", "thresholds: []\n", "[]", "thresholds: {}\n", "a: &a [*a]\n", "2001-99-99"])
def test_a_file_without_a_threshold_is_refused_since_all_would_pass(text: str, tmp_path: Path) -> None:
    with pytest.raises(ThresholdsError, match=r"limits\.yaml"):
        load_thresholds(write(tmp_path, text))


def test_a_missing_or_undecodable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ThresholdsError, match=r"none\.yaml: no such file"):
        load_thresholds(tmp_path / "none.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"# fine\n# caf\xe9\n")
    with pytest.raises(ThresholdsError, match=r"latin\.yaml, line 2: not UTF-8 text"):
        load_thresholds(path)


@given(st.text(alphabet="thresold: -\n&*[]{}!'\"#|>?,0.1a\t", max_size=80))
def test_whatever_a_file_says_it_is_refused_by_name(text: str) -> None:
    path = Path("any.yaml")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ThresholdsError, match=r"^any\.yaml"):  # none of these letters make a whole entry
        load_thresholds(path)


@pytest.mark.parametrize(
    ("bound", "at", "inside", "outside"), [("at_most", True, 9.0, 11.0), ("below", False, 9.0, 11.0)]
)
def test_an_upper_bound_holds_at_and_below_as_its_name_says(
    bound: str, at: bool, inside: float, outside: float
) -> None:
    limit = threshold("ttft_p95", "s", "benchmark", **{bound: 10})
    assert [limit.holds(value) for value in (10.0, inside, outside)] == [at, True, False]
    assert (limit.margin(inside), limit.margin(outside)) == (1.0, -1.0)


@pytest.mark.parametrize(("bound", "at"), [("at_least", True), ("above", False)])
def test_a_lower_bound_holds_at_and_above_as_its_name_says(bound: str, at: bool) -> None:
    limit = threshold("success_rate", "share", "benchmark", **{bound: 0.5})
    assert [limit.holds(value) for value in (0.5, 0.75, 0.25)] == [at, True, False]
    assert (limit.margin(0.75), limit.margin(0.25)) == (0.25, -0.25)


def test_what_is_no_number_never_holds() -> None:
    for metric, known in METRICS.items():
        bound = "at_least" if known.higher_is_better else "at_most"
        limit = threshold(metric, known.unit, known.scope, **{bound: 1})
        assert not limit.holds(math.nan)
        assert limit.holds(1.0)


def test_a_metric_may_have_one_bound_for_each_kind_of_stories(tmp_path: Path) -> None:
    entry = "  - {metric: loss, unit: nats/token, at_most: %s, scope: quality, reason: r%s}\n"
    path = tmp_path / "thresholds.yaml"
    path.write_text("thresholds:\n" + entry % (2, ", stories: own") + entry % (1, ", stories: other"))
    assert [(each.stories, each.limit) for each in load_thresholds(path)] == [("own", 2), ("other", 1)]
    for again in (", stories: own", ""):
        path.write_text("thresholds:\n" + entry % (2, ", stories: own") + entry % (1, again))
        with pytest.raises(ThresholdsError, match="line 3: loss already has a bound in line 2"):
            load_thresholds(path)
    path.write_text(
        "thresholds:\n  - {metric: ttft_p95, unit: s, at_most: 1, scope: benchmark, stories: own, reason: r}\n"
    )
    with pytest.raises(ThresholdsError, match="line 2: belongs to quality, and ttft_p95 to benchmark"):
        load_thresholds(path)
