"""Records of a training run, the protocol of its observers, the progress shown in a terminal, and a clean stop.

All times are seconds of the run itself, interruptions left out.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, runtime_checkable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

Outcome = Literal["finished", "stopped", "failed"]
"""`finished`: the budget was used or early stopping decided. `stopped`: interrupted by hand. `failed`: an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """What is known before the first step."""

    recipe: dict[str, Any]
    """The whole recipe, nested as in its file."""
    parameters: int
    data: dict[str, Any]
    """`meta.json` of the shards, its `digest` included."""
    data_folder: Path
    out: Path
    world_size: int
    resumed_from: int
    """Step at which the run goes on; 0 for a new one."""
    init: str | None = None
    """Digest of the model whose weights it started from; None: random ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimiser step."""

    step: int
    tokens: int
    """Target tokens seen since the run began."""
    loss: float
    """Mean nats a token of this step's batch."""
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    elapsed: float
    progress: float
    """Share of the budget used, 0 to 1: the larger of steps done and minutes gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """One look at the validation stories, with what the model writes at this step."""

    step: int
    tokens: int
    loss: float
    bits_per_byte: float
    best: bool
    """True when no earlier evaluation of this run was lower."""
    samples: tuple[tuple[str, str], ...]
    """(prompt, continuation) pairs; the same prompts and rng at every evaluation."""
    elapsed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AgeReport:
    """One of the run's ages (`Recipe.ages`): its network at this step, or the average, where that is validated."""

    step: int
    tokens: int
    bits_per_byte: float | None
    """On the validation stories; None: it was not validated at this step."""
    last: bool
    """Whether the budget is used."""
    write: Callable[[Path, dict[str, Any]], None]
    """Writes it into the folder, which must be empty, in half precision, with these notes in `config.json`. To be
    called before the observer returns. Raises `OSError`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """How it ended."""

    outcome: Outcome
    reason: str
    step: int
    tokens: int
    best_bits_per_byte: float | None
    checkpoint: Path | None
    """The best checkpoint kept."""


class EndRun(Exception):
    """What an observer raises from `stepped` or `evaluated` to end a run: it is saved, and `stopped` for this reason.

    At an evaluation that uses up the budget it comes too late, and the run is `finished`.
    """


class Observer(Protocol):
    """Listens to a run; called by the first process only, in order, from one thread."""

    def started(self, start: RunStart) -> None:
        """Called once, before the first step."""

    def stepped(self, report: StepReport) -> None:
        """Called after each optimiser step; should return at once."""

    def evaluated(self, report: EvaluationReport) -> None:
        """Called after each evaluation, when the best network so far is on disk."""

    def ended(self, end: RunEnd) -> None:
        """Called once, however the run ended."""


@runtime_checkable
class AgeObserver(Observer, Protocol):
    """An observer that keeps the run's ages."""

    def aged(self, report: AgeReport) -> None:
        """Called at each age: before the first step, and then behind a step and its evaluation."""


SMOOTHING = 0.9
"""Of the loss and the rate that are shown: the share of the past in an exponential mean."""
REDRAW_SECONDS = 0.2
SAMPLE_CHARACTERS = 72
LEAST_PROGRESS = 0.005
"""Share of the budget from which on the pace means something: before, one slow step would count a thousandfold."""


