"""The seam between the engine and whatever computes logits: state in, state out.

A runtime knows one network. It prefills one stream at a time and advances a whole batch by one token; it
knows nothing of text, sampling, queues or time. The engine is the only caller, from one thread.

Shapes: B streams in the batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from model.generation import SamplingParams

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

PREFILL_CHUNK = 64
"""Prompt tokens that a runtime takes in one call; longer prompts come in pieces of this size."""


class StreamState(Protocol):
    """All that a network remembers of one stream: of constant size, immutable once handed out."""

    @property
    def position(self) -> int:
        """Number of tokens taken in so far."""
        ...

    @property
    def nbytes(self) -> int: ...


class Batch(Protocol):
    """The states of the streams that decode together, one row each."""

    def __len__(self) -> int: ...

    def append(self, state: Any) -> int:
        """Add a stream as the last row (its state is copied in) and return the row's index."""
        ...

    def remove(self, row: int) -> None:
        """Drop a row; the last row moves into its place (a swap-remove), so rows stay contiguous."""
        ...

    def read(self, row: int) -> Any:
        """A copy of one row's state, which `append` and `prefill` accept: this is how a stream is saved or forked."""
        ...


class Runtime(Protocol):
    """A network that can be asked for the next token's logits."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_batch(self) -> int:
        """How many streams one batch can hold."""
        ...

    def prefill(self, tokens: Sequence[int], state: Any | None = None) -> tuple[Logits, Any]:
        """Take in `tokens` (at least one) after `state` (None: the start of a story).

        Returns the logits (V,) that follow the last token, and the new state. `state` is not changed.
        """
        ...

    def new_batch(self) -> Batch:
        """An empty batch with room for `max_batch` streams."""
        ...

    def step(self, tokens: Tokens, batch: Any) -> Logits:
        """Feed one token (B,) to each row of `batch`, whose states advance, and return the next logits (B, V).

        A row's logits do not depend, to the last bit, on which other rows share the batch: the engine's
        promise that a seed gives one story rests on it. The array may be reused by the next call.
        """
        ...


class Sampler(Protocol):
    """Chooses the next tokens of the streams in a batch, one row each; `SamplingRows` is one."""

    def set(self, row: int, sampling: SamplingParams, seen: Iterable[int] = ()) -> None:
        """Give `row` to a stream. `seen` are the story's tokens so far, for the repetition penalty."""
        ...

    def move(self, source: int, target: int) -> None:
        """Copy the row `source` over the row `target`; `source` is free afterwards."""
        ...

    def note(self, row: int, token: int) -> None:
        """Tell that `token` is now part of the row's story."""
        ...

    def sample(self, logits_BV: Any, position_B: npt.NDArray[np.int64]) -> tuple[Tokens, Flags]:
        """Choose a token for each row of `logits_BV`, at its place in the story; and whether each was usable."""
        ...


class RowLogits(Protocol):
    """The logits of one step, wherever they are; valid until the next."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Logits:
        """One row's logits (V,), brought to the host."""
        ...


@runtime_checkable
class SamplingRuntime(Runtime, Protocol):
    """A runtime that can choose tokens where it computes logits, so that logits stay there unless asked for."""

    def step_in_place(self, tokens: Tokens, batch: Any) -> RowLogits:
        """`step`, without bringing the logits to the host."""
        ...

    def new_sampler(self, slots: int) -> Sampler:
        """A sampler for `slots` rows of what `step_in_place` returns."""
        ...

    def new_host_sampler(self, slots: int) -> Sampler:
        """A sampler for `slots` rows of logits on the host, as `prefill` returns them."""
        ...


class EmbeddedRuntime(Runtime, Protocol):
    """A runtime of this process, which also scores whole stories, as an evaluation asks it to."""

    @property
    def name(self) -> str:
        """Which implementation this is, and in what precision: `onnx int8`. Other names may mean other bits."""
        ...

    def score(self, stories: Sequence[Sequence[int]]) -> Iterator[tuple[int, Logits]]:
        """Logits at every place, story beside story: yields (first place, (B, T, V)) piece by piece.

        What stands behind a story's end is meaningless.
        """
        ...
