"""A runtime without a trained network: small, but real in all that the engine relies on.

It is a recurrent network in numpy, a gated tanh cell with random weights and a state of constant size.
Guaranteed: the state is a pure function of the tokens fed (a token changes all that follows); every row is
computed by itself, by the same operations on arrays of the same shape, so its logits are the same bits in any
batch, alone or at any row; states handed out are never changed; the array of logits is reused by the next
step, as a real runtime may do. What it does not have: meaning, and equal bits between prefill and step. Prefill
rounds the state to sixteenths at its end, so that a test notices an engine that mixes up the two, or cuts a
prompt now here and now there.

Faults can be planted: `poison` (a token after which a row's logits are NaN) and `fail_next` (the next call
raises).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from model.runtimes.protocol import Batch, Logits, Tokens

WIDTH = 24


@dataclass(frozen=True)
class FakeState:
    position: int
    hidden: np.ndarray

    @property
    def nbytes(self) -> int:
        return int(self.hidden.nbytes)


class FakeBatch(Batch):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.states: list[FakeState] = [FakeState(0, np.zeros(WIDTH, np.float32))] * capacity

    def write(self, row: int, state: FakeState) -> None:
        self.states[row] = FakeState(state.position, state.hidden.copy())

    def copy_row(self, source: int, target: int) -> None:
        self.states[target] = self.states[source]

    def read(self, row: int) -> FakeState:
        state = self.states[row]
        return FakeState(state.position, state.hidden.copy())


class FakeRuntime:
    """`sharpness` scales the logits; `end_bias` is added to the end of story; `step_seconds` makes steps
    slow.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        max_batch: int = 8,
        seed: int = 0,
        sharpness: float = 3.0,
        end_bias: float = -2.0,
        step_seconds: float = 0.0,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_batch = max_batch
        self.step_seconds = step_seconds
        self.poison: int | None = None
        self.fail_next: Exception | None = None
        self.gate = threading.Event()  # cleared: a step waits until it is set
        self.gate.set()
        self.calls: list[tuple[str, int]] = []  # ("prefill", tokens) or ("step", rows), in order
        self.threads: set[int] = set()
        rng = np.random.default_rng(seed)
        self._embed = rng.standard_normal((vocab_size, WIDTH)).astype(np.float32)
        self._mix = (rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32)
        self._out = (rng.standard_normal((vocab_size, WIDTH)) * sharpness / WIDTH**0.5).astype(np.float32)
        self._bias = np.zeros(vocab_size, dtype=np.float32)
        self._bias[0] = end_bias
        self._logits = np.empty((max_batch, vocab_size), dtype=np.float32)

    def _take(self, hidden: np.ndarray, token: int) -> np.ndarray:
        new: np.ndarray = np.tanh(0.8 * hidden + self._mix @ hidden + self._embed[token])
        return new.astype(np.float32)

    def _called(self, kind: str, size: int) -> None:
        self.threads.add(threading.get_ident())
        self.calls.append((kind, size))
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error

    def prefill(self, tokens: Sequence[int], state: FakeState | None = None) -> tuple[Logits, FakeState]:
        assert tokens, "prefill needs a token"
        self._called("prefill", len(tokens))
        hidden = np.zeros(WIDTH, dtype=np.float32) if state is None else state.hidden
        for token in tokens:
            hidden = self._take(hidden, token)
        hidden = np.round(hidden * 16) / np.float32(16)
        position = len(tokens) + (state.position if state is not None else 0)
        return self._out @ hidden + self._bias, FakeState(position, hidden)

    def score(self, stories: Sequence[Sequence[int]]) -> Iterator[tuple[int, Logits]]:
        """Of one story, by prefill from the start to each place: so rounded as often as a prompt of that length."""
        (story,) = stories
        for start in range(0, len(story), 10):
            ends = range(start + 1, min(start + 10, len(story)) + 1)
            yield start, np.stack([self.prefill(story[:end])[0] for end in ends])[None]

    def new_batch(self) -> FakeBatch:
        return FakeBatch(self.max_batch)

    def step(self, tokens: Tokens, batch: FakeBatch) -> Logits:
        assert len(tokens) == len(batch), "one token for each row"
        self.gate.wait()
        self._called("step", len(batch))
        if self.step_seconds:
            time.sleep(self.step_seconds)
        for row, state in enumerate(batch.states[: len(batch)]):
            hidden = self._take(state.hidden, int(tokens[row]))
            batch.states[row] = FakeState(state.position + 1, hidden)
            self._logits[row] = self._out @ hidden + self._bias
            if int(tokens[row]) == self.poison:
                self._logits[row] = np.nan
        return self._logits[: len(batch)]
