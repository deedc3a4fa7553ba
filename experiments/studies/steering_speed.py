"""How fast a story is steered: the first word of a fork and a fan of futures, through the functions of the page.

    python -m experiments.studies.steering_speed
    python -m experiments.studies.steering_speed --repetitions 200 --json

Each repetition writes a new story of 300 tokens and forks it at a random word, then does the same with a fan of
16 × 40 tokens: so the engine has read neither story before, and a slower minute slows both. A fork is timed from the
call of the handler to the first view with a new word, a fan to its merged futures. What browser and network add is not
in it.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from demo.form import Form
from demo.handlers import AppState, View, fork
from demo.steering import FUTURE_TOKENS, FUTURES, Caller, Word, futures, prompt_tokens, words_of
from experiments.common.tables import Table
from model.architecture.folder import PRETRAINED
from model.generation import GenerationRequest, SamplingParams
from model.serving.backend import LocalBackend
from model.serving.session import GenerationManager
from model.settings import Settings

PROMPT = "Once upon a time, Tom and Mia found a small key in the garden."
STORY_TOKENS = 300
TARGETS = {"first word of a fork": 50.0, f"fan of {FUTURES} x {FUTURE_TOKENS} tokens": 250.0}
"""Milliseconds that each may take, on a machine that does nothing else."""


class Story(NamedTuple):
    """A generated story."""

    seed: int
    words: list[Word]


async def write(manager: GenerationManager, seed: int) -> Story:
    """Generate a story of `STORY_TOKENS` tokens."""
    sampling = SamplingParams(seed=seed, ignore_eos=True)
    request = GenerationRequest(prompt=PROMPT, max_tokens=STORY_TOKENS, sampling=sampling, logprobs=0)
    async with manager.session([request]) as session:
        async for _ in session.events(1):
            pass
    (done,) = session.completions
    return Story(seed, words_of(done.logprobs, done.text))


async def time_fork(state: AppState, story: Story, number: int) -> float:
    """Return the seconds until a fork before the word `number` shows its first word, or that the story ends there."""
    kept = [list(word) for word in story.words[:number]]
    view = View(prompt=PROMPT, words=kept, seed=story.seed)
    before = sum(len(word.text) for word in story.words[:number])
    began = time.perf_counter()
    async with aclosing(fork(state, "study", Form(), view)) as views:
        async for view in views:
            if view.phase == "failed":
                raise RuntimeError(view.status)
            if len(view.generated) > before or view.phase == "ended":
                break
        return time.perf_counter() - began


async def time_fan(manager: GenerationManager, story: Story, number: int) -> float:
    """Return the seconds that a fan of futures takes before the word `number`."""
    began = time.perf_counter()
    prompt = await prompt_tokens(manager, PROMPT, Caller("study"))
    tokens = (*prompt, *(token for word in story.words[:number] for token in word.tokens))
    request = GenerationRequest(prompt=tokens, sampling=SamplingParams(seed=story.seed, ignore_eos=True))
    found = await futures(manager, request, Caller("study"))
    taken = time.perf_counter() - began
    assert sum(branch.count for branch in found) == FUTURES, "each future has a word at least"
    return taken


async def measure(model: Path, repetitions: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return a row for each of `TARGETS`. Raises `ModelError` if the folder is unusable."""
    backend = LocalBackend.load(Settings(story_model=str(model)))
    manager, places = GenerationManager(backend), random.Random(seed)
    state = AppState(manager)
    times: list[list[float]] = [[], []]
    async with backend.running():
        for repetition in range(-1, repetitions):  # the first is the warm-up
            pair = []
            for kind in range(2):
                story = await write(manager, places.randrange(2**32))
                number = places.randrange(1, len(story.words))
                timed = time_fork(state, story, number) if kind == 0 else time_fan(manager, story, number)
                pair.append(await timed)
            if repetition >= 0:
                for taken, each in zip(pair, times, strict=True):
                    each.append(taken)
    return [_row(name, target, taken) for (name, target), taken in zip(TARGETS.items(), times, strict=True)]


def _row(name: str, target: float, seconds: Sequence[float]) -> dict[str, Any]:
    median, p95 = (np.quantile(seconds, (0.5, 0.95)) * 1000).tolist()
    return {"measure": name, "median_ms": median, "p95_ms": p95, "target_ms": target, "n": len(seconds)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PRETRAINED, help="model folder (default: the shipped one)")
    parser.add_argument("--repetitions", type=int, default=100, help="forks, and fans, that count (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the stories and words (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    if given.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    rows = asyncio.run(measure(given.model, given.repetitions, given.seed))
    if given.json:
        print(json.dumps(rows))
        return
    cells = [[f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    print("\n".join(Table(list(rows[0]), cells).markdown()))


if __name__ == "__main__":
    main()
