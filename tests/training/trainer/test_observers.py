"""The progress of a run in a terminal and in a log."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from training.trainer.observers import (
    LEAST_PROGRESS,
    EvaluationReport,
    ProgressObserver,
    RunEnd,
    RunStart,
    StepReport,
    bits_per_nat,
    clock,
    seconds_left,
)

META = {"splits": {"train": {"stories": 2, "tokens": 100, "bytes": 400}}}


def start(resumed_from: int = 0) -> RunStart:
    return RunStart(
        recipe={},
        parameters=5_200_000,
        data=META,
        data_folder=Path("data/[bold]tiny"),
        out=Path("runs/story"),
        world_size=1,
        resumed_from=resumed_from,
    )


def step(number: int, *, loss: float = 2.0, elapsed: float = 30.0, progress: float = 0.25) -> StepReport:
    return StepReport(
        step=number,
        tokens=number * 512,
        loss=loss,
        learning_rate=0.01,
        grad_norm=1.0,
        tokens_per_second=7123.4,
        elapsed=elapsed,
        progress=progress,
    )


def evaluation(story: str = " there was a fox.") -> EvaluationReport:
    return EvaluationReport(
        step=100,
        tokens=51_200,
        loss=2.1,
        bits_per_byte=0.8123,
        best=True,
        samples=(("Once upon a time", story),),
        elapsed=30.0,
    )


END = RunEnd(
    outcome="finished",
    reason="the budget is used",
    step=200,
    tokens=102_400,
    best_bits_per_byte=0.8123,
    checkpoint=Path("runs/story/best"),
)


class Clock:
    """Stands for `time.monotonic`, so that no test waits for the seconds it is about."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain_observer(every: float = 15.0) -> tuple[ProgressObserver, io.StringIO, Clock]:
    output, timer = io.StringIO(), Clock()
    return ProgressObserver(Console(file=output, width=80), every=every, clock=timer), output, timer


def test_without_a_terminal_a_line_is_printed_every_so_many_seconds() -> None:
    observer, output, timer = plain_observer(every=15.0)
    observer.started(start())
    for number in range(1, 41):
        timer.now += 1.0
        observer.stepped(step(number))
    printed = [int(found) for found in re.findall(r"step (\d+) ·", output.getvalue())]
    assert printed == [1, 16, 31]
    assert "\x1b" not in output.getvalue()


def test_a_line_reports_loss_bits_per_byte_rate_and_time_left() -> None:
    observer, output, _ = plain_observer()
    observer.started(start())
    observer.stepped(step(10, loss=2.0, elapsed=30.0, progress=0.25))
    line = output.getvalue().splitlines()[-1]
    # 2 nats a token, 100 tokens in 400 bytes: 2 / ln 2 / 4 bits a byte; a quarter took 30 s.
    assert f"{2.0 / math.log(2) / 4:.3f} bits/byte" in line
    for part in ("step 10", "25.0%", "loss 2.000", "7,123 tokens/s", "0:30 gone", "1:30 left"):
        assert part in line


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end() -> None:
    output, timer = io.StringIO(), Clock()
    console = Console(file=output, width=120, force_terminal=True, color_system=None)
    observer = ProgressObserver(console, clock=timer)
    observer.started(start())
    observer.stepped(step(1))
    assert "25%" in output.getvalue()
    assert "1:30 left" in output.getvalue()
    timer.now = 1.0
    observer.stepped(step(2, elapsed=60.0, progress=0.5))
    assert "50%" in output.getvalue()
    assert output.getvalue().count("\x1b[?25l") == 1
    observer.ended(END)
    assert "\x1b[?25h" in output.getvalue()  # the cursor is back
    bar_erased, last = output.getvalue().rsplit("\x1b[2K", 1)
    assert last.startswith("finished: the budget is used")
    assert "1:30 left" in bar_erased


def test_a_terminal_is_not_redrawn_more_often_than_it_can_be_read() -> None:
    output, timer = io.StringIO(), Clock()
    observer = ProgressObserver(Console(file=output, force_terminal=True, width=100), clock=timer)
    observer.started(start())
    observer.stepped(step(1))
    drawn = output.getvalue()
    timer.now = 0.01
    observer.stepped(step(2, progress=0.9))
    assert output.getvalue() == drawn
    observer.ended(END)


def test_an_evaluation_prints_its_figures_and_the_start_of_a_story() -> None:
    observer, output, _ = plain_observer()
    observer.started(start())
    observer.evaluated(evaluation(" there was a fox.\n\nIt [red]ran[/red] " + "far " * 40))
    figures, story = output.getvalue().splitlines()[1:]
    assert "0.8123 bits/byte · best so far" in figures
    assert story.startswith("  “Once upon a time there was a fox. It [red]ran[/red] far")
    assert story.endswith("…”")


def test_the_start_names_the_step_that_a_resume_goes_on_from() -> None:
    observer, output, _ = plain_observer()
    observer.started(start(resumed_from=1200))
    assert output.getvalue().startswith("going on after step 1,200: 5,200,000 parameters on data/[bold]tiny")


def test_the_end_says_outcome_reason_best_and_what_is_kept() -> None:
    observer, output, _ = plain_observer()
    observer.started(start())
    observer.ended(END)
    last = output.getvalue().splitlines()[-1]
    assert last == (
        "finished: the budget is used · step 200, 102,400 tokens · best 0.8123 bits/byte · kept in runs/story/best"
    )


def test_a_run_that_ends_before_any_step_or_evaluation_says_so() -> None:
    observer, output, _ = plain_observer()
    observer.started(start())
    failed = RunEnd(outcome="failed", reason="no", step=0, tokens=0, best_bits_per_byte=None, checkpoint=None)
    observer.ended(failed)
    assert "no evaluation · no best checkpoint" in output.getvalue()


def test_a_loss_that_is_not_finite_is_shown_at_once() -> None:
    observer, output, timer = plain_observer(every=0.0)
    observer.started(start())
    for loss in (2.0, math.nan):
        timer.now += 1.0
        observer.stepped(step(1, loss=loss))
    assert "loss nan · nan bits/byte" in output.getvalue().splitlines()[-1]


@pytest.mark.parametrize("meta", [{}, {"splits": {}}, {"splits": {"train": {"tokens": 0, "bytes": 0}}}])
def test_shards_without_counts_show_no_bits_per_byte(meta: dict[str, object]) -> None:
    assert bits_per_nat(meta) is None


@given(elapsed=st.floats(0, 1e7), progress=st.floats(LEAST_PROGRESS, 1))
def test_time_gone_and_time_left_make_the_whole_budget(elapsed: float, progress: float) -> None:
    left = seconds_left(elapsed, progress)
    assert left is not None
    assert (elapsed + left) * progress == pytest.approx(elapsed, rel=1e-6, abs=1e-9)


def test_no_time_left_is_shown_before_it_means_something() -> None:
    assert seconds_left(0.0, 0.0) is None
    observer, output, timer = plain_observer()
    observer.started(start())
    # The first step compiles the network, and so little of the minutes is used that it would mean years.
    observer.stepped(step(1, elapsed=90.0, progress=1e-8))
    assert output.getvalue().splitlines()[-1].endswith("1:30 gone")
    timer.now = 60.0
    observer.stepped(step(2, elapsed=100.0, progress=0.01))
    assert "left" in output.getvalue().splitlines()[-1]


@given(st.integers(0, 10**6))
def test_a_clock_reads_back_as_its_seconds(seconds: int) -> None:
    total = 0
    for part in clock(seconds).split(":"):
        total = total * 60 + int(part)
    assert total == seconds
