"""The runtime for GPUs: the network in PyTorch, states and logits on the device, steps replayed as CUDA graphs.

It has the interface of the embedded runtimes and gives the same logits (held to it one by one). The same code runs on
the CPU, where nothing is captured: slower than the embedded runtimes there, but testable. `DeviceRuntime` also chooses
the tokens on the device, so that a step brings a few numbers over the bus, not the logits of all streams.

A stream's bits are the same whatever else is in the batch, as long as the processor and `max_batch` stay: which sizes
of matrix products agree is measured when a runtime is made (`choose_sizes`), and another `max_batch` may choose others.
The embedded runtimes give the same bits at every `max_batch`.

A step's memory and its recorded launches belong together (`Arena`), since a CUDA graph holds the addresses. They are
made before any stream joins: a capture runs its work several times, which would advance the states. An arena is used
by one batch at a time and by the next when that one is gone, so that a batch the engine gave up costs no new capture.

In fp32 only: half precision moves logits, and with a network of five million parameters a GPU should wait for launches,
not for arithmetic.

Shapes: B streams in the batch, S steps, V vocabulary; the states' as in `model.runtimes.torch.forward`.
"""

import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from model.architecture.folder import END_ID
from model.architecture.network import StoryNetwork, load_network
from model.architecture.tokenizer import TokenMasks
from model.errors import ModelError
from model.runtimes.protocol import Batch, FeedingRuntime, Logits, Tokens
from model.runtimes.sampling import SamplingRows
from model.runtimes.torch.forward import (
    CudaGraphs,
    NetworkWeights,
    Recorder,
    StepBuffers,
    TorchState,
    Work,
    bucket_sizes,
    cover,
    decode_step,
    eager,
    empty_state,
    exact_products,
    prefill_chunk,
)
from model.runtimes.torch.sampling import DeviceLogits, DeviceSampler

PROBE_TOKENS = 4
"""Steps that are compared when launches are chosen."""


class Arena:
    """Memory for `capacity` streams with the launches over it."""

    def __init__(self, weights: NetworkWeights, capacity: int, recorder: Recorder) -> None:
        self.buffers = StepBuffers.make(weights.config, capacity, weights.device)
        self._weights, self._recorder = weights, recorder
        self._launches: dict[tuple[int, int], Work] = {}

    def record(self, launches: Sequence[tuple[int, int]]) -> None:
        """Record (first row, rows) launches. No stream may be in the arena."""
        for first, rows in launches:
            if (first, rows) not in self._launches:
                work = partial(decode_step, self._weights, self.buffers, first, rows)
                self._launches[first, rows] = self._recorder(work)
        self.buffers.clear()

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


def choose_sizes(arena: Arena, capacity: int) -> list[int]:
    """Numbers of rows at which a stream gets the same bits, in any row and at any of them: ascending.

    A matrix product of one row and one of many may be added up in another order (in MKL those of 1, 2 and 4 rows
    are), and so may the rows of one product. Of the sizes that agree, the set with the largest is taken; a single
    row always agrees with itself.
    """
    sizes = bucket_sizes(capacity)
    arena.record([(0, size) for size in sizes])
    even = {size: bits for size in sizes if (bits := arena.probe(0, size)) is not None}
    largest = even[max(even)]
    chosen = [size for size, bits in even.items() if torch.equal(bits, largest)]
    if chosen[-1] < capacity and chosen != [1]:  # several launches a step: where they begin must not show either
        launches = [(first, size) for size in chosen for first in range(0, capacity, chosen[-1])]
        arena.record(launches)
        probes = [arena.probe(*launch) for launch in launches]
        if not all(bits is not None and torch.equal(bits, largest) for bits in probes):
            return [1]
    return chosen


class TorchBatch(Batch):
    """Rows of `TorchState` in an arena."""

    def __init__(self, arena: Arena, sizes: Sequence[int], rows: int, empty: TorchState) -> None:
        """A batch of up to `rows` streams that is advanced by launches of `sizes` rows."""
        super().__init__(rows)
        self.arena = arena
        self._empty, self._sizes = empty, sizes
        buffers = arena.buffers
        self._states = (buffers.conv_RBKM, buffers.memory_RBHNP, buffers.ring_ABWP)
        self._position_B = np.zeros(buffers.feed_2B.size(1), np.int64)
        # Written by the host and copied to the device as one, from memory that the device reads by itself.
        feed = torch.zeros_like(buffers.feed_2B, device="cpu")
        self._feed = feed.pin_memory() if buffers.feed_2B.is_cuda else feed
        self._fed_2B = self._feed.numpy()

    def write(self, row: int, state: TorchState) -> None:
        self._position_B[row] = state.position
        for part, value in zip(self._states, (state.conv_RKM, state.memory_RHNP, state.ring_AWP), strict=True):
            part[:, row] = value

    def copy_row(self, source: int, target: int) -> None:
        self._position_B[target] = self._position_B[source]
        for part in self._states:
            part[:, target] = part[:, source]

    def advance(self, tokens: Tokens) -> Tensor:
        """Feed one token to each stream; the logits (B, V), on the device, until the next call.

        Raises `ValueError` if the tokens are not as many as the streams.
        """
        count = self.check_tokens(tokens)
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


