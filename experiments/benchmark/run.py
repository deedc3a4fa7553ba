"""One benchmark from beginning to end: targets opened, phases run in order, figures made, the run logged."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from model.errors import InputError, MissingExtraError
from training.tracking.provenance import provenance

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.benchmark.memory import MemoryUse
    from experiments.benchmark.plan import Plan
    from experiments.benchmark.report import Report
    from experiments.benchmark.sample import Phase, Sample
    from experiments.benchmark.targets.base import Target
    from model.settings import Settings

Result = TypeVar("Result")
Done = Callable[["Sample"], None]
COLD_TIMEOUT = 300.0
"""Seconds that a cold start may take, however short other requests must be."""
NEEDED = ("mlflow", "pandas", "psutil", "yaml")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run left."""

    samples: list[Sample]
    memory: MemoryUse | None


async def measure(
    target: Target, plan: Plan, *, against: Target | None = None, done: Done = lambda sample: None
) -> Measured:
    """Run the plan's phases on a target that is already running, each on an otherwise idle target.

    Warm-up comes after the cold start and before all else; its rows are kept, and count in no figure.
    """
    from experiments.benchmark.compare import compare
    from experiments.benchmark.load.closed_loop import closed_loop
    from experiments.benchmark.load.one import Clock, ask
    from experiments.benchmark.load.open_loop import open_loop
    from experiments.benchmark.memory import MemoryWatch
    from experiments.benchmark.plan import WARMUP

    clock = Clock()
    samples: list[Sample] = []
    if "cold" in plan.phases:
        for number in range(target.cold_starts):
            request = plan.request("cold", number)
            row = await ask(
                target, request, clock, phase="cold", level=1, number=number, timeout=COLD_TIMEOUT
            )
            samples.append(row)
            done(row)
    unhurried = dataclasses.replace(plan, duration=None)
    for side in (target, against):
        if side is not None:
            rows = await closed_loop(
                side, unhurried, clock, phase="warmup", readers=WARMUP, requests=2 * WARMUP
            )
            for row in rows:
                row.target = "target" if side is target else "against"
            samples += rows
    with MemoryWatch(target.processes()) as watch:
        if "single" in plan.phases:
            samples += await closed_loop(target, plan, clock, phase="single", readers=1, done=done)
        if "concurrent" in plan.phases:
            readers = plan.concurrency
            samples += await closed_loop(target, plan, clock, phase="concurrent", readers=readers, done=done)
        for level in plan.levels if "stress" in plan.phases else ():
            requests = None if plan.limit is None else max(plan.limit, 2 * level)
            samples += await closed_loop(
                target, plan, clock, phase="stress", readers=level, requests=requests, done=done
            )
        if "open" in plan.phases:
            samples += await open_loop(target, plan, clock, done=done)
        if against is not None and "compare" in plan.phases:
            samples += await compare(target, against, plan, clock, done=done)
    return Measured(samples, watch.peak)


def benchmark(
    target: str,
    plan: Plan,
    settings: Settings,
    *,
    against: str | None = None,
    thresholds: Path | None = None,
    console: Console | None = None,
) -> tuple[Report, list[Sample]]:
    """Measure `target` (and compare it with `against`), and judge it by the thresholds.

    Args:
        target: `local`, an http(s) address, `models:/NAME/VERSION` or a model folder; so is `against`.
        settings: what decides about an engine in this process, and where MLflow is.
        thresholds: a file of thresholds; None: the project's own.
        console: where a progress bar is drawn; None: nowhere.

    Raises:
        StoryError: an option, the thresholds, the model or the address is not usable.
    """
    if any(find_spec(name) is None for name in NEEDED):
        raise MissingExtraError("story benchmark", "train")
    from experiments.benchmark.compare import summarise
    from experiments.benchmark.report import make_report
    from experiments.benchmark.targets.choose import open_target
    from experiments.common.thresholds import THRESHOLDS, load_thresholds

    if ("compare" in plan.phases) != (against is not None):
        hint = "--against TARGET" if against is None else "compare among --phases"
        raise InputError("phases", f"compare and --against belong together: add {hint}")
    bounds = load_thresholds(thresholds or THRESHOLDS)
    began, start, load = datetime.now(UTC), time.perf_counter(), _load()
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(open_target(target, settings))
        other = None
        if against is not None:
            other = stack.enter_context(open_target(against, settings, option="against"))
        done = stack.enter_context(_progress(plan, asked, console))

        async def go() -> Measured:
            async with contextlib.AsyncExitStack() as running:
                await running.enter_async_context(asked.running())
                if other is not None:
                    await running.enter_async_context(other.running())
                return await measure(asked, plan, against=other, done=done)

        measured = finished(go())
    report = make_report(
        measured.samples,
        target=asked.name,
        digest=asked.digest,
        began=began.isoformat(timespec="milliseconds"),
        seconds=time.perf_counter() - start,
        plan=plan,
        cold_start_means=asked.cold_start_means,
        memory=measured.memory,
        comparison=None if other is None else summarise(measured.samples, other, seed=plan.seed),
        thresholds=bounds,
        origin=provenance(),
        load=(load, _load()),
    )
    return report, measured.samples


