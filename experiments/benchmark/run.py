"""One benchmark from beginning to end: targets opened, phases run in order, figures computed, the run logged."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from experiments.benchmark.evidence import log_benchmark, print_report, progress_line
from experiments.benchmark.evidence import markdown as as_markdown
from experiments.benchmark.load import CHOICES, DEFAULT_PHASES, WARMUP_CLIENTS, Choice, LoadGenerator, Plan
from experiments.benchmark.measures import Figures, Sample
from experiments.benchmark.report import Report, make_report, summarise
from experiments.benchmark.targets import Target, open_target
from experiments.common.thresholds import THRESHOLDS, load_thresholds
from model.errors import InputError, MissingExtraError
from model.files import print_json
from model.settings import Settings
from training.tracking.provenance import provenance

if TYPE_CHECKING:
    from rich.console import Console

Result = TypeVar("Result")
Done = Callable[[Sample], None]
NEEDED = ("mlflow", "pandas", "psutil", "scipy", "yaml")


async def measure(
    target: Target, plan: Plan, *, against: Target | None = None, done: Done = lambda sample: None
) -> tuple[list[Sample], Figures]:
    """Run the plan's phases, one after another, on targets that are running; returns the rows, and the memory used.

    Warm-up follows the cold start; its rows are kept, and count in no figure.
    """
    from experiments.benchmark.memory import MemoryWatch

    load = LoadGenerator(plan, done)
    warmup = LoadGenerator(plan.model_copy(update={"duration": None}), clock=load.clock)
    requests = 2 * WARMUP_CLIENTS
    samples: list[Sample] = []
    if "cold" in plan.phases:
        samples += await load.cold_starts(target)
    samples += await warmup.closed_loop(target, "warmup", WARMUP_CLIENTS, requests=requests)
    if against is not None:
        samples += await warmup.closed_loop(against, "warmup", WARMUP_CLIENTS, requests=requests, side="against")
    with MemoryWatch(target.processes()) as watch:
        if "single" in plan.phases:
            samples += await load.closed_loop(target, "single", 1)
        if "concurrent" in plan.phases:
            samples += await load.closed_loop(target, "concurrent", plan.concurrency)
        for level in plan.levels if "stress" in plan.phases else ():
            at_least = None if plan.limit is None else max(plan.limit, 2 * level)
            samples += await load.closed_loop(target, "stress", level, requests=at_least)
        if "open" in plan.phases:
            samples += await load.open_loop(target)
        if against is not None and "compare" in plan.phases:
            samples += await load.in_turn(target, against)
    return samples, watch.figures()


def benchmark(
    target: str,
    plan: Plan,
    settings: Settings,
    *,
    against: str | None = None,
    thresholds: Path | None = None,
    console: Console | None = None,
) -> tuple[Report, list[Sample]]:
    """Measure `target` (and compare it with `against`), and check the thresholds.

    Args:
        target: `local`, an http(s) address, `models:/NAME/VERSION` or a model folder; so is `against`.
        settings: decide about an engine in this process, and where MLflow is.
        thresholds: a file of thresholds; None: the project's own.
        console: where a progress bar is drawn; None: nowhere.

    Raises:
        StoryError: an option, the thresholds, the model or the address is not usable.
    """
    if any(find_spec(name) is None for name in NEEDED):
        raise MissingExtraError("story benchmark", "train")
    if ("compare" in plan.phases) != (against is not None):
        hint = "--against TARGET" if against is None else "compare among --phases"
        raise InputError("phases", f"compare and --against belong together: add {hint}")
    bounds = load_thresholds(thresholds or THRESHOLDS)
    began, start, load = datetime.now(UTC), time.perf_counter(), _load_average()
    asked = open_target(target, settings)
    other = None if against is None else open_target(against, settings, option="against")
    with _progress(plan, asked, console) as done:

        async def run() -> tuple[list[Sample], Figures]:
            async with contextlib.AsyncExitStack() as running:
                await running.enter_async_context(asked.running())
                if other is not None:
                    await running.enter_async_context(other.running())
                return await measure(asked, plan, against=other, done=done)

        samples, memory = run_coroutine(run())
    report = make_report(
        samples,
        plan=plan,
        digest=asked.digest,
        memory=memory,
        comparison=None if other is None else summarise(samples, other, seed=plan.seed),
        thresholds=bounds,
        target=asked.name,
        began=began.isoformat(timespec="milliseconds"),
        seconds=time.perf_counter() - start,
        cold_start_means=asked.cold_start_means,
        origin=provenance(),
        load=(load, _load_average()),
    )
    return report, samples


def run_coroutine(work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` to its end: in this thread, or in another where this one has a running loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(asyncio.run, work).result()


def _load_average() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


@contextlib.contextmanager
def _progress(plan: Plan, target: Target, console: Console | None) -> Iterator[Done]:
    """A progress bar over all requests; the function to call with each that is done."""
    if console is None:
        yield lambda sample: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text, rate = TextColumn("{task.description:24}"), TextColumn("{task.fields[rate]:.1f} requests/s")
    columns = (text, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=plan.expected_requests(target.cold_starts), rate=0.0)
        begin, phase = time.perf_counter(), ""

        def done(sample: Sample) -> None:
            nonlocal phase
            completed = bar.tasks[task].completed
            if sample.phase != phase or phase == "cold":
                # The time left is estimated by the pace of the present phase alone, and not by that of cold starts.
                phase = sample.phase
                bar.reset(task, completed=int(completed))
            rate = (completed + 1) / (time.perf_counter() - begin)
            bar.update(task, advance=1, description=progress_line(sample), rate=rate)

        yield done


def phases_of(text: str | None, *, against: bool) -> tuple[Choice, ...]:
    """The phases of a comma-separated option; default: all, and `compare` where there is a second side.

    Raises `InputError` for an unknown one.
    """
    if text is None:
        return CHOICES if against else DEFAULT_PHASES
    named = {name.strip() for name in text.split(",")} - {""}
    if not named or named - set(CHOICES):
        got = ", ".join(sorted(named - set(CHOICES))) or "none"
        raise InputError("phases", f"must be among {', '.join(CHOICES)}, got {got}")
    return tuple(phase for phase in CHOICES if phase in named)


def publish(
    report: Report,
    samples: list[Sample],
    *,
    markdown: Path | None = None,
    track: str | None = None,
    as_json: bool = False,
) -> None:
    """Log the run to the store `track` (None: not logged), and print the report to standard output.

    The report is printed even if logging fails; the `InputError` is raised afterwards.
    """
    from rich.console import Console

    try:
        if track is not None:
            report = dataclasses.replace(report, run_id=log_benchmark(report, samples, track))
    finally:
        if markdown is not None:
            markdown.write_text(as_markdown(report), encoding="utf-8")
        if as_json:
            print_json(report.as_dict())
        else:
            print_report(report, Console())
