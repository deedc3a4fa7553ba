"""Figures of what a model writes: does it end its stories, repeat itself, keep names straight?

Fixed prompts, seeds and sampling, so that two models are asked the same. Each prompt names two children; the
figures are crude on purpose, so that each can be checked by reading the stories, which are kept with them.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from model.engine import Engine
from model.generation import Request, Sampling

NAMES = (
    ("Lily", "Tom"), ("Mia", "Ben"), ("Anna", "Max"), ("Sue", "Tim"),
    ("Lucy", "Jack"), ("Sara", "Sam"), ("Emma", "Leo"), ("Amy", "Bob"),
)  # fmt: skip
OPENINGS = (
    "{a} and {b} went to the park.",
    "Once upon a time, {a} found a shiny key and showed it to {b}.",
    "It was raining, and {a} was sad. Then {b} came to play.",
    '"Look!" said {a}. {b} ran to the window.',
    "{a} had a big red ball. {b} wanted to play with it too.",
    "One night, {a} and {b} heard a strange noise.",
    "{b} was afraid of the dark, but {a} had a little lamp.",
    "{a} and her friend {b} baked a cake together.",
)
PROMPTS = tuple(opening.format(a=a, b=b) for opening in OPENINGS for a, b in NAMES)
MAX_TOKENS = 500
SPEECH = r'\b{name} (?:said|asked|replied|answered)(?: to [^,."]{{1,20}})?[,:]? "[^"]*\b{name}\b'
"""Somebody who speaks to himself by name."""


@dataclass(frozen=True, slots=True)
class WrittenStory:
    """One story as the model wrote it."""

    prompt: str
    text: str
    """The continuation."""
    tokens: int
    ended: bool
    """The model ended it; False: it was cut at `MAX_TOKENS`."""


@dataclass(frozen=True, slots=True)
class WrittenFigures:
    """Means over the stories; shares are between 0 and 1."""

    stories: int
    ended: float
    """Share that the model ended itself."""
    mean_tokens: float
    distinct_2: float
    """Different word pairs over all word pairs, within a story."""
    repeated_4: float
    """Share of a story's 4-word runs that stood in it before."""
    looping: float
    """Share of stories of whose 4-word runs half or more are repeats."""
    names_kept: float
    """Share of stories in which both names of the prompt come again."""
    names_confused: float
    """Share of stories in which somebody addresses himself by name."""
    names_straight: float
    """Share with both names kept and nobody confused."""


def write_stories(engine: Engine, seed: int = 0, prompts: Sequence[str] = PROMPTS) -> list[WrittenStory]:
    """One story a prompt, all at once, with the default sampling and seeds `seed`, `seed` + 1, …"""
    requests = [
        Request(prompt=prompt, max_tokens=MAX_TOKENS, sampling=Sampling(seed=seed + number))
        for number, prompt in enumerate(prompts)
    ]
    streams = [engine.write(request) for request in requests]
    stories = []
    for request, stream in zip(requests, streams, strict=True):
        text = "".join(piece.text for piece in stream)
        done = stream.completion
        stories.append(
            WrittenStory(request.prompt, text, done.usage.completion_tokens, done.finish_reason == "stop")
        )
    return stories


def figures(stories: Sequence[WrittenStory]) -> WrittenFigures:
    """Figures of at least one story."""
    pairs, repeats, kept, confused = [], [], [], []
    for story in stories:
        words = re.findall(r"[\w']+", story.text.lower())
        pairs.append(_distinct(words, 2))
        repeats.append(1 - _distinct(words, 4))
        names = names_in(story.prompt)
        kept.append(all(re.search(rf"\b{name}\b", story.text) for name in names))
        whole = f"{story.prompt} {story.text}"
        confused.append(any(re.search(SPEECH.format(name=name), whole) for name in names))
    straight = [keeps and not mixes for keeps, mixes in zip(kept, confused, strict=True)]
    return WrittenFigures(
        stories=len(stories),
        ended=statistics.fmean(story.ended for story in stories),
        mean_tokens=statistics.fmean(story.tokens for story in stories),
        distinct_2=statistics.fmean(pairs),
        repeated_4=statistics.fmean(repeats),
        looping=statistics.fmean(share >= 0.5 for share in repeats),
        names_kept=statistics.fmean(kept),
        names_confused=statistics.fmean(confused),
        names_straight=statistics.fmean(straight),
    )


def names_in(prompt: str) -> list[str]:
    """The children that a prompt names."""
    known = {name for pair in NAMES for name in pair}
    return sorted(known & set(re.findall(r"\w+", prompt)))


def _distinct(words: Sequence[str], size: int) -> float:
    """Different runs of `size` words over all of them; 1 when there is none."""
    runs = Counter(zip(*(words[start:] for start in range(size)), strict=False))
    return len(runs) / max(1, sum(runs.values())) if runs else 1.0