def finished(work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` to its end: in this thread, or in another where this one has a loop already, as a notebook's has."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(asyncio.run, work).result()


def _load() -> float:
    try:
        return os.getloadavg()[0]
    except OSError:
        return float("nan")


@contextlib.contextmanager
def _progress(plan: Plan, target: Target, console: Console | None) -> Iterator[Done]:
    """A bar over all requests, where their number is known; the function to be told of each that is done."""
    if console is None:
        yield lambda sample: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from experiments.benchmark.shown import progress_line

    columns = (
        TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} requests/s"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=expected_requests(plan, target), rate=0.0)
        begin = time.perf_counter()

        def done(sample: Sample) -> None:
            rate = (bar.tasks[task].completed + 1) / (time.perf_counter() - begin)
            bar.update(task, advance=1, description=progress_line(sample), rate=rate)

        yield done


def expected_requests(plan: Plan, target: Target) -> int | None:
    """How many requests a run makes, warm-up not counted; None when only the time decides."""
    limit = plan.limit
    if limit is None or plan.duration is not None:
        return None
    together = max(2, plan.concurrency)
    counts = {
        "cold": target.cold_starts,
        "single": limit,
        "concurrent": limit,
        "stress": sum(max(limit, 2 * level) for level in plan.levels),
        "open": limit,
        "compare": 2 * (limit + together * -(-limit // 4)),
    }
    return sum(counts[phase] for phase in plan.phases)


def phases_of(text: str | None, *, against: bool) -> tuple[Phase, ...]:
    """The phases that a comma-separated option names; default: all, and `compare` where there is a second side.

    Raises `InputError` for an unknown one.
    """
    from experiments.benchmark.plan import CHOICES, DEFAULT_PHASES

    if text is None:
        return (*DEFAULT_PHASES, "compare") if against else DEFAULT_PHASES
    named = {name.strip() for name in text.split(",")} - {""}
    if not named or named - set(CHOICES):
        got = ", ".join(sorted(named - set(CHOICES))) or "none"
        raise InputError("phases", f"must be among {', '.join(CHOICES)}, got {got}")
    return tuple(phase for phase in CHOICES if phase in named)


def tell(
    report: Report,
    samples: list[Sample],
    *,
    markdown: Path | None = None,
    track: str | None = None,
    as_json: bool = False,
) -> None:
    """Log the run to the store `track` (None: nowhere), and print the report to standard output.

    What was measured is told even if it cannot be logged; that is raised afterwards, as an `InputError`.
    """
    from rich.console import Console

    from experiments.benchmark import shown

    try:
        if track is not None:
            from experiments.benchmark.evidence import log_benchmark

            report = dataclasses.replace(report, run_id=log_benchmark(report, samples, track))
    finally:
        if markdown is not None:
            markdown.write_text(shown.markdown(report), encoding="utf-8")
        if as_json:
            print(json.dumps(report.as_dict(), ensure_ascii=False, indent=2))
        else:
            shown.show(report, Console())
