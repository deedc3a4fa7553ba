"""The floor: what a table of short token runs, counted in a minute, makes of the same stories and prompts.

A figure without it says little. 0.62 bits per byte may be good or poor; against 0.95 of a table it is a network that
has learned something which lies further apart than four tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from experiments.quality.held_out import Figures, HeldOut, figures_of
from experiments.quality.ngram import ORDER, NgramTable
from experiments.quality.training_texts import TrainingTexts
from model.architecture.config import END_ID
from model.architecture.tokenizer import StoryTokenizer

MAX_TOKENS = 10_000_000
"""Of the training stories, at most these are counted, the first: sorting them takes about 100 bytes each."""


@dataclass(frozen=True, slots=True)
class Floor:
    """A counted table, and its figures on the held-out stories."""

    table: NgramTable
    figures: Figures
    source: str
    stories: int
    tokens: int
    """Targets counted."""
    max_tokens: int

    @classmethod
    def measure(
        cls,
        held_out: HeldOut,
        training: TrainingTexts,
        tokenizer: StoryTokenizer,
        *,
        order: int = ORDER,
        max_tokens: int = MAX_TOKENS,
    ) -> Floor:
        """Count the training stories, up to `max_tokens`, and score the held-out ones."""
        stories, total = 0, 0

        def counting() -> Iterator[list[int]]:
            nonlocal stories, total
            for text in training:
                tokens = [END_ID, *tokenizer.encode(text)]
                stories, total = stories + 1, total + len(tokens)
                yield tokens
                if total >= max_tokens:
                    return

        table = NgramTable.count(counting(), tokenizer.vocab_size, order)
        figures = figures_of(table.nats(held_out.tokens), held_out)
        return cls(table, figures, training.name, stories, total, max_tokens)
