"""The stories a model was trained on, for what needs them: the floor's counts, and the search for copies.

They are read from files of stories or from folders of token shards, one at a time, so that a corpus larger than the
memory can be searched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.architecture.tokenizer import StoryTokenizer
from training.data.corpus import find_files, load_own_stories, read_stories
from training.data.shards import TokenShard


@dataclass(frozen=True, slots=True)
class TrainingTexts:
    """Stories that can be read again and again, always in the same order."""

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
        """What to call them in a report: names of files, without their folders."""
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


def _is_shards(source: Path) -> bool:
    return (source / "train.bin").is_file()


def _of_shards(folder: Path) -> Iterator[str]:
    shard, tokenizer = TokenShard(folder, "train"), StoryTokenizer.load(folder)
    for index in range(len(shard)):
        yield tokenizer.decode(shard.story(index)[1:].tolist())
