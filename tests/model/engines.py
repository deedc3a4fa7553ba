"""Engines over a small real recurrent network, for the tests of the engine.

A story is compared with `by_hand`, which drives the runtime for one stream without any engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from model.engine.title import title_of
from model.generation import Completion, GenerationRequest, SamplingParams
from model.runtimes.sampling import SamplingRows
from tests.model.fake_runtime import FakeRuntime
from training.data.shards import train_tokenizer

SENTENCES = [
    "Once upon a time there was a little fox who lived under the old oak tree.",
    "„Grüß dich“, sagte der Bär, „möchtest du süße Äpfel?“ 🦊 and 🐻 shared 🍎🍎🍎 under the 🌳.",
]
TOKENIZER = StoryTokenizer(train_tokenizer(SENTENCES * 20, vocab_size=400))
CHUNK = 16
LONG = "Once upon a time there was a little fox. " * 20
NO_END = {"end_bias": -1000.0}


def runtime(**options: float) -> FakeRuntime:
    return FakeRuntime(TOKENIZER.vocab_size, **options)  # type: ignore[arg-type]


def engine(network: FakeRuntime | None = None, **options: Any) -> Engine:
    return Engine(network or runtime(), TOKENIZER, **{"prefill_chunk": CHUNK} | options)


def request(prompt: str = "Once upon", *, seed: int = 0, max_tokens: int = 30, **options: object) -> GenerationRequest:
    sampling = SamplingParams(seed=seed, temperature=options.pop("temperature", 0.9), repetition_penalty=1.1)  # type: ignore[arg-type]
    return GenerationRequest(prompt=prompt, max_tokens=max_tokens, sampling=sampling, **options)  # type: ignore[arg-type]


def by_hand(asked: GenerationRequest, network: FakeRuntime | None = None) -> tuple[list[int], str, str]:
    """(tokens, text, finish reason) of one stream, without an engine."""
    network = network or runtime()
    text = asked.prompt
    prompt = TOKENIZER.encode(title_of(text) + text) if isinstance(text, str) else list(text)
    story = [0, *prompt]
    rows = SamplingRows(1, TOKENIZER.vocab_size, TOKENIZER.masks(TOKENIZER.vocab_size))
    rows.set(0, asked.sampling, prompt)
    logits, state = network.prefill(story[:CHUNK])
    for start in range(CHUNK, len(story), CHUNK):
        logits, state = network.prefill(story[start : start + CHUNK], state)
    batch = network.new_batch()
    batch.append(state)
    written: list[int] = []
    reason = "length"
    while len(written) < asked.max_tokens:
        token = int(rows.sample(logits.reshape(1, -1), np.array([len(story)]))[0][0])
        if token == 0:
            reason = "stop"
            break
        story.append(token)
        written.append(token)
        rows.note(0, token)
        text = TOKENIZER.decode(written)
        found = [(text.find(word) + len(word), -len(word)) for word in asked.stop if word in text]
        if found:  # the one that is complete first, and of several the longest
            return written, text[: sum(min(found))], "stop"
        logits = network.step(np.array([token]), batch)
    return written, whole_text(written), reason


def whole_text(tokens: Sequence[int]) -> str:
    """The text of tokens without half a character at its end; no other place may hold one."""
    text = TOKENIZER.decode(tokens)
    assert "\N{REPLACEMENT CHARACTER}" not in text[:-1]
    return text.removesuffix("\N{REPLACEMENT CHARACTER}")


def outcome(completion: Completion, tokens: tuple[int, ...]) -> tuple[list[int], str, str]:
    return list(tokens), completion.text, completion.finish_reason


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)
