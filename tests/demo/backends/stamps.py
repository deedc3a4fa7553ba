"""A network that notes when it made each token: one of the two clocks of "before the tenth is made"."""

from __future__ import annotations

import time

from model.runtime import Logits, Tokens
from tests.model.engines import TOKENIZER
from tests.model.fake_runtime import FakeBatch, FakeRuntime


class Stamped(FakeRuntime):
    """`made[i]`: the second, since 1970, in which the logits of token i + 1 were there (token 0 comes of prefill)."""

    def __init__(self, *, step_seconds: float) -> None:
        super().__init__(TOKENIZER.vocab_size, step_seconds=step_seconds, end_bias=-1000.0)
        self.made: list[float] = []

    def step(self, tokens: Tokens, batch: FakeBatch) -> Logits:
        logits = super().step(tokens, batch)
        self.made.append(time.time())
        return logits