class TorchRuntime(FeedingRuntime):
    """Implements `model.runtimes.protocol.Runtime` over a network's weights.

    Args:
        network: copied to the device; may change or go afterwards.
        max_batch: most streams in one batch.
        device: `cpu`, or `cuda` for the first GPU that the process sees.
        recorder: what makes launches of steps; by default CUDA graphs on a GPU, and plain calls elsewhere.

    Raises:
        ModelError: the device is unknown or not there.
    """

    def __init__(
        self, network: StoryNetwork, *, max_batch: int = 16, device: str = "cpu", recorder: Recorder | None = None
    ) -> None:
        self.device = find_device(device)
        self.config, self.max_batch = network.config, max_batch
        self.vocab_size = network.config.vocab_size
        self.recorder: Recorder = recorder or (CudaGraphs() if device == "cuda" else eager)
        self.weights = NetworkWeights.of(network, self.device)
        self.empty = empty_state(self.config, self.device)
        self._capacity = bucket_sizes(max_batch)[-1]
        first = Arena(self.weights, self._capacity, self.recorder)
        self.sizes = choose_sizes(first, self._capacity)
        """Rows are computed in one of these numbers, with rows that nobody reads where streams are too few."""
        self._record(first)
        self._idle = [first]
        self.prefill([END_ID, 1])  # the first story must not wait for what libraries load on first use

    def _record(self, arena: Arena) -> None:
        """Record every launch that a batch can ask for: nothing is captured while stories are written."""
        counts = range(1, self.max_batch + 1)
        arena.record(sorted({launch for count in counts for launch in cover(count, self.sizes)}))

    @classmethod
    def load(cls, folder: Path, **options: Any) -> Self:
        """The runtime of a checkpoint or model folder; `options` as above. Raises `ModelError`."""
        return cls(load_network(folder), **options)

    def feed(self, fed: Tokens, state: TorchState, *, every: bool) -> tuple[Logits, TorchState]:
        """See `FeedingRuntime.feed`."""
        with exact_products():
            logits_TV, state = prefill_chunk(self.weights, torch.tensor(fed, device=self.device), state, every=every)
        return logits_TV.numpy(force=True), state

    def new_batch(self) -> TorchBatch:
        """See `Runtime.new_batch`: in the memory of a batch that is gone, if there is one."""
        if self._idle:
            arena = self._idle.pop()
        else:
            arena = Arena(self.weights, self._capacity, self.recorder)
            self._record(arena)
        batch = TorchBatch(arena, self.sizes, self.max_batch, self.empty)
        weakref.finalize(batch, self._idle.append, arena).atexit = False
        return batch

    def step(self, tokens: Tokens, batch: TorchBatch) -> Logits:
        """See `Runtime.step`; the returned array is reused by the next call."""
        logits: Logits = batch.advance(tokens).numpy(force=True)
        return logits


class DeviceRuntime(TorchRuntime):
    """Implements `model.runtimes.protocol.SamplingRuntime`: tokens are chosen where the logits are."""

    def step_in_place(self, tokens: Tokens, batch: TorchBatch) -> DeviceLogits:
        """See `SamplingRuntime.step_in_place`."""
        return DeviceLogits(batch.advance(tokens))

    def new_sampler(self, slots: int, masks: TokenMasks | None = None) -> DeviceSampler:
        """See `SamplingRuntime.new_sampler`."""
        return DeviceSampler(slots, self.vocab_size, self.device, self.recorder, masks)

    def new_host_sampler(self, slots: int, masks: TokenMasks | None = None) -> SamplingRows:
        """See `SamplingRuntime.new_host_sampler`."""
        return SamplingRows(slots, self.vocab_size, masks)


def find_device(name: str) -> torch.device:
    """`cpu` or `cuda`. Raises `ModelError` that says what is missing."""
    if name not in ("cpu", "cuda"):
        raise ModelError(f"device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"no GPU answers CUDA {built}" if built else f"torch {torch.__version__} is built without CUDA"
        raise ModelError(f"device cuda is not there: {reason}")
    # With its index: tensors say where they are by "cuda:0", and would not equal "cuda".
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")
