"""`story evaluate`: how well a model predicts stories it has not seen, by each runtime it can be served with.

Bits per byte is the one loss that compares models of different vocabularies: all nats of a story (its end
included) over ln 2 and over the UTF-8 bytes of its text. The same stories go through the native decoder, both exported
graphs and fp32 PyTorch, so that a runtime that is not the network shows here too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.written import WrittenFigures, figures, write_stories
from model.errors import DataError, InputError, MissingExtraError
from model.folder import PRETRAINED, ModelFolder
from model.load import load_engine, load_runtime, why_not_native
from model.runtime import Logits
from model.tokenizer import StoryTokenizer
from training.corpus import read_stories

RuntimeName = Literal["native", "int8", "fp32", "torch"]
RUNTIMES: tuple[RuntimeName, ...] = ("native", "int8", "fp32", "torch")
BATCH_TOKENS = 4096
Progress = Callable[[str, int], None]
"""Called with a runtime's name and the stories just scored."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one runtime makes of the stories."""

    bits_per_byte: float
    loss: float
    """Nats a token."""
    story_bits: tuple[float, ...] = dataclasses.field(repr=False)
    """Bits per byte of each story, in the order of the files: what paired comparisons need."""


@dataclass(frozen=True, slots=True)
class QualityReport:
    """Figures of one model on one set of stories."""

    model: str
    digest: str
    data: tuple[str, ...]
    stories: int
    bytes: int
    tokens: int
    """Prediction targets: every token, and one end a story."""
    runtimes: dict[RuntimeName, Figures]
    skipped: dict[RuntimeName, str]
    """Runtimes that could not be asked, and why."""
    written: WrittenFigures | None
    """Figures of what the served model writes; None if it was not asked to."""

    @property
    def served(self) -> Figures:
        """Figures of the first runtime measured: what readers get, unless it was left out."""
        return next(iter(self.runtimes.values()))

    def as_dict(self) -> dict[str, Any]:
        """Plain values; the served runtime's figures stand at the top."""
        return {
            "model": self.model, "digest": self.digest, "data": list(self.data),
            "bits_per_byte": self.served.bits_per_byte, "loss": self.served.loss,
            "tokens": self.tokens, "bytes": self.bytes, "stories": self.stories,
            "runtimes": {
                name: {"bits_per_byte": figures.bits_per_byte, "loss": figures.loss}
                for name, figures in self.runtimes.items()
            },
            "skipped": dict(self.skipped),
            "written": dataclasses.asdict(self.written) if self.written else None,
        }  # fmt: skip


