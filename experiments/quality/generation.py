"""Stories that a model generates from fixed prompts and seeds, and the figures that are measured on them.

Words are runs of letters, digits and apostrophes, in lower case: "Tim's" is one, a full stop is none. A name is
recognised by its form: a word in mid-sentence with a capital letter. That misses a name which only ever opens
sentences, and takes Monday for one; both affect every model alike. The figures are crude on purpose, so that each can
be checked by reading the stories.

Shapes: P prompts, S seeds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.statistics import Estimate, Floats, mean_over_prompts
from experiments.quality.memorised import Copy, words
from model.engine.engine import Engine
from model.errors import DataError, StoryError
from model.generation import GenerationRequest, SamplingParams

PROMPTS = Path(__file__).with_name("prompts.jsonl")
MAX_TOKENS = 500
OPENING_WORDS = 40
"""Of the continuation: about the first three sentences."""
CAPITALISED = re.compile(r"(?<=[\w,;] )[A-Z][a-z]+\b")
"""Behind a word or a comma and one space. "I", "I'm" and "OK" are no names."""
TITLES = {"Mr", "Mrs", "Ms", "Dr"}
ADDRESSED = r'\b{name} (?:said|asked|replied|answered)(?: to [^,."]{{1,20}})?[,:]? "[^"]*\b{name}\b'
"""Somebody who speaks to himself by name."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A story's beginning, and the children it names."""

    text: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WrittenStory:
    """One generated story."""

    prompt: Prompt
    number: int
    """The prompt's place in its file, from 0."""
    seed: int
    """Which pass over all prompts this is; the sampling seed is that of `sampling_seed`."""
    text: str
    """The continuation."""
    tokens: int
    ended: bool
    """The model ended it; False: it reached `MAX_TOKENS`."""


class UnfinishedStoryError(StoryError):
    """The engine did not finish a story."""

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


def sampling_seed(seed: int, number: int, prompts: int) -> int:
    """The sampling seed of prompt `number` of `prompts`: no two stories of an evaluation share one."""
    return seed * prompts + number


def generate_stories(
    engine: Engine, prompts: Sequence[Prompt], seeds: Sequence[int], done: Callable[[int], None] = lambda stories: None
) -> list[WrittenStory]:
    """Each prompt once for each seed, with the default sampling; ordered by seed, then by prompt.

    The stories of one seed are submitted together, so the engine must have slots and queue for all prompts.
    `done` is called after each story.

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
                    sampling=SamplingParams(seed=sampling_seed(seed, number, len(prompts))),
                )
            )
            for number, prompt in enumerate(prompts)
        ]
        for number, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
            text = "".join(chunk.text for chunk in stream)
            end = stream.completion
            if end.finish_reason not in ("stop", "length"):
                raise UnfinishedStoryError(
                    f"the story of prompt {number + 1} was not finished: {end.error or end.finish_reason}"
                )
            ended = end.finish_reason == "stop"
            stories.append(WrittenStory(prompt, number, seed, text, end.usage.completion_tokens, ended))
            done(1)
    return stories


def distinct(sequence: Sequence[str], size: int) -> float | None:
    """Different runs of `size` words over all of them, above 0 and at most 1; None where there is no such run."""
    runs = list(zip(*(sequence[start:] for start in range(size)), strict=False))
    return len(set(runs)) / len(runs) if runs else None


def repeated(sequence: Sequence[str], size: int) -> float | None:
    """Share of the runs of `size` words that occurred before; None where there is no such run."""
    share = distinct(sequence, size)
    return None if share is None else 1 - share


def split_opening(text: str, count: int = OPENING_WORDS) -> tuple[str, str]:
    """A continuation's first `count` words, with everything between them, and the rest."""
    for number, word in enumerate(re.finditer(r"\S+", text), 1):
        if number == count:
            return text[: word.end()], text[word.end() :]
    return text, ""


def names_in(text: str) -> set[str]:
    """Capitalised words in mid-sentence."""
    return set(CAPITALISED.findall(text)) - TITLES


def holds(text: str, name: str) -> bool:
    """Whether `text` has `name` as a word of its own; "Tim's" holds Tim, and "Timmy" does not."""
    return re.search(rf"\b{re.escape(name)}\b", text) is not None


def all_kept(continuation: str, names: Iterable[str]) -> bool:
    """Whether each of the prompt's names comes again in the continuation."""
    return all(holds(continuation, name) for name in names)


def share_kept(prompt: str, continuation: str, names: Iterable[str]) -> float | None:
    """Of the names given, and those found in prompt and opening, the share that comes again after the opening.

    None where there is no name, or where the story is over with its opening.
    """
    opening, rest = split_opening(continuation)
    wanted = {*names, *names_in(prompt + opening)}
    if not wanted or not rest.strip():
        return None
    return sum(holds(rest, name) for name in wanted) / len(wanted)


