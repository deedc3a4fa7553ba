"""How well a model predicts stories it has not seen: the nats of every token, by each runtime that can serve it.

A story's nats are those of all its tokens and of its end. They are kept for each token: loss by place in the story and
paired comparisons of two models need them, and a mean hides where a model is weak.

Shapes: B stories side by side, T tokens, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from model.architecture.folder import END_ID, ModelFolder
from model.architecture.tokenizer import StoryTokenizer
from model.engine.load import load_runtime
from model.errors import DataError
from model.runtimes.protocol import Logits
from training.data.corpus import load_own_stories, read_stories, story_id
from training.data.shards import batches_by_length

RuntimeName = Literal["native", "int8", "fp32", "torch"]
RUNTIMES: tuple[RuntimeName, ...] = ("native", "int8", "fp32", "torch")
BATCH_TOKENS = 4096
OWN_STORIES = "our own held-out stories"
"""Name of these in reports, in place of a file's."""

STARTS = (0, 16, 32, 64, 128, 256, 512)
"""First places of the buckets of `loss_by_place`; place 0 is a story's first token, and its end counts as its last."""
Nats = npt.NDArray[np.float64]
"""Negative natural-log likelihoods of a story's targets, (T,): its tokens, and last its end."""
Scorer = Callable[[list[list[int]]], Iterator[tuple[int, Logits]]]
"""Stories to (first place, logits (B, T, V)) chunks that cover the longest of them."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Stories to evaluate on, read once and scored by every runtime."""

    texts: tuple[str, ...]
    tokens: tuple[list[int], ...]
    """Of each story, behind the leading end-of-story id; as many as there are targets."""

    @property
    def ids(self) -> list[str]:
        return [story_id(text) for text in self.texts]

    @property
    def bytes(self) -> npt.NDArray[np.int64]:
        return np.array([len(text.encode()) for text in self.texts], np.int64)

    @property
    def digest(self) -> str:
        """Digest of the texts, however they were packed into files."""
        return digest_of(self.texts)

    def targets(self, index: int) -> list[int]:
        return [*self.tokens[index][1:], END_ID]


@dataclass(frozen=True, slots=True)
class Figures:
    """Loss of one runtime, or of the baseline, on the stories."""

    bits_per_byte: float
    loss: float
    """Nats a token."""
    nats: tuple[Nats, ...] = field(repr=False, compare=False)
    """Of each target of each story."""

    @property
    def story_nats(self) -> Nats:
        return np.array([float(story.sum()) for story in self.nats])

    def as_dict(self) -> dict[str, float]:
        return {"bits_per_byte": self.bits_per_byte, "loss": self.loss}


@dataclass(frozen=True, slots=True)
class PlaceLoss:
    """Loss on the targets of all stories between two places."""

    first: int
    last: int | None
    """None: no end."""
    tokens: int
    loss: float
    """Nats a token."""
    bits_per_byte: float | None
    """None where the targets have no bytes: nothing but ends of stories."""
    baseline_loss: float | None
    """Nats a token of the n-gram baseline on the same targets."""


def digest_of(texts: Iterable[str]) -> str:
    """SHA-256 over the SHA-256 of each text, in their order."""
    total = hashlib.sha256()
    for text in texts:
        total.update(hashlib.sha256(text.encode()).digest())
    return total.hexdigest()


def read_held_out(data: Sequence[Path] | None, tokenizer: StoryTokenizer, limit: int | None = None) -> HeldOut:
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
    return HeldOut(tuple(texts), tokens)


def figures_of(nats: Sequence[Nats], held_out: HeldOut) -> Figures:
    """Sum up the nats of all targets of `held_out`."""
    by_story = np.array([float(story.sum()) for story in nats])
    bits = by_story.sum() / math.log(2) / held_out.bytes.sum()
    return Figures(float(bits), float(by_story.sum() / sum(map(len, nats))), tuple(nats))


def scorer(folder: ModelFolder, name: RuntimeName, threads: int) -> Scorer:
    """What computes the logits: the native decoder, an exported graph, or the network in fp32 PyTorch."""
    if name == "torch":
        return _torch_scorer(folder)
    if name == "native":
        return load_runtime(folder, slots=1, runtime="native").score
    return load_runtime(folder, slots=1, threads=threads, precision=name, runtime="onnx").score


def score(score: Scorer, held_out: HeldOut, done: Callable[[int], None] = lambda stories: None) -> list[Nats]:
    """The nats of every target; `done` is called with the number of stories just scored."""
    nats = [np.zeros(len(tokens)) for tokens in held_out.tokens]
    for batch in batches_by_length(list(map(len, held_out.tokens)), BATCH_TOKENS):
        targets = [held_out.targets(index) for index in batch]
        for first, logits_BTV in score([held_out.tokens[index] for index in batch]):
            for row, index in enumerate(batch):
                wanted = np.array(targets[row][first : first + logits_BTV.shape[1]], np.int64)
                if len(wanted):
                    nats[index][first : first + len(wanted)] = _surprise(logits_BTV[row, : len(wanted)], wanted)
        done(len(batch))
    return nats


def target_bytes(held_out: HeldOut, tokenizer: StoryTokenizer) -> list[npt.NDArray[np.int64]]:
    """The bytes of each target of each story: those of its token, and none for the end."""
    sizes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    return [sizes[held_out.targets(index)] for index in range(len(held_out.texts))]


def loss_by_place(
    nats: Sequence[Nats],
    sizes: Sequence[npt.NDArray[np.int64]],
    baseline: Sequence[Nats] | None = None,
    starts: Sequence[int] = STARTS,
) -> tuple[PlaceLoss, ...]:
    """Mean loss of the targets in each bucket that holds any: does a model use what came before?

    Late places are easier for every model, because a story repeats its own words. A model that uses a long context
    gains on the n-gram baseline the more, the further it is into the story.

    Args:
        nats: of each story's targets.
        sizes: bytes of the same targets.
        baseline: the n-gram table's nats of the same targets.
        starts: first places of the buckets, rising, from 0.
    """
    from pandas import DataFrame

    place = np.concatenate([np.arange(len(story)) for story in nats])
    columns = {"nats": nats, "bytes": sizes} | ({} if baseline is None else {"baseline": baseline})
    frame = DataFrame({name: np.concatenate(values) for name, values in columns.items()})
    buckets = frame.groupby(np.searchsorted(np.array(starts), place, side="right") - 1)
    counts, totals = buckets.size(), buckets.sum()
    return tuple(
        PlaceLoss(
            first=starts[index],
            last=starts[index + 1] - 1 if index + 1 < len(starts) else None,
            tokens=int(counts[index]),
            loss=float(total["nats"] / counts[index]),
            bits_per_byte=float(total["nats"] / math.log(2) / total["bytes"]) if total["bytes"] else None,
            baseline_loss=None if baseline is None else float(total["baseline"] / counts[index]),
        )
        for index, total in totals.iterrows()
    )


def _torch_scorer(folder: ModelFolder) -> Scorer:
    import torch

    from model.architecture.network import load_network

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
