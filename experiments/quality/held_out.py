"""How well a model predicts stories it has not seen: the nats of every token, by each runtime that can serve it.

A story's nats are those of all its tokens and of its end. They are kept for each token, because loss by position and
paired comparisons of two models both need them, and a mean over all hides where a model is weak.

Shapes: B stories side by side, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from model.architecture.config import END_ID
from model.architecture.folder import ModelFolder
from model.architecture.tokenizer import StoryTokenizer
from model.engine.load import load_runtime
from model.errors import DataError
from model.runtimes.protocol import Logits
from training.data.corpus import load_own_stories, read_stories, story_id

RuntimeName = Literal["native", "int8", "fp32", "torch"]
RUNTIMES: tuple[RuntimeName, ...] = ("native", "int8", "fp32", "torch")
BATCH_TOKENS = 4096
OWN_STORIES = "our own held-out stories"
"""What is said of them where a file would be named."""

Nats = npt.NDArray[np.float64]
"""Negative natural-log likelihoods of a story's targets, (T,): its tokens, and last its end."""
Scorer = Callable[[list[list[int]]], Iterator[tuple[int, Logits]]]
"""Stories to (first place, logits (B, T, V)) pieces that cover the longest of them."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Stories to judge by, read once and scored by every runtime."""

    texts: tuple[str, ...]
    tokens: tuple[list[int], ...]
    """Of each story, behind the leading end-of-story id; as many as there are targets."""
    end_id: int

    @property
    def ids(self) -> list[str]:
        """Each story's name: the first 12 hex digits of the SHA-1 of its text."""
        return [story_id(text) for text in self.texts]

    @property
    def bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of each story."""
        return np.array([len(text.encode()) for text in self.texts], np.int64)

    @property
    def digest(self) -> str:
        """SHA-256 over the texts in their order, however they were packed into files."""
        return digest_of(self.texts)

    def targets(self, index: int) -> list[int]:
        """What is to be predicted of one story: its tokens and its end."""
        return [*self.tokens[index][1:], self.end_id]


@dataclass(frozen=True, slots=True)
class Figures:
    """What one runtime, or the floor, makes of the stories."""

    bits_per_byte: float
    loss: float
    """Nats a token."""
    story_bits: tuple[float, ...] = field(repr=False)
    """Bits per byte of each story, in the order of the files."""
    nats: tuple[Nats, ...] = field(repr=False, compare=False)
    """Of each target of each story."""

    @property
    def story_nats(self) -> Nats:
        """Nats of each story, its end included."""
        return np.array([float(story.sum()) for story in self.nats])


def digest_of(texts: Iterable[str]) -> str:
    """What tells one set of stories from another: SHA-256 over those of the texts, in their order."""
    total = hashlib.sha256()
    for text in texts:
        total.update(hashlib.sha256(text.encode()).digest())
    return total.hexdigest()


def read_held_out(
    data: Sequence[Path] | None, tokenizer: StoryTokenizer, limit: int | None = None
) -> HeldOut:
    """The first `limit` stories of the files (JSON Lines or text, also .gz), in their order; None: of our own corpus.

    Raises:
        DataError: a file is unusable, a story is empty, or there is none.
    """
    texts = []
    stories = load_own_stories("heldout") if data is None else chain.from_iterable(map(read_stories, data))
    for story in islice(stories, limit):
        if not story.text:
            raise DataError(f"{story.path}, line {story.line}: the story is empty, and has no bits per byte")
        texts.append(story.text)
    if not texts:
        raise DataError("no file of stories was given to evaluate")
    tokens = tuple([END_ID, *tokenizer.encode(text)] for text in texts)
    return HeldOut(tuple(texts), tokens, END_ID)


def figures_of(nats: Sequence[Nats], held_out: HeldOut) -> Figures:
    """Sum up the nats of all targets of `held_out`."""
    by_story = np.array([float(story.sum()) for story in nats])
    bits, sizes = by_story / math.log(2), held_out.bytes
    return Figures(
        float(bits.sum() / sizes.sum()),
        float(by_story.sum() / sum(map(len, nats))),
        tuple(float(value) for value in bits / sizes),
        tuple(nats),
    )


def scorer(folder: ModelFolder, name: RuntimeName, threads: int) -> Scorer:
    """What computes the logits: the decoder in C, an exported graph, or the network in fp32 PyTorch."""
    if name == "torch":
        return _torch_scorer(folder)
    if name == "native":
        return load_runtime(folder, slots=1, runtime="native").score
    return load_runtime(folder, slots=1, threads=threads, precision=name, runtime="onnx").score


def score(score: Scorer, held_out: HeldOut, done: Callable[[int], None] = lambda stories: None) -> list[Nats]:
    """The nats of every target; `done` hears how many stories have come since its last call."""
    nats = [np.zeros(len(tokens)) for tokens in held_out.tokens]
    for batch in _batches(held_out.tokens):
        targets = [held_out.targets(index) for index in batch]
        for first, logits_BTV in score([held_out.tokens[index] for index in batch]):
            for row, index in enumerate(batch):
                wanted = np.array(targets[row][first : first + logits_BTV.shape[1]], np.int64)
                if len(wanted):
                    nats[index][first : first + len(wanted)] = _surprise(
                        logits_BTV[row, : len(wanted)], wanted
                    )
        done(len(batch))
    return nats


def _torch_scorer(folder: ModelFolder) -> Scorer:
    import torch

    from model.architecture.checkpoint import load_network

    network = load_network(folder.path)

    def score(stories: list[list[int]]) -> Iterator[tuple[int, Logits]]:
        fed = np.zeros((len(stories), max(map(len, stories))), np.int64)
        for row, story in enumerate(stories):
            fed[row, : len(story)] = story
        with torch.no_grad():
            yield 0, network(torch.from_numpy(fed)).numpy()

    return score


def _surprise(logits_TV: Logits, wanted_T: npt.NDArray[np.int64]) -> Nats:
    """Negative log-likelihood of each target, in float64 where it is summed."""
    top = logits_TV.max(axis=1, keepdims=True)
    total = np.exp(logits_TV - top).sum(axis=1, dtype=np.float64)
    chosen = logits_TV[np.arange(len(wanted_T)), wanted_T] - top[:, 0]
    surprise: Nats = np.log(total) - chosen
    return surprise


def _batches(stories: Sequence[list[Any]]) -> Iterator[list[int]]:
    """Indexes of stories of like length, so that padding is small."""
    batch: list[int] = []
    for index in sorted(range(len(stories)), key=lambda index: len(stories[index])):
        if batch and (len(batch) + 1) * len(stories[index]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
