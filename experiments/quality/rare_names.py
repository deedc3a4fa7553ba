"""Does a story keep names that the model was not trained on? Prompts with unusual names, one or two each.

A story is *mutated* if it has a name that is near to one of the prompt's and is none of them, as when Ember becomes
Emild. That misses distant names and those that only begin sentences. No name of these prompts occurs in a training
story, renamed ones included (`training.data.rename.HELD_OUT`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.statistics import Estimate, mean_over_prompts
from experiments.quality.generation import Prompt, WrittenStory, all_kept, names_in, values_by_prompt
from training.data.rename import NOT_NAMES

RARE_PROMPTS = Path(__file__).with_name("rare_prompts.jsonl")
PREFIX = 2
"""Names that share this many first letters are near."""
DISTANCE = 2
"""So are names of more than `SHORT` letters with this edit distance or less."""
SHORT = 3


@dataclass(frozen=True, slots=True)
class RareNames:
    """The stories generated from prompts with unusual names."""

    stories: tuple[WrittenStory, ...]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "number": story.number,
                "seed": story.seed,
                "prompt": story.prompt.text,
                "text": story.text,
                "kept": float(all_kept(story.text, story.prompt.names)),
                "mutated": float(bool(mutations(story.prompt, story.text))),
                "ended": float(story.ended),
            }
            for story in self.stories
        ]

    def estimates(self) -> dict[str, Estimate]:
        """Share of stories that are `kept` (all names of the prompt come again), `mutated` and `ended`."""
        rows, found = self.rows(), {}
        for name in ("kept", "mutated", "ended"):
            values_PS = values_by_prompt((row["number"], row["seed"], row[name]) for row in rows)
            if (estimate := mean_over_prompts(values_PS, binary=True)) is not None:
                found[name] = estimate
        return found

    def as_dict(self) -> dict[str, Any]:
        estimates = self.estimates()
        return {
            "stories": len(self.stories),
            **{name: estimate.value for name, estimate in estimates.items()},
            "intervals": {name: [estimate.low, estimate.high] for name, estimate in estimates.items()},
        }


def mutations(prompt: Prompt, continuation: str) -> set[str]:
    """Names of the continuation that are near to one of the prompt's and do not occur in the prompt."""
    new = names_in(continuation) - NOT_NAMES - set(prompt.names) - names_in(prompt.text)
    return {word for word in new if any(_near(word, name) for name in prompt.names)}


def _near(word: str, name: str) -> bool:
    if word[:PREFIX] == name[:PREFIX]:
        return True
    return min(len(word), len(name)) > SHORT and edit_distance(word.lower(), name.lower()) <= DISTANCE


def edit_distance(one: str, other: str) -> int:
    """The fewest insertions, deletions and replacements of letters that turn `one` into `other` (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], number
        for place, wanted in enumerate(other, 1):
            best = min(row[place] + 1, row[place - 1] + 1, diagonal + (letter != wanted))
            diagonal, row[place] = row[place], best
    return row[-1]
