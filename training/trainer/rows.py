"""Rows of whole stories, for training (packed, shuffled, endless, resumable at any row) and for validation.

A row starts at the start of a story and is filled with the one or two further whole stories that leave the least space
(best-fit packing after Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). A story longer than a row is
cut into row-long spans; its rest opens a row of its own. On TinyStories in rows of 512, 2 % of the places stay empty;
plain best fit, longest first, left 7 %. The n-th row depends on the seed alone.

Validation reads each story from its start, as in serving; its figures are exact sums over all targets, ends included,
in fp32.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from model.architecture.folder import END_ID
from model.architecture.network import StoryNetwork
from model.errors import DataError
from training.data.shards import TokenShard, batches_by_length
from training.trainer.parallel import Group

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


BATCH_TOKENS = 4096
SAMPLE_TEMPERATURE = 0.7


class Validation:
    """The first `stories` of a validation shard (0: all), sorted by length into batches of little padding.

    Raises `DataError` for a shard without stories.
    """

    def __init__(self, shard: TokenShard, tokenizer: Tokenizer, stories: int, group: Group) -> None:
        if len(shard) == 0:
            raise DataError(f"the {shard.split} shard holds no stories; `story data` makes one that does")
        self.stories = count = min(stories, len(shard)) if stories else len(shard)
        texts = tokenizer.decode_batch([shard.story(index)[1:].tolist() for index in range(count)])
        self.bytes = sum(len(text.encode()) for text in texts)
        self.tokens = int(shard.starts[count])
        self.shard, self.group = shard, group
        self._batches = batches_by_length(np.diff(shard.starts[: count + 1]).tolist(), BATCH_TOKENS)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the stories: (inputs, targets), both (B, T), padded by what does not count."""
        for batch in self._batches[self.group.rank :: self.group.size]:
            inputs, targets = self._padded(batch)
            yield torch.from_numpy(inputs), torch.from_numpy(targets)

    @torch.no_grad()
    def measure(self, network: StoryNetwork) -> tuple[float, float]:
        """(mean nats a token, bits per byte); each process takes its share of the batches."""
        device = network.embedding.weight.device
        nats = torch.zeros(1, dtype=torch.float64)
        for inputs_BT, targets_BT in self.batches():
            nats += float(network.loss_sum(inputs_BT.to(device), targets_BT.to(device)))
        total = float(self.group.sum(nats))
        return total / self.tokens, total / math.log(2) / self.bytes

    def _padded(self, batch: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        starts = self.shard.starts
        width = max(int(starts[story + 1] - starts[story]) for story in batch)
        inputs = np.full((len(batch), width), END_ID, np.int64)
        targets = np.full((len(batch), width), IGNORED, np.int64)
        for row, story in enumerate(batch):
            both = self.shard.tokens[starts[story] : starts[story + 1] + 1].astype(np.int64)
            inputs[row, : len(both) - 1], targets[row, : len(both) - 1] = both[:-1], both[1:]
        return inputs, targets


@torch.no_grad()
def write_samples(
    network: StoryNetwork, tokenizer: Tokenizer, prompts: tuple[str, ...], *, seed: int, max_tokens: int = 160
) -> tuple[tuple[str, str], ...]:
    """Continue each prompt at temperature 0.7 by the network's step form: (prompt, continuation) pairs.

    All are generated as one batch, each with its own generator.
    """
    device = network.embedding.weight.device
    streams = [[END_ID, *tokenizer.encode(prompt).ids] for prompt in prompts]
    given = [len(stream) for stream in streams]
    rng = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    state = network.initial_state(len(prompts))
    unfinished, position = set(range(len(prompts))) if max_tokens > 0 else set(), 0
    while unfinished:
        # A stream that has ended is fed ends of story; nobody looks at what comes of it.
        tokens = [stream[position] if position < len(stream) else END_ID for stream in streams]
        logits_BV, state = network.step(torch.tensor(tokens, device=device), state)
        position += 1
        for index in [index for index in unfinished if len(streams[index]) == position]:
            chances_V = (logits_BV[index].float().cpu() / SAMPLE_TEMPERATURE).softmax(0)
            token = int(torch.multinomial(chances_V, 1, generator=rng[index]))
            if token != END_ID:
                streams[index].append(token)
            if token == END_ID or len(streams[index]) - given[index] == max_tokens:
                unfinished.remove(index)
    written = [stream[length:] for stream, length in zip(streams, given, strict=True)]
    return tuple(zip(prompts, tokenizer.decode_batch(written), strict=True))
