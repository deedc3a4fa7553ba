"""Memorisation: the longest run of words that a generated story shares with a training story.

The generated stories are few, so they are indexed, and the training stories are streamed block by block: memory does
not grow with the corpus. Runs of `ANCHOR` words are looked up by a hash, compared word by word, and followed to their
end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.architecture.tokenizer import StoryTokenizer
from training.data.corpus import find_files, load_own_stories, read_stories, story_id
from training.data.shards import TokenShard

ANCHOR = 5
"""Shorter runs are not looked for: stories of one kind share them all."""
BLOCK_WORDS = 100_000
WORD = re.compile(r"[\w']+")
OTHER, END = 0, -1
"""Stand for a word that no generated story uses, and for the gap between generated stories."""

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


@dataclass(frozen=True, slots=True)
class TrainingTexts:
    """The stories a model was trained on: read one at a time, as often as needed, always in the same order."""

    sources: tuple[Path, ...]
    """Files or folders of stories, or folders of shards; empty: the training part of our own corpus."""

    @classmethod
    def of(cls, sources: Sequence[Path]) -> TrainingTexts:
        """Check that each source is there. Raises `DataError` that names it."""
        for source in sources:
            if _is_shards(source):
                TokenShard(source, "train")
            else:
                find_files([source])
        return cls(tuple(sources))

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources) or "our own corpus"

    def __iter__(self) -> Iterator[str]:
        if not self.sources:
            yield from (story.text for story in load_own_stories("train"))
        for source in self.sources:
            if _is_shards(source):
                yield from _of_shards(source)
            else:
                for path in find_files([source]):
                    yield from (story.text for story in read_stories(path))


@dataclass(frozen=True, slots=True)
class Copy:
    """The longest run that a generated story and some training story share."""

    words: int
    """0: none of at least `ANCHOR` words."""
    share: float
    """Of the story's words."""
    text: str
    """Its words, in lower case."""
    story: str
    """Id of the training story; of several, any."""


class _Index:
    """All generated stories in one row of word numbers, and the hashes of their runs, sorted."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [words(text) for text in texts]
        self.numbers: dict[str, int] = {}
        row, owner = [END], [END]
        for index, text in enumerate(self.texts):
            row += [self.numbers.setdefault(word, len(self.numbers) + 1) for word in text] + [END]
            owner += [index] * len(text) + [END]
        self.row, self.owner = np.array(row, np.int64), np.array(owner, np.int64)
        places, hashes = _runs(self.row)
        order = np.argsort(hashes)
        self.places, self.hashes = places[order], hashes[order]
        self.longest = np.zeros(len(texts), np.int64)
        self.found: dict[int, tuple[int, str]] = {}

    def compare(self, block: list[list[str]], ids: list[str]) -> None:
        """Look for longer runs in some training stories, given as words."""
        row, owner = [OTHER], [END]
        for index, text in enumerate(block):
            row += [self.numbers.get(word, OTHER) for word in text] + [OTHER]
            owner += [index] * len(text) + [END]
        other, whose = np.array(row, np.int64), np.array(owner, np.int64)
        places, hashes = _runs(other)
        first = np.searchsorted(self.hashes, hashes, "left")
        count = np.searchsorted(self.hashes, hashes, "right") - first
        theirs = np.repeat(places, count)
        # The k-th of a place's matches stands k behind the first one in the sorted hashes.
        step = np.arange(len(theirs)) - np.repeat(np.cumsum(count) - count, count)
        ours = self.places[np.repeat(first, count) + step]
        # What also agrees one word before is the inside of a run that is followed from its start.
        opens = self.row[ours - 1] != other[theirs - 1]
        ours, theirs = ours[opens], theirs[opens]
        length = 0
        while len(ours):
            agree = self.row[ours + length] == other[theirs + length]
            ours, theirs = ours[agree], theirs[agree]
            length += 1
            if length >= ANCHOR:
                stories, one = np.unique(self.owner[ours], return_index=True)
                longer = length > self.longest[stories]
                self.longest[stories[longer]] = length
                for story, pair in zip(stories[longer], one[longer], strict=True):
                    self.found[int(story)] = (int(ours[pair]), ids[int(whose[theirs[pair]])])

    def copies(self) -> list[Copy]:
        result = []
        for index, text in enumerate(self.texts):
            length = int(self.longest[index])
            if not length:
                result.append(Copy(0, 0.0, "", ""))
                continue
            place, story = self.found[index]
            start = place - int(np.flatnonzero(self.owner == index)[0])
            result.append(Copy(length, length / len(text), " ".join(text[start : start + length]), story))
        return result


def longest_copies(written: Sequence[str], training: Iterable[str]) -> list[Copy]:
    """For each generated story, the longest run of at least `ANCHOR` words that a training story holds too."""
    index = _Index(written)
    for texts in _blocks(training):
        index.compare([words(text) for text in texts], [story_id(text) for text in texts])
    return index.copies()


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text) // 5  # letters of a word, about
        if size >= BLOCK_WORDS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _runs(row: Ints) -> tuple[Ints, Hashes]:
    """(places, hashes) of the runs of `ANCHOR` words that hold a known word at every place."""
    count = len(row) - ANCHOR + 1
    if count < 1:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    whole = np.ones(count, bool)
    for offset in range(ANCHOR):
        part = row[offset : offset + count]
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + part.astype(np.uint64)
        whole &= part > 0
    places = np.flatnonzero(whole)
    return places, hashes[places]


def _is_shards(source: Path) -> bool:
    return (source / "train.bin").is_file()


def _of_shards(folder: Path) -> Iterator[str]:
    shard, tokenizer = TokenShard(folder, "train"), StoryTokenizer.load(folder)
    for index in range(len(shard)):
        yield tokenizer.decode(shard.story(index)[1:].tolist())
