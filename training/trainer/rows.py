"""Rows of whole stories for training: packed, shuffled, endless, and resumable at any row.

A row starts at the start of a story and is filled with the one or two further whole stories that leave the least space
(best-fit packing after Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). A story longer than a row is
cut into row-long spans; its rest opens a row of its own. On TinyStories in rows of 512, 2 % of the places stay empty;
plain best fit, longest first, left 7 %. The n-th row depends on the seed alone.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from model.errors import DataError
from training.data.shards import TokenShard

IGNORED = -1
"""Target that does not count."""
BLOCK = 4096
"""Stories shuffled and packed together; bounds memory and the work of a resume."""

Row = tuple[NDArray[np.int64], NDArray[np.int64]]
Span = tuple[int, int]
"""Start and stop in the shard's tokens."""


class RowStream:
    """An endless iterator of (inputs (T,), targets (T,)) rows over `shard`.

    Raises `DataError` for a shard without stories.
    """

    def __init__(self, shard: TokenShard, row_tokens: int, seed: int) -> None:
        if len(shard) == 0:
            raise DataError(f"the {shard.split} shard holds no stories; `story data` makes one that does")
        self.shard, self.row_tokens, self.seed = shard, row_tokens, seed
        self.epoch, self.block, self._next = 0, 0, 0
        self._order = self._shuffle(0)
        self._rows = self._pack(0)

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        while self._next >= len(self._rows):
            self.block += 1
            if self.block * BLOCK >= len(self.shard):
                self.epoch, self.block = self.epoch + 1, 0
                self._order = self._shuffle(self.epoch)
            self._rows, self._next = self._pack(self.block), 0
        spans = self._rows[self._next]
        self._next += 1
        inputs = np.zeros(self.row_tokens, np.int64)
        targets = np.full(self.row_tokens, IGNORED, np.int64)
        at = 0
        for start, stop in spans:
            length = stop - start
            # Reading one token further gives each input its target; the story's last target is its end.
            both = self.shard.tokens[start : stop + 1].astype(np.int64)
            inputs[at : at + length], targets[at : at + length] = both[:-1], both[1:]
            first, last = np.searchsorted(self.shard.masked, (start + 1, stop + 1))
            targets[at + self.shard.masked[first:last] - start - 1] = IGNORED
            at += length
        return inputs, targets

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "block": self.block, "next": self._next}

    def seek(self, state: dict[str, int]) -> None:
        self.epoch, self.block = state["epoch"], state["block"]
        self._order = self._shuffle(self.epoch)
        self._rows, self._next = self._pack(self.block), state["next"]

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.shard))

    def _pack(self, block: int) -> list[list[Span]]:
        """The rows of one block of the shuffled stories."""
        starts, limit = self.shard.starts, self.row_tokens
        rows: list[list[Span]] = []
        waiting: dict[int, list[Span]] = {}
        openers: list[Span | int] = []  # rests of cut stories, and the lengths of spans that begin a story
        for story in self._order[block * BLOCK : (block + 1) * BLOCK]:
            begin, end = int(starts[story]), int(starts[story + 1])
            for start in range(begin, end, limit):
                span = (start, min(start + limit, end))
                if start > begin:
                    openers.append(span)
                else:
                    openers.append(span[1] - span[0])
                    waiting.setdefault(span[1] - span[0], []).append(span)
        for opener in openers:  # in shuffled order; a length whose spans are used up has had its turn already
            if isinstance(opener, tuple):
                row = [opener]
            elif opener in waiting:
                row = [_take(waiting, opener)]
            else:
                continue
            space = limit - (row[0][1] - row[0][0])
            row.extend(_take(waiting, length) for length in _best_fill(waiting, space))
            rows.append(row)
        # Later rows hold what fitted nowhere earlier: shuffle, so that a batch is like any other.
        order = np.random.default_rng([self.seed, self.epoch, block, 1]).permutation(len(rows))
        return [rows[index] for index in order]


def _take(waiting: dict[int, list[Span]], length: int) -> Span:
    spans = waiting[length]
    span = spans.pop()
    if not spans:
        del waiting[length]
    return span


def _best_fill(waiting: dict[int, list[Span]], space: int) -> list[int]:
    """One or two waiting lengths whose sum comes closest to `space` without passing it."""
    for total in range(space, 0, -1):
        if total in waiting:
            return [total]
        for first in waiting:
            second = total - first
            if second >= first and second in waiting and (second > first or len(waiting[first]) > 1):
                return [first, second]
    return []


def batches_by_length(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indexes of sequences of like length, so that padding is small: at most `most` places, or one sequence."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= most:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
