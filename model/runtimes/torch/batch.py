"""The streams that decode together in PyTorch: rows of device memory, and the launches that advance them.

A step's memory and its recorded launches belong together (`Arena`), since a CUDA graph holds the addresses. They are
made before any stream joins: a capture runs its work several times, which would advance the states. An arena is used
by one batch at a time and by the next when that one is gone, so that a batch the engine gave up costs no new capture.

Shapes: B streams in the batch; the others as in `model.runtimes.torch.step`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.architecture.tokenizer import END_ID
from model.runtimes.protocol import Tokens
from model.runtimes.torch.graphs import Recorder, Work, bucket_sizes, cover
from model.runtimes.torch.prefill import TorchState
from model.runtimes.torch.step import StepBuffers, StepWeights, decode_step

PROBE_TOKENS = 4
"""Steps that are compared when launches are chosen."""


class Arena:
    """Memory for `room` streams with the launches over it."""

    def __init__(self, weights: StepWeights, room: int, recorder: Recorder) -> None:
        self.buffers = StepBuffers.make(weights.config, room, weights.device)
        self._weights, self._recorder = weights, recorder
        self._launches: dict[tuple[int, int], Work] = {}

    def record(self, launches: Sequence[tuple[int, int]]) -> None:
        """Record (first row, rows) launches. No stream may be in the arena."""
        for first, rows in launches:
            if (first, rows) not in self._launches:
                self._launches[first, rows] = self._recorder.record(self._work(first, rows))
        self.buffers.clear()

    def _work(self, first: int, rows: int) -> Work:
        weights, buffers = self._weights, self.buffers
        return lambda: decode_step(weights, buffers, first, rows)

    def launch(self, launches: Sequence[tuple[int, int]]) -> None:
        for launch in launches:
            self._launches[launch]()

    def probe(self, first: int, rows: int) -> Tensor | None:
        """The logits (steps, V), as bits, of one story in every row of a launch; None if rows differ."""
        self.buffers.clear()
        vocab = self.buffers.logits_BV.size(1)
        seen = []
        for position in range(PROBE_TOKENS):
            self.buffers.feed_2B[0].fill_(position * (vocab - 1) // (PROBE_TOKENS - 1))
            self.buffers.feed_2B[1].fill_(position)
            self.launch([(first, rows)])
            seen.append(self.buffers.logits_BV[first : first + rows].view(torch.int32).clone())
        self.buffers.clear()
        bits_SBV = torch.stack(seen)
        return bits_SBV[:, 0] if torch.equal(bits_SBV, bits_SBV[:, :1].expand_as(bits_SBV)) else None


def choose_sizes(arena: Arena, room: int) -> list[int]:
    """Numbers of rows at which a stream gets the same bits, in any row and at any of them: ascending.

    A matrix product of one row and one of many may be added up in another order (in MKL those of 1, 2 and 4 rows
    are), and so may the rows of one product. Of the sizes that agree, the set with the largest is taken; a single
    row always agrees with itself.
    """
    sizes = bucket_sizes(room)
    arena.record([(0, size) for size in sizes])
    even = {size: bits for size in sizes if (bits := arena.probe(0, size)) is not None}
    largest = even[max(even)]
    chosen = [size for size, bits in even.items() if torch.equal(bits, largest)]
    if chosen[-1] < room and chosen != [1]:  # several launches a step: where they begin must not show either
        launches = [(first, size) for size in chosen for first in range(0, room, chosen[-1])]
        arena.record(launches)
        probes = [arena.probe(*launch) for launch in launches]
        if not all(bits is not None and torch.equal(bits, largest) for bits in probes):
            return [1]
    return chosen


class TorchBatch:
    """Rows of `TorchState` in an arena."""

    def __init__(self, arena: Arena, sizes: Sequence[int], rows: int, empty: TorchState) -> None:
        """A batch of up to `rows` streams that is advanced by launches of `sizes` rows."""
        self.arena, self.rows, self.size = arena, rows, 0
        self._empty, self._sizes = empty, sizes
        self._position_B = np.zeros(arena.buffers.feed_2B.size(1), np.int64)
        # Written by the host and copied to the device as one, from memory that the device reads by itself.
        feed = torch.zeros_like(arena.buffers.feed_2B, device="cpu")
        self._feed = feed.pin_memory() if arena.buffers.feed_2B.is_cuda else feed
        self._fed_2B = self._feed.numpy()

    def __len__(self) -> int:
        return self.size

    def append(self, state: TorchState) -> int:
        row = self.size
        if row >= self.rows:
            raise IndexError(f"the batch holds at most {self.rows} streams")
        self.size += 1
        self.write(row, state)
        return row

    def write(self, row: int, state: TorchState) -> None:
        """Copy `state` over whatever stands in `row`."""
        buffers = self.arena.buffers
        self._position_B[row] = state.position
        buffers.conv_RBKM[:, row] = state.conv_RKM
        buffers.memory_RBHNP[:, row] = state.memory_RHNP
        buffers.ring_ABWP[:, row] = state.ring_AWP

    def _check(self, row: int) -> None:
        if not 0 <= row < self.size:
            raise IndexError(f"row must be below {self.size}, got {row}")

    def remove(self, row: int) -> None:
        self._check(row)
        self.size -= 1
        last = self.size
        if row != last:
            self._position_B[row] = self._position_B[last]
            buffers = self.arena.buffers
            for part in (buffers.conv_RBKM, buffers.memory_RBHNP, buffers.ring_ABWP):
                part[:, row] = part[:, last]

    def read(self, row: int) -> TorchState:
        self._check(row)
        buffers = self.arena.buffers
        return TorchState(
            int(self._position_B[row]),
            buffers.conv_RBKM[:, row].clone(),
            buffers.memory_RBHNP[:, row].clone(),
            buffers.ring_ABWP[:, row].clone(),
        )

    def advance(self, tokens: Tokens) -> Tensor:
        """Feed one token to each stream; the logits (B, V), on the device, until the next call.

        Raises `ValueError` if the tokens are not as many as the streams.
        """
        count = self.size
        if len(tokens) != count:
            raise ValueError(f"step needs one token for each of {count} streams, got {len(tokens)}")
        buffers = self.arena.buffers
        if count:
            for row in np.flatnonzero(tokens == END_ID):
                self.write(int(row), self._empty)  # a story starts
            self._fed_2B[0, :count] = tokens
            self._fed_2B[1, :count] = self._position_B[:count]
            # Waits for the copy: the host may write the next tokens while the device is still at work.
            buffers.feed_2B.copy_(self._feed)
            self.arena.launch(cover(count, self._sizes))
            self._position_B[:count] += 1
        return buffers.logits_BV[:count]
