"""The n-gram baseline: a table of token n-grams, smoothed after Kneser and Ney, beside every figure of a model.

Interpolated, with one absolute discount D = n1 / (n1 + 2 n2) for each order, estimated from how many n-grams were seen
once and twice (Kneser and Ney 1995; Ney, Essen and Kneser 1994). The highest order counts occurrences; a lower order
counts the different tokens that stand before the n-gram, except at a story's beginning, before which nothing can
stand. Below the unigrams lies the uniform distribution, so that no token is impossible.

n-grams are numbered level by level: the number of (w1 … wk) is the place of the pair (number of w1 … w(k-1), wk) among
the sorted pairs of level k. A level is then a few sorted arrays, and all places of a corpus are looked up at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import numpy as np
import numpy.typing as npt

from experiments.quality.generation import TrainingTexts
from experiments.quality.held_out import Figures, HeldOut, figures_of
from model.architecture.folder import END_ID
from model.architecture.tokenizer import StoryTokenizer
from model.runtimes.protocol import Batch, FeedingRuntime, Logits, Tokens

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
ORDER = 4
"""On TinyStories orders 4 and 5 differ by less than 1 %."""
UNSEEN = -1
MAX_TOKENS = 10_000_000
"""Only the first so many training tokens are counted: sorting them takes about 100 bytes each."""


@dataclass(frozen=True, slots=True)
class Level:
    """The n-grams of one length: N of them, over C contexts."""

    keys_N: Ints
    """Sorted: the context's number times the vocabulary, plus the last token."""
    weights_N: Floats
    """Count less discount, over the context's total."""
    backoff_C: Floats
    """The share of a context's probability that goes to the next lower order."""

    def find(self, keys: Ints) -> Ints:
        places = np.searchsorted(self.keys_N, keys)
        places[places == len(self.keys_N)] = 0
        return np.where(self.keys_N[places] == keys, places, UNSEEN)


@dataclass(frozen=True, slots=True)
class NgramTable:
    """Probabilities of the next token from the `order` - 1 tokens before it."""

    vocab_size: int
    order: int
    base_V: Floats
    """Unigram probabilities, none of them zero."""
    levels: tuple[Level, ...]
    """Bigrams first."""

    @classmethod
    def count(cls, stories: Iterable[Sequence[int]], vocab_size: int, order: int = ORDER) -> Self:
        """Count stories, each given behind its leading end-of-story id 0; its end is a target too.

        Raises `ValueError` where there is no story, or `order` is below 2.
        """
        if order < 2:
            raise ValueError(f"order must be at least 2, got {order}")
        tokens, place = _flat(stories)
        # ids: the number of the n-gram of the level at hand that ends at each place of the corpus.
        ids, raw = tokens, np.bincount(tokens[place > 0], minlength=vocab_size).astype(np.float64)
        keys, opens = np.arange(vocab_size), np.zeros(vocab_size, bool)
        levels: list[Level] = []
        base_V = np.empty(0)
        contexts = 1
        for length in range(1, order + 1):
            adjusted = raw
            if length < order:
                inside = np.flatnonzero(place >= length)
                pairs = ids[inside - 1] * vocab_size + tokens[inside]
                longer, first, inverse, occurrences = np.unique(
                    pairs, return_index=True, return_inverse=True, return_counts=True
                )
                # One occurrence of each longer n-gram is enough to know which shorter one it ends in.
                followers = np.bincount(ids[inside[first]], minlength=len(keys)).astype(np.float64)
                adjusted = np.where(opens, raw, followers)
            if length == 1:
                base_V = _unigrams(adjusted)
            else:
                levels.append(_level(keys, adjusted, contexts, vocab_size))
            if length < order:
                contexts = len(keys)
                ids = np.full(len(tokens), UNSEEN)
                ids[inside] = inverse
                keys, raw = longer, occurrences.astype(np.float64)
                opens = place[inside[first]] == length
        return cls(vocab_size, order, base_V, tuple(levels))

    def nats(self, stories: Iterable[Sequence[int]]) -> list[Floats]:
        """Negative log-probability of each target of each story: (T,) for T tokens with the leading 0."""
        tokens, place = _flat(stories)
        chances = self.base_V[tokens]
        ids = tokens
        for length, level in enumerate(self.levels, 2):
            inside = np.flatnonzero(place >= length - 1)
            context = ids[inside - 1]
            inside, context = inside[context != UNSEEN], context[context != UNSEEN]
            found = level.find(context * self.vocab_size + tokens[inside])
            own = np.where(found == UNSEEN, 0.0, level.weights_N[found])
            chances[inside] = own + level.backoff_C[context] * chances[inside]
            ids = np.full(len(tokens), UNSEEN)
            ids[inside] = found
        starts = np.flatnonzero(place == 0)
        return [part[1:] for part in np.split(-np.log(chances), starts[1:])]

    def advance(self, context: Sequence[int], token: int) -> tuple[int, ...]:
        """The context after one more token: the numbers of the n-grams that end there.

        `context` is what an earlier call gave, and () before a story's leading end-of-story id.
        """
        numbers = [token]
        for level, shorter in zip(self.levels[:-1], context, strict=False):
            if shorter == UNSEEN:
                break
            number = int(level.find(np.array([shorter * self.vocab_size + token]))[0])
            if number == UNSEEN:
                break
            numbers.append(number)
        return tuple(numbers)

    def chances(self, context: Sequence[int]) -> Floats:
        chances_V = self.base_V.copy()
        for level, number in zip(self.levels, context, strict=False):
            first, last = np.searchsorted(level.keys_N, [number * self.vocab_size, (number + 1) * self.vocab_size])
            chances_V *= level.backoff_C[number]
            chances_V[level.keys_N[first:last] % self.vocab_size] += level.weights_N[first:last]
        return chances_V


