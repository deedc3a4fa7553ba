"""What a model writes: fixed prompts, seeds and sampling through the engine, so that two models are asked the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from model.engine.engine import Engine
from model.errors import DataError, StoryError
from model.generation import GenerationRequest, SamplingParams

PROMPTS = Path(__file__).with_name("prompts.jsonl")
MAX_TOKENS = 500


@dataclass(frozen=True, slots=True)
class Prompt:
    """A story's beginning, and the children it names."""

    text: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WrittenStory:
    """One story as the model wrote it."""

    prompt: Prompt
    number: int
    """The prompt's place in its file, from 0."""
    seed: int
    """Which of the readings of all prompts this is; the dice are those of `dice_seed`."""
    text: str
    """The continuation."""
    tokens: int
    ended: bool
    """The model ended it; False: it was cut at `MAX_TOKENS`."""


class UnfinishedStoryError(StoryError):
    """The engine broke off a story that was to be judged."""

    exit_code = 1


@cache
def load_prompts(path: Path = PROMPTS) -> tuple[Prompt, ...]:
    """Prompts out of a JSON Lines file: `{"prompt": "…", "names": ["…"]}`.

    Raises:
        DataError: the file cannot be read, or a line is not such an object; it names the line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            record: Any = json.loads(line)
            text, names = record["prompt"], record["names"]
        except (ValueError, TypeError, KeyError):
            text, names = None, None
        if not (
            isinstance(text, str)
            and isinstance(names, list)
            and all(isinstance(name, str) and name in text for name in names)
        ):
            raise DataError(f'{path}, line {number}: needs a "prompt" and a list of the "names" in it')
        prompts.append(Prompt(text, tuple(names)))
    if not prompts:
        raise DataError(f"{path}: holds no prompts")
    return tuple(prompts)


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts in their order."""
    return hashlib.sha256(json.dumps([prompt.text for prompt in prompts]).encode()).hexdigest()


def dice_seed(seed: int, number: int, prompts: int) -> int:
    """The sampling seed of prompt `number` of `prompts`: no two stories of an evaluation share their dice."""
    return seed * prompts + number


def write_stories(
    engine: Engine,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    done: Callable[[int], None] = lambda stories: None,
) -> list[WrittenStory]:
    """Each prompt once for each seed, with the default sampling; ordered by seed, then by prompt.

    The stories of one seed are submitted together, so the engine needs room for all prompts in slots and queue.
    `done` hears of each finished story.

    Raises:
        UnfinishedStoryError: the model failed.
    """
    stories = []
    for seed in seeds:
        streams = [
            engine.submit(
                GenerationRequest(
                    prompt=prompt.text,
                    max_tokens=MAX_TOKENS,
                    sampling=SamplingParams(seed=dice_seed(seed, number, len(prompts))),
                )
            )
            for number, prompt in enumerate(prompts)
        ]
        for number, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
            text = "".join(piece.text for piece in stream)
            end = stream.completion
            if end.finish_reason not in ("stop", "length"):
                raise UnfinishedStoryError(
                    f"the story of prompt {number + 1} was not finished: {end.error or end.finish_reason}"
                )
            ended = end.finish_reason == "stop"
            stories.append(WrittenStory(prompt, number, seed, text, end.usage.completion_tokens, ended))
            done(1)
    return stories
