"""A real engine for the page's tests: real scheduling, real sampling, a tokenizer trained on the spot.

The network under it is `FakeRuntime`, because only it can be given a pace: the shipped model is through with
a story before a browser has drawn it twice, and a stop half-way needs a half. What it writes has no meaning.
"""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.page import EXAMPLES
from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from model.serving.backend import LocalBackend, ModelInfo
from tests.model.fake_runtime import FakeRuntime


@cache
def tokenizer() -> StoryTokenizer:
    """A small byte-level vocabulary of the page's own example sentences."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([f" {text}" for text in EXAMPLES.values()] * 4, trainer)
    return StoryTokenizer(raw)


def local_backend(*, slots: int = 2, queue: int = 2, step_seconds: float = 0.0, end_bias: float = -2.0) -> LocalBackend:
    """A backend over a real engine; `end_bias` makes its stories short or long."""
    words = tokenizer()
    runtime = FakeRuntime(
        words.vocab_size, max_batch=slots, step_seconds=step_seconds, end_bias=end_bias, sharpness=6.0
    )
    engine = Engine(runtime, words, queue_limit=queue)
    model = ModelInfo(name="a network without training", version="0123456789abcdef" * 4)
    return LocalBackend(engine, model, capacity=slots + queue)
