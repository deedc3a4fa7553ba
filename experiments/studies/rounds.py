"""What the measuring scripts share: turns of targets, ratios of rounds, a service under test, one streamed request.

Targets take turns, round by round, so that a machine whose speed drifts slows them all. Ratios are taken round by
round, and their median counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from experiments.common.tables import markdown_table
from model.errors import StoryError


@dataclass(slots=True)
class Turn:
    """One target's turn in one round; times in seconds."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Between two chunks of one stream."""
    visits: list[float] = field(default_factory=list)
    """Page loads beside the streams."""
    seconds: float = 0.0
    cpu: float = 0.0
    """Processor time of the target's own process."""
    tokens: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


Figures = Mapping[str, Callable[[Turn], float]]


def compare(turns: Sequence[Turn], baseline: Sequence[Turn], figures: Figures) -> dict[str, float]:
    """Return the median of each figure over rounds, and as `NAME_ratio` its median ratio to the baseline's."""
    found = {}
    for name, figure in figures.items():
        found[name] = statistics.median(map(figure, turns))
        pairs = zip(turns, baseline, strict=True)
        found[f"{name}_ratio"] = statistics.median(figure(mine) / figure(base) for mine, base in pairs)
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of them do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


async def stream_story(client: httpx.AsyncClient, turn: Turn, prompt: str, tokens: int, seed: int) -> None:
    """Stream one story over HTTP and add its times and tokens to `turn`. Raises `StoryError` for an HTTP error."""
    body = {"prompt": prompt, "max_tokens": tokens, "seed": seed, "stream": True}
    body["stream_options"] = {"include_usage": True}
    last, times = time.perf_counter(), turn.ttft
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise StoryError(f"the service answered with {answer.status_code}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if any(choice["text"] for choice in event["choices"]):
                now = time.perf_counter()
                times.append(now - last)
                last, times = now, turn.gaps
            turn.tokens += (event.get("usage") or {}).get("completion_tokens", 0)


@contextlib.contextmanager
def running_service(arguments: Sequence[str], settings: Mapping[str, str]) -> Iterator[tuple[str, psutil.Process]]:
    """Start a Python process that prints its address; yield address and process, and end it.

    It gets `settings`, and no other `STORY_*` variable. Raises `StoryError` when it does not start.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STORY_")}
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, env={**clean, **settings}, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None, "it was asked for"
            line = process.stdout.readline()
            if "http" not in line:
                raise StoryError(f"the service did not start: {' '.join(arguments)}")
            yield line.split(": ", 1)[1].strip(), psutil.Process(process.pid)
        finally:
            process.terminate()


def options(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with `--rounds` and `--json`; a study adds its own options."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def print_rows(rows: Sequence[Mapping[str, Any]], *, as_json: bool = False) -> None:
    """Print rows of equal keys as JSON, or as a Markdown table with four significant digits."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    cells = [[f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    print("\n".join(markdown_table(list(rows[0]), cells)))