def evaluate(
    model: Path | None,
    data: Sequence[Path],
    *,
    runtimes: Sequence[RuntimeName] = RUNTIMES,
    limit: int | None = None,
    threads: int = 1,
    write: bool = False,
    progress: Progress = lambda name, stories: None,
) -> QualityReport:
    """Score the stories in `data` (JSON Lines or text, also .gz) with each of `runtimes`.

    Args:
        model: a model folder; None is the shipped one.
        limit: score the first so many stories only.
        write: also write 64 stories and measure those (`experiments.written`).
        progress: told of every few stories scored.

    Raises:
        InputError: no runtime, an unknown one, or a bad limit.
        MissingExtraError: only `torch` was asked for, and it is not installed.
        ModelError: only `native` was asked for, and it cannot be used.
        DataError: a file is unusable, or there is no story.
    """
    if not runtimes or set(runtimes) - set(RUNTIMES):
        raise InputError(
            "runtime", f"must be among {', '.join(RUNTIMES)}, got {', '.join(runtimes) or 'none'}"
        )
    if limit is not None and limit < 1:
        raise InputError("limit", f"must be at least 1, got {limit}")
    folder = ModelFolder.open(model or PRETRAINED)
    tokenizer = StoryTokenizer.load(folder.tokenizer)
    texts = []
    for story in islice(chain.from_iterable(map(read_stories, data)), limit):
        if not story.text:
            raise DataError(f"{story.path}, line {story.line}: the story is empty, and has no bits per byte")
        texts.append(story.text)
    if not texts:
        raise DataError("no file of stories was given to evaluate")
    sizes = [len(text.encode()) for text in texts]
    stories = [[tokenizer.end_id, *tokenizer.encode(text)] for text in texts]
    skipped: dict[RuntimeName, str] = {}
    if "torch" in runtimes and find_spec("torch") is None:
        missing = MissingExtraError("scoring with PyTorch", "train")
        if set(runtimes) == {"torch"}:
            raise missing
        skipped["torch"] = str(missing)
    if len(runtimes) > 1 and "native" in runtimes and (reason := why_not_native(folder.config, "int8")):
        skipped["native"] = f"the native runtime cannot be used: {reason}"
    measured: dict[RuntimeName, Figures] = {}
    for name in runtimes:
        if name not in skipped:
            score = _torch_scorer(folder) if name == "torch" else _embedded_scorer(folder, name, threads)
            measured[name] = _measure(score, stories, sizes, tokenizer.end_id, partial(progress, name))
    written = None
    if write:
        with load_engine(folder.path, threads=threads) as engine:
            written = figures(write_stories(engine))
    return QualityReport(
        str(folder.path), folder.digest, tuple(map(str, data)), len(stories), sum(sizes),
        sum(map(len, stories)), measured, skipped, written,
    )  # fmt: skip


Scorer = Callable[[list[list[int]]], Iterator[tuple[int, Logits]]]
"""Stories to (first place, logits (B, T, V)) pieces that cover the longest of them."""


def _embedded_scorer(folder: ModelFolder, name: str, threads: int) -> Scorer:
    if name == "native":
        return load_runtime(folder, slots=1, runtime="native").score
    return load_runtime(folder, slots=1, threads=threads, precision=name, runtime="onnx").score


def _torch_scorer(folder: ModelFolder) -> Scorer:
    import torch

    from model.checkpoint import load_network

    network = load_network(folder.path)

    def score(stories: list[list[int]]) -> Iterator[tuple[int, Logits]]:
        fed = np.zeros((len(stories), max(map(len, stories))), np.int64)
        for row, story in enumerate(stories):
            fed[row, : len(story)] = story
        with torch.no_grad():
            yield 0, network(torch.from_numpy(fed)).numpy()

    return score


def _measure(
    score: Scorer, stories: list[list[int]], sizes: list[int], end: int, done: Callable[[int], None]
) -> Figures:
    nats = np.zeros(len(stories))
    for batch in _batches(stories):
        targets = [[*stories[index][1:], end] for index in batch]
        for first, logits_BTV in score([stories[index] for index in batch]):
            for row, index in enumerate(batch):
                wanted = np.array(targets[row][first : first + logits_BTV.shape[1]], np.int64)
                if len(wanted):
                    nats[index] += _surprise(logits_BTV[row, : len(wanted)], wanted)
        done(len(batch))
    bits = nats / math.log(2)
    tokens = sum(map(len, stories))
    by_story = tuple(float(value) for value in bits / np.array(sizes))
    return Figures(float(bits.sum() / sum(sizes)), float(nats.sum() / tokens), by_story)


def _surprise(logits_TV: Logits, wanted_T: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Summed negative log-likelihood, in float64 where it is summed."""
    top = logits_TV.max(axis=1, keepdims=True)
    total = np.exp(logits_TV - top).sum(axis=1, dtype=np.float64)
    chosen = logits_TV[np.arange(len(wanted_T)), wanted_T] - top[:, 0]
    return float((np.log(total) - chosen).sum())


def _batches(stories: list[list[int]]) -> Iterator[list[int]]:
    """Indexes of stories of like length, so that padding is small."""
    batch: list[int] = []
    for index in sorted(range(len(stories)), key=lambda index: len(stories[index])):
        if batch and (len(batch) + 1) * len(stories[index]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