class ProgressObserver:
    """Draws a run on `console` (default: standard error); without a terminal a line every `every` seconds.

    It shows the smoothed loss and bits per byte, tokens a second, and the time left at the pace so far.
    """

    def __init__(
        self, console: Console | None = None, *, every: float = 15.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console(stderr=True)
        self._every = every
        self._clock = clock
        self._bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=self._console,
            auto_refresh=False,  # no thread of its own: both cores belong to the training
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("training", total=1.0, figures="", left="")
        self._drawn = -math.inf
        self._bits_per_nat: float | None = None
        self._loss: float | None = None
        self._rate: float | None = None

    def started(self, start: RunStart) -> None:
        self._bits_per_nat = bits_per_nat(start.data)
        processes = f", {start.world_size} processes" if start.world_size > 1 else ""
        begin = f"going on after step {start.resumed_from:,}" if start.resumed_from else "starting"
        self._say(f"{begin}: {start.parameters:,} parameters on {start.data_folder}{processes}; kept in {start.out}")

    def stepped(self, report: StepReport) -> None:
        self._loss = _smooth(self._loss, report.loss)
        self._rate = _smooth(self._rate, report.tokens_per_second)
        now = self._clock()
        if now - self._drawn < (REDRAW_SECONDS if self._console.is_terminal else self._every):
            return
        self._drawn = now
        seconds = seconds_left(report.elapsed, report.progress)
        left = [] if seconds is None else [f"{clock(seconds)} left"]
        if self._console.is_terminal:
            self._bar.start()  # not before the first step: until then a warning or an error owns the terminal
            self._bar.update(self._task, completed=report.progress, figures=self._figures(), left="".join(left))
            self._bar.refresh()
        else:
            times = ", ".join([f"{clock(report.elapsed)} gone", *left])
            self._say(f"step {report.step:,} · {report.progress:.1%} · {self._figures()} · {times}")

    def evaluated(self, report: EvaluationReport) -> None:
        best = " · best so far" if report.best else ""
        self._say(
            f"step {report.step:,} · {report.tokens:,} tokens · validation: loss {report.loss:.4f}, "
            f"{report.bits_per_byte:.4f} bits/byte{best}"
        )
        if report.samples:
            prompt, continuation = report.samples[0]
            story = " ".join((prompt + continuation).split())
            more = "…" if len(story) > SAMPLE_CHARACTERS else ""
            self._say(f"  “{story[:SAMPLE_CHARACTERS]}{more}”", style="dim")

    def ended(self, end: RunEnd) -> None:
        if self._bar.live.is_started:
            self._bar.stop()
        bits = end.best_bits_per_byte
        best = "no evaluation" if bits is None else f"best {bits:.4f} bits/byte"
        kept = "no best checkpoint" if end.checkpoint is None else f"kept in {end.checkpoint}"
        self._say(f"{end.outcome}: {end.reason} · step {end.step:,}, {end.tokens:,} tokens · {best} · {kept}")

    def _figures(self) -> str:
        loss, rate = self._loss or 0.0, self._rate or 0.0
        bits = "" if self._bits_per_nat is None else f" · {loss * self._bits_per_nat:.3f} bits/byte"
        return f"loss {loss:.3f}{bits} · {rate:,.0f} tokens/s"

    def _say(self, line: str, style: str | None = None) -> None:
        self._console.print(escape(line), style=style, highlight=False, soft_wrap=True)


def bits_per_nat(data: dict[str, Any]) -> float | None:
    """What one nat a token is in bits per byte of the training split: tokens / (bytes · ln 2).

    A split's tokens count one end of story each, as its targets do. `None` where `meta.json` has no counts.
    """
    split = data.get("splits", {}).get("train", {})
    tokens, size = split.get("tokens", 0), split.get("bytes", 0)
    return tokens / (size * math.log(2)) if tokens and size else None


def seconds_left(elapsed: float, progress: float) -> float | None:
    """Time to the end of the budget at the pace so far; `None` before `LEAST_PROGRESS` of it is used."""
    return elapsed * (1 - min(progress, 1.0)) / progress if progress >= LEAST_PROGRESS else None


def clock(seconds: float) -> str:
    """`0:07`, `12:05`, `3:25:45`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _smooth(mean: float | None, value: float) -> float:
    # A value that is not finite is shown at once, and a finite one after it starts the mean anew.
    if mean is None or not math.isfinite(mean) or not math.isfinite(value):
        return value
    return SMOOTHING * mean + (1 - SMOOTHING) * value


class StopFlag:
    """A flag without a lock.

    A signal handler runs in the main thread, in the middle of whatever that does. With a `threading.Event`, a second
    signal that arrives while the first one is being handled waits for a lock that is never released.
    """

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set


@contextlib.contextmanager
def stop_on_signals(stop: StopFlag | None = None) -> Iterator[StopFlag]:
    """Set `stop` on Ctrl-C and SIGTERM while inside; outside the main thread nothing can be caught."""
    stop = stop or StopFlag()
    previous: dict[int, Any] = {}

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
