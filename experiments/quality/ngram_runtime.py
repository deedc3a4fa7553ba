"""The n-gram table as something the engine can write with, so that the floor's stories come the same way as a model's:
the same prompts, seeds, sampling and stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.quality.ngram import NgramTable
from model.runtimes.protocol import Logits, Tokens


@dataclass(frozen=True, slots=True)
class NgramState:
    """The numbers of the n-grams that end at the last token."""

    position: int
    context: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the numbers alone."""
        return 8 * len(self.context)


class NgramBatch:
    """One state for each row."""

    def __init__(self) -> None:
        self.states: list[NgramState] = []

    def __len__(self) -> int:
        return len(self.states)

    def append(self, state: NgramState) -> int:
        """Add a row and return its index."""
        self.states.append(state)
        return len(self.states) - 1

    def remove(self, row: int) -> None:
        """Drop a row; the last one moves into its place."""
        self.states[row] = self.states[-1]
        self.states.pop()

    def read(self, row: int) -> NgramState:
        """A row's state."""
        return self.states[row]


class NgramRuntime:
    """A `model.runtimes.protocol.Runtime` over a table."""

    def __init__(self, table: NgramTable, *, max_batch: int = 16) -> None:
        self._table = table
        self.max_batch = max_batch

    @property
    def vocab_size(self) -> int:
        """Of the table."""
        return self._table.vocab_size

    def prefill(self, tokens: Sequence[int], state: Any | None = None) -> tuple[Logits, NgramState]:
        """Take in tokens after `state`; the logits are log-probabilities."""
        before = NgramState(0, ()) if state is None else state
        context = before.context
        for token in tokens:
            context = self._table.advance(context, token)
        return self._logits(context), NgramState(before.position + len(tokens), context)

    def new_batch(self) -> NgramBatch:
        """An empty batch."""
        return NgramBatch()

    def step(self, tokens: Tokens, batch: NgramBatch) -> Logits:
        """One token for each row."""
        for row, state in enumerate(batch.states):
            context = self._table.advance(state.context, int(tokens[row]))
            batch.states[row] = NgramState(state.position + 1, context)
        return np.stack([self._logits(state.context) for state in batch.states])

    def _logits(self, context: tuple[int, ...]) -> Logits:
        logits: Logits = np.log(self._table.chances(context)).astype(np.float32)
        return logits
