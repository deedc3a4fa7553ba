"""The interface between the engine and whatever computes logits: state in, state out.

A runtime knows one network. It prefills one stream at a time and advances a whole batch by one token; it knows nothing
of text, queues or time. The engine is the only caller, from one thread. States are opaque to it: of constant size, and
immutable once handed out.

Shapes: B streams in the batch, T tokens, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from model.architecture.folder import END_ID
from model.architecture.tokenizer import TokenMasks
from model.generation import SamplingParams

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

PREFILL_CHUNK = 64
"""Prompt tokens that a runtime takes in one call; longer prompts come in chunks of this size."""


class Batch(ABC):
    """The states of the streams that decode together, one row each, in arrays that hold those of all rows."""

    def __init__(self, rows: int) -> None:
        """Make a batch of up to `rows` streams."""
        self.size, self.rows = 0, rows

    @abstractmethod
    def write(self, row: int, state: Any) -> None:
        """Copy `state` over whatever stands in `row`."""

    @abstractmethod
    def copy_row(self, source: int, target: int) -> None:
        """Copy the row `source` over the row `target`."""

    def __len__(self) -> int:
        return self.size

    def append(self, state: Any) -> int:
        """Add a stream as the last row (its state is copied in) and return the row's index."""
        if self.size >= self.rows:
            raise IndexError(f"the batch holds at most {self.rows} streams")
        self.size += 1
        self.write(self.size - 1, state)
        return self.size - 1

    def remove(self, row: int) -> None:
        """Drop a row; the last row moves into its place (a swap-remove), so rows stay contiguous."""
        if not 0 <= row < self.size:
            raise IndexError(f"row must be below {self.size}, got {row}")
        self.size -= 1
        if row != self.size:
            self.copy_row(self.size, row)

    def check_tokens(self, tokens: Tokens) -> int:
        """Return the number of rows. Raises `ValueError` if it is not that of `tokens`."""
        if len(tokens) != self.size:
            raise ValueError(f"step needs one token for each of {self.size} streams, got {len(tokens)}")
        return self.size


class Runtime(Protocol):
    """A network that can be asked for the next token's logits.

    Its `name`, where it has one, is the implementation and its precision: `onnx int8`. Other names may mean other bits.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_batch(self) -> int:
        """How many streams one batch can hold."""

    def prefill(self, tokens: Sequence[int], state: Any | None = None) -> tuple[Logits, Any]:
        """Take in `tokens` (at least one) after `state` (None: the start of a story).

        Returns the logits (V,) that follow the last token, and the new state. `state` is not changed.
        """

    def new_batch(self) -> Batch:
        """An empty batch for at most `max_batch` streams."""

    def step(self, tokens: Tokens, batch: Any) -> Logits:
        """Feed one token (B,) to each row of `batch`, whose states advance, and return the next logits (B, V).

        Batch-invariant: a row's logits do not depend, to the last bit, on which other rows share the batch. That a
        seed gives one story rests on it. The array may be reused by the next call.
        """

    def score(self, stories: Sequence[Sequence[int]]) -> Iterator[tuple[int, Logits]]:
        """Logits at every place of whole stories, side by side: yields (first place, (B, T, V)) chunk by chunk.

        Stories are padded to the longest; what stands behind a story's end is meaningless. The end of story may
        stand at a story's beginning only.
        """


class Sampler(Protocol):
    """Chooses the next tokens of the streams in a batch, one row each; `SamplingRows` is one."""

    def set(
        self, row: int, sampling: SamplingParams, prompt: Sequence[int] = (), generated: Sequence[int] = ()
    ) -> None:
        """Give `row` to a stream whose story has these tokens so far."""

    def move(self, source: int, target: int) -> None:
        """Copy the row `source` over the row `target`; `source` is free afterwards."""

    def note(self, row: int, token: int) -> None:
        """Add a generated `token` to the row's story."""

    def sample(self, logits_BV: Any, position_B: Tokens) -> tuple[Tokens, Flags]:
        """Choose a token for each of the first B rows, all of which must have been `set`.

        `position_B` is the place in the story of the token to be chosen. Returns the tokens (B,), until the next call,
        and whether each row was usable (B,): a row whose largest logit is NaN or infinite is not, and its token
        means nothing.
        """


class RowLogits(Protocol):
    """The logits of one step, wherever they are; valid until the next."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Logits:
        """One row's logits (V,), brought to the host."""


@runtime_checkable
class SamplingRuntime(Runtime, Protocol):
    """A runtime that can choose tokens where it computes logits, so that logits stay there unless asked for."""

    def step_in_place(self, tokens: Tokens, batch: Any) -> RowLogits:
        """`step`, without bringing the logits to the host."""

    def new_sampler(self, slots: int, masks: TokenMasks | None = None) -> Sampler:
        """A sampler for `slots` rows of what `step_in_place` returns. `masks`: None forbids no token."""

    def new_host_sampler(self, slots: int, masks: TokenMasks | None = None) -> Sampler:
        """A sampler for `slots` rows of logits on the host, as `prefill` returns them."""


class FeedingRuntime(ABC):
    """Prefill and scoring of a `Runtime` whose states are values: both feed chunks of tokens behind a state."""

    vocab_size: int
    empty: Any
    """The state before a story."""

    @abstractmethod
    def feed(self, fed: Tokens, state: Any, *, every: bool) -> tuple[Logits, Any]:
        """Feed tokens (T,) of one story behind `state`; one that starts a story is the first, behind `empty`.

        Returns the logits after each of them (T, V), or without `every` after the last (1, V), and the new state.
        """

    def prefill(self, tokens: Sequence[int], state: Any | None = None) -> tuple[Logits, Any]:
        """See `Runtime.prefill`. Long prompts are taken in chunks of a fixed size, so that the result never varies.

        Raises `ValueError` if there is no token.
        """
        if not len(tokens):
            raise ValueError("prefill needs at least one token")
        fed = np.asarray(tokens, np.int64)
        if len(starts := np.flatnonzero(fed == END_ID)):
            fed, state = fed[starts[-1] :], None  # a story forgets all that was before it
        state = self.empty if state is None else state
        for start in range(0, len(fed), PREFILL_CHUNK):
            logits_1V, state = self.feed(fed[start : start + PREFILL_CHUNK], state, every=False)
        return logits_1V[0], state

    def score(self, stories: Sequence[Sequence[int]]) -> Iterator[tuple[int, Logits]]:
        """See `Runtime.score`; story by story."""
        longest = max(map(len, stories))
        states = [self.empty] * len(stories)
        for start in range(0, longest, PREFILL_CHUNK):
            logits_BTV = np.zeros((len(stories), min(PREFILL_CHUNK, longest - start), self.vocab_size), np.float32)
            for row, story in enumerate(stories):
                if len(fed := np.asarray(story[start : start + PREFILL_CHUNK], np.int64)):
                    logits_BTV[row, : len(fed)], states[row] = self.feed(fed, states[row], every=True)
            yield start, logits_BTV
