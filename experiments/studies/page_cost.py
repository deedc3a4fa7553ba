"""What visitors of the page Experiments cost the reader of a story beside them.

    python -m experiments.studies.page_cost
    python -m experiments.studies.page_cost --seconds 15 --rounds 5 --json

One `story demo` with the MLflow store that `MLFLOW_TRACKING_URI` names, and one reader who has one story after the
other streamed over HTTP. In turn, round by round, nobody else is there (`alone`), somebody opens the page each second
(`each second`), or one visitor opens it again as soon as it is there (`without a pause`); opening it is its HTML and
its load event, as a browser asks for them. Ratios are to `alone` in the same round, and their median counts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

import httpx

from model.errors import StoryError

REPOSITORY = Path(__file__).resolve().parents[2]
PAUSES = {"alone": None, "each second": 1.0, "without a pause": 0.0}
"""Seconds between two visits; None: there are none."""
TOKENS = 300
"""Of a story at most."""


@dataclass(slots=True)
class Turn:
    """What the reader and the visitor saw in one turn; times in seconds."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """From one piece of text to the next."""
    visits: list[float] = field(default_factory=list)
    processor: float = 0.0
    """The demo's own processor time, without that of the process which asks MLflow."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: medians over rounds, times in milliseconds, ratios to `alone`."""

    visitors: str
    stories: int
    visits: int
    ttft_p50: float
    ttft_p95: float
    gap_p50: float
    gap_p99: float
    visit_p50: float
    """Not a number where nobody visits."""
    ttft_p50_ratio: float
    ttft_p95_ratio: float
    gap_p50_ratio: float
    gap_p99_ratio: float


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


async def _read(client: httpx.AsyncClient, seed: int, turn: Turn) -> None:
    asked = {"prompt": "Once upon a time", "max_tokens": TOKENS, "seed": seed, "stream": True}
    last, first = time.perf_counter(), True
    async with client.stream("POST", "/v1/completions", json=asked) as answer:
        if answer.status_code != 200:
            raise StoryError(f"a story was answered with {answer.status_code}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                now = time.perf_counter()
                (turn.ttft if first else turn.gaps).append(now - last)
                last, first = now, False


async def _visit(client: httpx.AsyncClient, event: int) -> None:
    for answer in (
        await client.get("/experiments"),
        await client.post(
            "/gradio_api/run/predict", json={"data": [], "fn_index": event, "session_hash": "visitor"}
        ),
    ):
        if answer.status_code != 200:
            raise StoryError(f"the page was answered with {answer.status_code}")


async def _turn(address: str, seconds: float, pause: float | None, seeds: Iterator[int]) -> Turn:
    turn, end = Turn(), time.perf_counter() + seconds
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        config = (await client.get("/config")).json()
        event = next(found["id"] for found in config["dependencies"] if found["api_name"] == "on_open")
        if pause is not None:
            await _visit(client, event)  # MLflow is loaded with the first one

        async def reader() -> None:
            while time.perf_counter() < end:
                await _read(client, next(seeds), turn)

        async def visitor() -> None:
            while pause is not None and time.perf_counter() < end:
                began = time.perf_counter()
                await _visit(client, event)
                turn.visits.append(time.perf_counter() - began)
                await asyncio.sleep(max(0.0, pause - turn.visits[-1]))

        await asyncio.gather(reader(), visitor())
    return turn


def measure(seconds: float, rounds: int) -> list[Row]:
    """All rows. Raises `StoryError` when the demo does not start or answers with an error."""
    seeds = count(1)
    with _demo() as address:
        asyncio.run(_turn(address, 1.0, 0.0, seeds))
        taken: dict[str, list[Turn]] = {name: [] for name in PAUSES}
        for _ in range(rounds):
            for name, pause in PAUSES.items():
                taken[name].append(asyncio.run(_turn(address, seconds, pause, seeds)))
    return [_row(name, turns, taken["alone"]) for name, turns in taken.items()]


def _row(name: str, turns: list[Turn], alone: list[Turn]) -> Row:
    def middle(of: Callable[[Turn], float]) -> float:
        return statistics.median(of(turn) for turn in turns) * 1e3

    def ratio(of: Callable[[Turn], float]) -> float:
        return statistics.median(of(mine) / of(theirs) for mine, theirs in zip(turns, alone, strict=True))

    figures: dict[str, Callable[[Turn], float]] = {
        "ttft_p50": lambda turn: quantile(turn.ttft, 0.5),
        "ttft_p95": lambda turn: quantile(turn.ttft, 0.95),
        "gap_p50": lambda turn: quantile(turn.gaps, 0.5),
        "gap_p99": lambda turn: quantile(turn.gaps, 0.99),
    }
    return Row(
        visitors=name,
        stories=sum(len(turn.ttft) for turn in turns),
        visits=sum(len(turn.visits) for turn in turns),
        visit_p50=middle(lambda turn: quantile(turn.visits, 0.5)),
        **{figure: middle(of) for figure, of in figures.items()},
        **{f"{figure}_ratio": ratio(of) for figure, of in figures.items()},
    )


@contextlib.contextmanager
def _demo() -> Iterator[str]:
    """The address of a demo that remembers and notes nothing."""
    order = [sys.executable, str(REPOSITORY / "story.py"), "demo", "--port", "0"]
    settings = {"STORY_CACHE": "false", "STORY_FEEDBACK": "false", "STORY_EXPERIMENTS": "true"}
    with subprocess.Popen(
        order, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None, "it was asked for"
            told = process.stdout.readline()
            if "http" not in told:
                raise StoryError("the demo did not start")
            yield told.split(": ", 1)[1].strip()
        finally:
            process.terminate()


def main() -> None:
    """Measure and print, as a table in Markdown or as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10, help="of one turn")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    rows = measure(given.seconds, given.rounds)
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print(
        "| visitors | stories | visits, ms | TTFT p50 ms (ratio) | p95 (ratio) | gap p50 ms (ratio) | p99 (ratio) |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row.visitors} | {row.stories} | {row.visits}, {row.visit_p50:.0f} "
            f"| {row.ttft_p50:.1f} ({row.ttft_p50_ratio:.2f}) | {row.ttft_p95:.1f} ({row.ttft_p95_ratio:.2f}) "
            f"| {row.gap_p50:.2f} ({row.gap_p50_ratio:.2f}) | {row.gap_p99:.2f} ({row.gap_p99_ratio:.2f}) |"
        )


if __name__ == "__main__":
    main()
