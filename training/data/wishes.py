"""Headers for training stories: wishes that each story meets, so that a model learns to meet them.

Half of the stories stay without (`SHARE`): the model goes on to serve prompts that wish for nothing, and the same
network gives both sides of a guided step (Ho and Salimans 2022, section 3.2).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from random import Random

from model.wishes import Wishes, ending_of, has_dialogue, length_of

SHARE = 0.5
"""Of the stories that get a header."""
ATTRIBUTE_SHARE = 0.5
"""Of the headers that name length, dialogue or ending, each by itself."""
WORDS_SHARE = 0.7
"""Of the headers that name words."""
NAMES_ONLY, NO_NAMES = 0.5, 0.25
"""Of those: only names of the story, no name; the others have both."""
MOST_WORDS = 4
SAD_COPIES = 3
"""A renamed story with a sad ending (7 of 100) has so many times the copies; all but the usual ones wish for it."""
COMMON = 0.1
"""A word that comes more often than once in ten stories is not wished for."""

_LOWER = re.compile(r"\b[a-z]{3,}\b")


class WishSampler:
    """Draws the header of a story. It depends on the word counts, `seed`, the story's identifier and the copy alone."""

    def __init__(self, word_counts: Counter[str], stories: int, *, seed: int = 0) -> None:
        """`word_counts`: of the lower-case words in a corpus of so many stories."""
        self._most, self._counts, self._seed = COMMON * stories, word_counts, seed

    def draw(self, text: str, names: Sequence[str], *, story: str, copy: int, sad: bool = False) -> Wishes:
        """Wishes that `text` meets, often none. With `sad`, its ending is always among them."""
        key = hashlib.blake2b(f"wishes:{self._seed}:{story}:{copy}".encode(), digest_size=8).digest()
        rng = Random(int.from_bytes(key, "big"))
        if not sad and rng.random() >= SHARE:
            return Wishes()

        def drawn(share: float = ATTRIBUTE_SHARE) -> bool:
            return rng.random() < share

        return Wishes(
            words=self._words(rng, text, names) if drawn(WORDS_SHARE) else (),
            length=length_of(text) if drawn() else None,
            dialogue=has_dialogue(text) if drawn() else None,
            ending=ending_of(text) if drawn() or sad else None,
        )

    def _words(self, rng: Random, text: str, names: Sequence[str]) -> tuple[str, ...]:
        kind = rng.random()
        if kind < NAMES_ONLY and names:
            return tuple(names[: rng.randint(1, 3)])  # in the order of the story, as those of a prompt
        others = [word for word in dict.fromkeys(_LOWER.findall(text)) if 1 < self._counts[word] <= self._most]
        chosen = rng.sample(others, min(rng.randint(1, MOST_WORDS), len(others)))
        if kind >= NAMES_ONLY + NO_NAMES and names:
            chosen[-1:] = [rng.choice(names)]
        rng.shuffle(chosen)
        return tuple(chosen)
