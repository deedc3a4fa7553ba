"""How often would keeping names (`model.architecture.names`) forbid what a story really says?

Reads held-out stories token by token as if each were being generated, and counts tokens that `NameSpeller` would have
forbidden: python -m experiments.studies.spelling STORIES [--show 20]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.quality.held_out import read_held_out
from model.architecture.folder import PRETRAINED
from model.architecture.names import NameSpeller
from model.architecture.tokenizer import StoryTokenizer


@dataclass(slots=True)
class Forbidden:
    """Counts over all tokens of some stories."""

    tokens: int = 0
    within: int = 0
    """Tokens before which the speller restricts what may come."""
    wrong: Counter[str] = field(default_factory=Counter)
    """Tokens that it forbids and that come, each with the word before it."""


def count_forbidden(stories: Iterable[Sequence[int]], tokenizer: StoryTokenizer) -> Forbidden:
    """Count over `stories`, each as token ids without the start of the story."""
    found, table = Forbidden(), tokenizer.masks(tokenizer.vocab_size).words
    for story in stories:
        speller = NameSpeller(table)
        for place, token in enumerate(story):
            forbidden_V = speller.forbidden()
            found.tokens += 1
            found.within += forbidden_V is not None
            if forbidden_V is not None and forbidden_V[token] < 0:
                found.wrong[tokenizer.decode(story[max(place - 2, 0) : place + 1])] += 1
            speller.push(token)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the counts for files of stories."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stories", type=Path, nargs="+")
    parser.add_argument("--model", type=Path, default=PRETRAINED)
    parser.add_argument("--show", type=int, default=20, help="how many of the forbidden tokens to print")
    asked = parser.parse_args(arguments)
    tokenizer = StoryTokenizer.load(asked.model)
    found = count_forbidden(map(tokenizer.encode, read_held_out(asked.stories, tokenizer, None).texts), tokenizer)
    wrong = found.wrong.total()
    print(f"{found.tokens:,} tokens, {found.within:,} within a name, {wrong:,} of them forbidden and there")
    for text, count in found.wrong.most_common(asked.show):
        print(f"{count:6} {text!r}")


if __name__ == "__main__":
    main()