@dataclass(frozen=True, slots=True)
class NgramBaseline:
    """A counted table, and its figures on the held-out stories."""

    table: NgramTable
    figures: Figures
    source: str
    stories: int
    tokens: int
    """Targets counted."""
    limited: bool
    """Only the first training stories were counted."""

    @classmethod
    def measure(
        cls, held_out: HeldOut, training: TrainingTexts, tokenizer: StoryTokenizer, *, max_tokens: int = MAX_TOKENS
    ) -> NgramBaseline:
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

        table = NgramTable.count(counting(), tokenizer.vocab_size)
        figures = figures_of(table.nats(held_out.tokens), held_out)
        return cls(table, figures, training.name, stories, total, total >= max_tokens)


class NgramBatch(Batch):
    """One context for each row, as `NgramTable.advance` gives it."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.contexts: list[tuple[int, ...]] = [()] * rows

    def write(self, row: int, state: tuple[int, ...]) -> None:
        self.contexts[row] = state

    def copy_row(self, source: int, target: int) -> None:
        self.contexts[target] = self.contexts[source]


class NgramRuntime(FeedingRuntime):
    """A `model.runtimes.protocol.Runtime` over a table, whose states are contexts: the engine generates with it."""

    def __init__(self, table: NgramTable, *, max_batch: int = 16) -> None:
        self._table = table
        self.vocab_size, self.max_batch, self.empty = table.vocab_size, max_batch, ()

    def feed(self, fed: Tokens, state: tuple[int, ...], *, every: bool) -> tuple[Logits, tuple[int, ...]]:
        """See `FeedingRuntime.feed`."""
        _, *contexts = accumulate(fed.tolist(), self._table.advance, initial=state)
        chances = [self._table.chances(context) for context in (contexts if every else contexts[-1:])]
        return np.log(np.stack(chances)).astype(np.float32), contexts[-1]

    def new_batch(self) -> NgramBatch:
        return NgramBatch(self.max_batch)

    def step(self, tokens: Tokens, batch: NgramBatch) -> Logits:
        logits = []
        for row in range(batch.check_tokens(tokens)):
            logits_1V, batch.contexts[row] = self.feed(tokens[row : row + 1], batch.contexts[row], every=False)
            logits.append(logits_1V)
        return np.concatenate(logits)


def _flat(stories: Iterable[Sequence[int]]) -> tuple[Ints, Ints]:
    """All stories in a row, each with its leading and its closing 0; and each token's place in its story."""
    rows = [np.array([*story, 0], np.int64) for story in stories]
    if not rows:
        raise ValueError("an n-gram table needs at least one story")
    return np.concatenate(rows), np.concatenate([np.arange(len(row)) for row in rows])


def _discount(counts: Floats) -> float:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    # With nothing seen once the estimate would be 0, and nothing would be left for what was never seen.
    return once / (once + 2 * twice) if once else 0.5


def _unigrams(counts_V: Floats) -> Floats:
    discount = _discount(counts_V)
    kept = np.maximum(counts_V - discount, 0.0)
    total = counts_V.sum()
    left: float = (total - kept.sum()) / total
    chances: Floats = kept / total + left / len(counts_V)
    return chances


def _level(keys: Ints, counts: Floats, contexts: int, vocab_size: int) -> Level:
    discount = _discount(counts)
    context = keys // vocab_size
    totals = np.bincount(context, counts, minlength=contexts)
    kinds = np.bincount(context, minlength=contexts)
    # A context with no continuation (the end of a story) leaves everything to the lower order.
    backoff = np.ones(contexts)
    np.divide(discount * kinds, totals, out=backoff, where=totals > 0)
    return Level(keys, (counts - discount) / totals[context], backoff)
