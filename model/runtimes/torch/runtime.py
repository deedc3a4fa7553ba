"""The GPU's runtime: the network in PyTorch, states and logits resident on the device, steps replayed as CUDA graphs.

It stands behind the same seam as the embedded runtime and gives the same logits (held to it one by one). The same
code runs on the CPU, where nothing is captured: slower than the embedded runtime there, but testable.
`DeviceRuntime` also chooses the tokens on the device, so that a step brings a few numbers over the bus, not the
logits of all streams.

A stream's bits are the same whatever else is in the batch, as long as the processor and `max_batch` stay: which sizes
of matrix products agree is measured when a runtime is made (`torch_batch.choose_sizes`), and another `max_batch` may
choose others. The embedded runtimes give the same bits at every `max_batch`.

In fp32 only: half precision moves logits, and what a GPU waits for with a network of five million parameters should be
launches, not numbers.

Shapes: B streams in the batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from model.architecture.checkpoint import load_network
from model.architecture.network import StoryNetwork
from model.architecture.tokenizer import END_ID
from model.errors import ModelError
from model.runtimes.protocol import Logits, Tokens
from model.runtimes.sampling import SamplingRows
from model.runtimes.torch.batch import Arena, TorchBatch, choose_sizes
from model.runtimes.torch.graphs import CudaGraphs, Eager, Recorder, bucket_sizes, cover, exact_products
from model.runtimes.torch.prefill import TorchState, empty_state, prefill_piece
from model.runtimes.torch.sampling import DeviceLogits, DeviceSampler
from model.runtimes.torch.step import StepWeights

PREFILL_CHUNK = 64
"""Longest run of tokens in one call; longer prompts are taken in pieces of this size."""


class TorchRuntime:
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
        self,
        network: StoryNetwork,
        *,
        max_batch: int = 16,
        device: str = "cpu",
        recorder: Recorder | None = None,
    ) -> None:
        self.device = find_device(device)
        self.config, self.max_batch = network.config, max_batch
        self.vocab_size = network.config.vocab_size
        self.recorder: Recorder = recorder or (CudaGraphs() if device == "cuda" else Eager())
        self.weights = StepWeights.of(network, self.device)
        self.empty = empty_state(self.config, self.device)
        self._room = bucket_sizes(max_batch)[-1]
        first = Arena(self.weights, self._room, self.recorder)
        self.sizes = choose_sizes(first, self._room)
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

    def prefill(self, tokens: Sequence[int], state: TorchState | None = None) -> tuple[Logits, TorchState]:
        """See `Runtime.prefill`. Long prompts are taken in fixed pieces, so that the result never varies."""
        if not len(tokens):
            raise ValueError("prefill needs at least one token")
        fed = np.asarray(tokens, np.int64)
        if len(ends := np.flatnonzero(fed == END_ID)):
            # A story starts here, and with it the network forgets all that was before.
            fed, state = fed[ends[-1] :], None
        state = state or self.empty
        fed_T = torch.from_numpy(fed.copy()).to(self.device)
        with exact_products():
            for piece_T in fed_T.split(PREFILL_CHUNK):
                logits_V, state = prefill_piece(self.weights, piece_T, state)
        return logits_V.numpy(force=True), state

    def new_batch(self) -> TorchBatch:
        """See `Runtime.new_batch`: in the memory of a batch that is gone, if there is one."""
        if self._idle:
            arena = self._idle.pop()
        else:
            arena = Arena(self.weights, self._room, self.recorder)
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

    def new_sampler(self, slots: int) -> DeviceSampler:
        """See `SamplingRuntime.new_sampler`."""
        return DeviceSampler(slots, self.vocab_size, self.device, self.recorder)

    def new_host_sampler(self, slots: int) -> SamplingRows:
        """See `SamplingRuntime.new_host_sampler`."""
        return SamplingRows(slots, self.vocab_size)


def find_device(name: str) -> torch.device:
    """`cpu` or `cuda`. Raises `ModelError` that says what is missing."""
    if name not in ("cpu", "cuda"):
        raise ModelError(f"device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        reason = (
            f"no GPU answers CUDA {built}" if built else f"torch {torch.__version__} is built without CUDA"
        )
        raise ModelError(f"device cuda is not there: {reason}")
    # With its index: tensors say where they are by "cuda:0", and would not equal "cuda".
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")