def speaks_to_himself(story: str, names: Iterable[str]) -> bool:
    """Whether somebody of `names` addresses himself by name."""
    return any(re.search(ADDRESSED.format(name=re.escape(name)), story) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryFigures:
    """Of one story; shares are between 0 and 1, and None means that a figure is not defined for it."""

    ended: float
    """1: the model ended it."""
    mean_tokens: float
    mean_words: float
    distinct_1: float | None
    """Different words over all words."""
    distinct_2: float | None
    distinct_3: float | None
    repeated_4: float | None
    """Share of the 4-word runs that occurred in it before."""
    looping: float
    """1: half of the 4-word runs or more are repeats."""
    names_kept: float
    """1: every name of the prompt comes again."""
    opening_names_kept: float | None
    """Share of the names in prompt and opening that come again later."""
    names_confused: float
    """1: somebody addresses himself by name."""
    names_straight: float
    """1: every name kept and nobody confused."""
    copied_words: float | None = None
    """Longest run of words that a training story holds too."""
    copied_share: float | None = None
    """The same over the story's words."""


FIGURES = tuple(StoryFigures.__dataclass_fields__)
BINARY = {"ended", "looping", "names_kept", "names_confused", "names_straight"}
"""Figures that are 0 or 1 for each story."""


def story_figures(story: WrittenStory, copy: Copy | None = None) -> StoryFigures:
    """Measure one story; `copy` is what it shares with the training stories, where they were given."""
    sequence = words(story.text)
    repeats = repeated(sequence, 4)
    kept = all_kept(story.text, story.prompt.names)
    confused = speaks_to_himself(f"{story.prompt.text} {story.text}", story.prompt.names)
    return StoryFigures(
        ended=float(story.ended),
        mean_tokens=story.tokens,
        mean_words=len(sequence),
        distinct_1=distinct(sequence, 1),
        distinct_2=distinct(sequence, 2),
        distinct_3=distinct(sequence, 3),
        repeated_4=repeats,
        looping=float(repeats is not None and repeats >= 0.5),
        names_kept=float(kept),
        opening_names_kept=share_kept(story.prompt.text, story.text, story.prompt.names),
        names_confused=float(confused),
        names_straight=float(kept and not confused),
        copied_words=None if copy is None else copy.words,
        copied_share=None if copy is None else copy.share,
    )


def values_by_prompt(rows: Iterable[tuple[int, int, float | None]]) -> Floats:
    """(prompt number, seed, value) rows as an array (P, S); NaN where the value is None or there is no row."""
    values = list(rows)
    numbers = {number: row for row, number in enumerate(sorted({number for number, _, _ in values}))}
    seeds = {seed: column for column, seed in enumerate(sorted({seed for _, seed, _ in values}))}
    values_PS = np.full((len(numbers), len(seeds)), np.nan)
    for number, seed, value in values:
        if value is not None:
            values_PS[numbers[number], seeds[seed]] = value
    return values_PS


@dataclass(frozen=True, slots=True)
class Written:
    """The stories of one model, and what was measured on them."""

    stories: tuple[WrittenStory, ...]
    figures: tuple[StoryFigures, ...]
    """Of each story, in the same order."""
    copies: tuple[Copy, ...] | None
    """None: no training stories were given."""

    @classmethod
    def measure(cls, stories: Sequence[WrittenStory], copies: Sequence[Copy] | None = None) -> Written:
        matched = copies if copies is not None else [None] * len(stories)
        figures = tuple(story_figures(story, copy) for story, copy in zip(stories, matched, strict=True))
        return cls(tuple(stories), figures, None if copies is None else tuple(copies))

    @property
    def seeds(self) -> list[int]:
        return sorted({story.seed for story in self.stories})

    def estimates(self) -> dict[str, Estimate]:
        """Mean and interval of each figure that is defined for any story."""
        found = {}
        for name in FIGURES:
            values_PS = values_by_prompt(
                (story.number, story.seed, getattr(figures, name))
                for story, figures in zip(self.stories, self.figures, strict=True)
            )
            estimate = mean_over_prompts(values_PS, binary=name in BINARY)
            if estimate is not None:
                found[name] = estimate
        return found

    @property
    def longest_copy(self) -> Copy | None:
        return max(self.copies, key=lambda copy: copy.words) if self.copies else None

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for index, (story, figures) in enumerate(zip(self.stories, self.figures, strict=True)):
            copy = None if self.copies is None else self.copies[index]
            rows.append(
                {
                    "number": story.number,
                    "seed": story.seed,
                    "prompt": story.prompt.text,
                    "names": ", ".join(story.prompt.names),
                    "text": story.text,
                    **{name.removeprefix("mean_"): value for name, value in asdict(figures).items()},
                    "copied_text": "" if copy is None else copy.text,
                    "copied_from": "" if copy is None else copy.story,
                }
            )
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Plain values: means at the top, intervals beside."""
        estimates = self.estimates()
        longest = self.longest_copy
        return {
            "stories": len(self.stories),
            "seeds": self.seeds,
            **{name: estimate.value for name, estimate in estimates.items()},
            "copied_words_max": None if longest is None else longest.words,
            "intervals": {name: [estimate.low, estimate.high] for name, estimate in estimates.items()},
        }
