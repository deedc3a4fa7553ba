"""Does a story keep names that the model was not trained on? Prompts with unusual names, one or two each.

A story is *mutated* if it has a name that is near to one of the prompt's and is none of them, as when Ember becomes
Emild. That misses distant names and those that only begin sentences. No name of these prompts occurs in a training
story, renamed ones included (`training.data.rename.HELD_OUT`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.quality.generation import Figures, Prompt, StorySet, WrittenStory, all_kept, names_in
from training.data.rename import NOT_NAMES

RARE_PROMPTS = Path(__file__).with_name("rare_prompts.jsonl")
PREFIX = 2
"""Names that share this many first letters are near."""
DISTANCE = 2
"""So are names of more than `SHORT` letters with this edit distance or less."""
SHORT = 3


def measure_rare_names(stories: Sequence[WrittenStory]) -> StorySet:
    """Measure stories of these prompts: `kept` (all names of the prompt come again), `mutated` and `ended`."""
    figures: list[Figures] = [
        {
            "kept": float(all_kept(story.text, story.prompt.names)),
            "mutated": float(bool(mutations(story.prompt, story.text))),
            "ended": float(story.ended),
        }
        for story in stories
    ]
    return StorySet(tuple(stories), tuple(figures))


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
