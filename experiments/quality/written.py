"""Figures of written stories: of each one, and their means with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.common.statistics import Estimate, mean_over_prompts
from experiments.quality.generated import WrittenStory
from experiments.quality.memorised import Copy
from experiments.quality.names import all_kept, share_kept, speaks_to_himself
from experiments.quality.text import distinct, repeated, words


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryFigures:
    """Of one story; shares are between 0 and 1, and None means that a figure is not defined for it."""

    ended: float
    """1: the model ended it itself."""
    mean_tokens: float
    mean_words: float
    distinct_1: float | None
    """Different words over all words."""
    distinct_2: float | None
    distinct_3: float | None
    repeated_4: float | None
    """Share of the 4-word runs that stood in it before."""
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
YES_OR_NO = {"ended", "looping", "names_kept", "names_confused", "names_straight"}
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


@dataclass(frozen=True, slots=True)
class Written:
    """The stories of one writer, and what was measured on them."""

    stories: tuple[WrittenStory, ...]
    figures: tuple[StoryFigures, ...]
    """Of each story, in the same order."""
    copies: tuple[Copy, ...] | None
    """None: no training stories were given."""

    @classmethod
    def measure(cls, stories: Sequence[WrittenStory], copies: Sequence[Copy] | None = None) -> Written:
        """Measure all stories."""
        matched = copies if copies is not None else [None] * len(stories)
        figures = tuple(story_figures(story, copy) for story, copy in zip(stories, matched, strict=True))
        return cls(tuple(stories), figures, None if copies is None else tuple(copies))

    @property
    def seeds(self) -> list[int]:
        """Each seed once, in order."""
        return sorted({story.seed for story in self.stories})

    def estimates(self) -> dict[str, Estimate]:
        """Mean and interval of each figure that is defined for any story."""
        seeds = {seed: column for column, seed in enumerate(self.seeds)}
        shape = (1 + max(story.number for story in self.stories), len(seeds))
        found = {}
        for name in FIGURES:
            values_PS = np.full(shape, np.nan)
            for story, figures in zip(self.stories, self.figures, strict=True):
                value = getattr(figures, name)
                if value is not None:
                    values_PS[story.number, seeds[story.seed]] = value
            estimate = mean_over_prompts(values_PS, binary=name in YES_OR_NO)
            if estimate is not None:
                found[name] = estimate
        return found

    @property
    def longest_copy(self) -> Copy | None:
        """The longest run that any story shares with the training stories."""
        return max(self.copies, key=lambda copy: copy.words) if self.copies else None

    def rows(self) -> list[dict[str, Any]]:
        """A row for each story, its text and its figures, for a table."""
        rows = []
        for index, (story, figures) in enumerate(zip(self.stories, self.figures, strict=True)):
            copy = None if self.copies is None else self.copies[index]
            rows.append(
                {
                    "number": story.number, "seed": story.seed, "prompt": story.prompt.text,
                    "names": ", ".join(story.prompt.names), "text": story.text,
                    **{name.removeprefix("mean_"): value for name, value in asdict(figures).items()},
                    "copied_text": "" if copy is None else copy.text,
                    "copied_from": "" if copy is None else copy.story,
                }
            )  # fmt: skip
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Means at the top, as a machine has always read them; intervals beside."""
        estimates = self.estimates()
        longest = self.longest_copy
        return {
            "stories": len(self.stories), "seeds": self.seeds,
            **{name: estimate.value for name, estimate in estimates.items()},
            "copied_words_max": None if longest is None else longest.words,
            "intervals": {name: [estimate.low, estimate.high] for name, estimate in estimates.items()},
        }  # fmt: skip
