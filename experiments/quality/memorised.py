"""Memorisation: the longest run of words that a generated story shares with a training story.

The generated stories are few, so their runs of `ANCHOR` words are indexed, and the training stories are streamed:
memory does not grow with the corpus. A run that is found is followed to its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.architecture.tokenizer import StoryTokenizer
from training.data.corpus import find_files, load_own_stories, read_stories, story_id
from training.data.shards import TokenShard

ANCHOR = 5
"""Shorter runs are not looked for: stories of one kind share them all."""
WORD = re.compile(r"[\w']+")


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


def longest_copies(written: Sequence[str], training: Iterable[str]) -> list[Copy]:
    """For each generated story, the longest run of at least `ANCHOR` words that a training story holds too."""
    stories = [words(text) for text in written]
    places: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for index, story in enumerate(stories):
        for start, run in enumerate(_runs(story)):
            places.setdefault(run, []).append((index, start))
    copies = [Copy(0, 0.0, "", "")] * len(stories)
    for text in training:
        other = words(text)
        for at, run in enumerate(_runs(other)):
            for index, start in places.get(run, ()):
                story, length = stories[index], ANCHOR
                if at and start and other[at - 1] == story[start - 1]:
                    continue  # the inside of a run that is followed from its start
                for ours, theirs in zip(story[start + ANCHOR :], other[at + ANCHOR :], strict=False):
                    if ours != theirs:
                        break
                    length += 1
                if length > copies[index].words:
                    copied = " ".join(story[start : start + length])
                    copies[index] = Copy(length, length / len(story), copied, story_id(text))
    return copies


def _runs(sequence: list[str]) -> Iterable[tuple[str, ...]]:
    return zip(*(sequence[offset:] for offset in range(ANCHOR)), strict=False)


def _is_shards(source: Path) -> bool:
    return (source / "train.bin").is_file()


def _of_shards(folder: Path) -> Iterator[str]:
    shard, tokenizer = TokenShard(folder, "train"), StoryTokenizer.load(folder)
    for index in range(len(shard)):
        yield tokenizer.decode(shard.story(index)[1:].tolist())
