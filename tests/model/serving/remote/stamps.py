"""A network that notes when it made each token: one of the two clocks of "before the tenth is made"."""

from __future__ import annotations

import time
from collections.abc import Sequence

from model.runtimes.protocol import Logits, Tokens
from tests.model.engines import TOKENIZER
from tests.model.fake_runtime import FakeBatch, FakeRuntime, FakeState


class Stamped(FakeRuntime):
    """`made[i]`: the second, since 1970, in which what token i is chosen from was there. For one story at a time."""

    def __init__(self, *, step_seconds: float) -> None:
        super().__init__(TOKENIZER.vocab_size, step_seconds=step_seconds, end_bias=-1000.0)
        self.made: list[float] = []

    def prefill(self, tokens: Sequence[int], state: FakeState | None = None) -> tuple[Logits, FakeState]:
        read = super().prefill(tokens, state)
        self.made = [time.time()]  # the last part of a prompt gives the first token
        return read

    def step(self, tokens: Tokens, batch: FakeBatch) -> Logits:
        logits = super().step(tokens, batch)
        self.made.append(time.time())
        return logits
