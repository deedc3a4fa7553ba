"""What visits to the Experiments page cost a story that is streamed at the same time.

    python -m experiments.studies.page_cost
    python -m experiments.studies.page_cost --seconds 15 --rounds 5 --json

One `story demo` with the MLflow store that `MLFLOW_TRACKING_URI` names, and one client that streams one story after
the other. In turn, nobody else is there (`alone`), somebody opens the page each second (`each second`), or one user
opens it again as soon as it has loaded (`without a pause`); opening it is its HTML and its load event, as a browser
requests them. Ratios are to `alone` in the same round.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import httpx

from experiments.studies.rounds import (
    Figures,
    Turn,
    compare,
    options,
    print_rows,
    quantile,
    running_service,
    stream_story,
)
from model.errors import StoryError

PAUSES = {"alone": None, "each second": 1.0, "without a pause": 0.0}
"""Seconds between two visits; None: there are none."""
PROMPT, TOKENS = "Once upon a time", 300
FIGURES: Figures = {
    "ttft_p50_ms": lambda turn: quantile(turn.ttft, 0.5) * 1e3,
    "ttft_p95_ms": lambda turn: quantile(turn.ttft, 0.95) * 1e3,
    "gap_p50_ms": lambda turn: quantile(turn.gaps, 0.5) * 1e3,
    "gap_p99_ms": lambda turn: quantile(turn.gaps, 0.99) * 1e3,
    "visit_p50_ms": lambda turn: quantile(turn.visits, 0.5) * 1e3,
}
"""NaN where there are no visits."""


async def _visit(client: httpx.AsyncClient, event: int) -> None:
    body = {"data": [], "fn_index": event, "session_hash": "visit"}
    for answer in (await client.get("/experiments"), await client.post("/gradio_api/run/predict", json=body)):
        if answer.status_code != 200:
            raise StoryError(f"the page was answered with {answer.status_code}")


async def _turn(address: str, seconds: float, pause: float | None, seeds: Iterator[int]) -> Turn:
    turn, end = Turn(), time.perf_counter() + seconds
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        config = (await client.get("/config")).json()
        event = next(found["id"] for found in config["dependencies"] if found["api_name"] == "on_open")
        if pause is not None:
            await _visit(client, event)  # the first one loads MLflow

        async def stream() -> None:
            while time.perf_counter() < end:
                await stream_story(client, turn, PROMPT, TOKENS, next(seeds))

        async def visit() -> None:
            while pause is not None and time.perf_counter() < end:
                began = time.perf_counter()
                await _visit(client, event)
                turn.visits.append(time.perf_counter() - began)
                await asyncio.sleep(max(0.0, pause - turn.visits[-1]))

        await asyncio.gather(stream(), visit())
    return turn


def measure(seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each kind of visits. Raises `StoryError` when the demo fails."""
    seeds = count(1)
    settings = {"STORY_CACHE": "false", "STORY_FEEDBACK": "false", "STORY_EXPERIMENTS": "true"}
    with running_service(["-m", "story", "demo", "--port", "0"], settings) as (address, _):
        asyncio.run(_turn(address, 1.0, 0.0, seeds))
        turns: dict[str, list[Turn]] = {name: [] for name in PAUSES}
        for _ in range(rounds):
            for name, pause in PAUSES.items():
                turns[name].append(asyncio.run(_turn(address, seconds, pause, seeds)))
    return [
        {
            "visits": name,
            "stories": sum(len(turn.ttft) for turn in taken),
            "count": sum(len(turn.visits) for turn in taken),
            **compare(taken, turns["alone"], FIGURES),
        }
        for name, taken in turns.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="of one turn")
    given = parser.parse_args()
    print_rows(measure(given.seconds, given.rounds), as_json=given.json)


if __name__ == "__main__":
    main()
