"""The embedded runtime over the exported graph: ONNX Runtime, on one core, without PyTorch.

It is fast at this size because it copies little. All streams live in a few arrays (one row a stream), the graph reads
and writes their first B rows in place (IO binding, one binding a batch size, made once), recurrent states alternate
between two arenas instead of being copied, and attention's ring of keys and values stands still: the graph returns the
newest row, which is written over the oldest.

A stream's bits must not depend on its batch mates. Which kernel a matrix product takes, and so in which order it sums,
may depend on the number of rows; `OnnxRuntime.tile` says how this is kept from showing.

Shapes: B streams in the batch, M most streams, T tokens, V vocabulary, W window, P values a head, R recurrent
layers, A attention layers.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.architecture.folder import END_ID, ModelConfig
from model.errors import ModelError
from model.runtimes.protocol import Batch, FeedingRuntime, Logits, Tokens

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort  # reads the variable above when it is loaded

PROBES = (1, 2, 3, 4, 6, 8)
"""Numbers of rows that are compared, when a graph is loaded, to see whether the batch size changes a row's bits."""
HIDDEN = np.float32(-1e9)
"""Added to attention scores of places that must not be seen."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class OnnxState:
    """One stream's memory: about half a megabyte, however long the story."""

    position: int
    """Tokens taken in since the story began."""
    conv: Floats
    """(R, K-1, M channels): the convolution's last inputs."""
    memory: Floats
    """(R, H, N, P): the recurrence."""
    ring: Floats
    """(2A, W, P): keys, then values, of each attention layer; a token stands at its position modulo W."""


class OnnxBatch(Batch):
    """Rows of `OnnxState`, laid out as the graph wants them."""

    def __init__(self, empty: OnnxState, rows: int, capacity: int) -> None:
        """Make a batch of up to `rows` streams, in arrays of `capacity` rows (a multiple of the runtime's tile)."""
        super().__init__(rows)
        self.position = np.zeros(capacity, np.int64)
        # Two arenas: a step reads one and writes the other.
        self.conv = [_arena(empty.conv, capacity) for _ in range(2)]
        self.memory = [_arena(empty.memory, capacity) for _ in range(2)]
        self.now = 0
        self.ring = _arena(empty.ring, capacity)
        self.bias = np.full((capacity, empty.ring.shape[1] + 1), HIDDEN, np.float32)
        self.bindings: dict[tuple[int, int], Any] = {}

    def write(self, row: int, state: OnnxState) -> None:
        self.position[row] = state.position
        self.conv[self.now][:, row] = state.conv
        self.memory[self.now][:, row] = state.memory
        self.ring[:, row] = state.ring
        self.bias[row] = HIDDEN
        self.bias[row, : state.position] = 0
        self.bias[row, -1] = 0  # the token itself

    def copy_row(self, source: int, target: int) -> None:
        for part in (self.conv[self.now], self.memory[self.now], self.ring):
            part[:, target] = part[:, source]
        self.position[target], self.bias[target] = self.position[source], self.bias[source]


def _arena(part: Floats, capacity: int) -> Floats:
    """Memory for `capacity` rows of one part of a state, behind its layers."""
    return np.zeros((len(part), capacity, *part.shape[1:]), np.float32)


class OnnxRuntime(FeedingRuntime):
    """Implements `model.runtimes.protocol.Runtime` over one exported graph.

    Args:
        path: the graph.
        config: the network's sizes.
        max_batch: most streams in one batch.
        threads: of ONNX Runtime; one is fastest unless a core is idle, and two on two busy cores are far slower.

    Raises:
        ModelError: the graph cannot be loaded.
    """

    def __init__(self, path: Path, config: ModelConfig, *, max_batch: int = 16, threads: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises many types of its own
            raise ModelError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from None
        self.name = "onnx " + path.name.removeprefix("decode.").removesuffix(".onnx")
        self.config, self.vocab_size, self.max_batch = config, config.vocab_size, max_batch
        self.recurrent = [layer for layer, kind in enumerate(config.pattern) if kind == "R"]
        self.attentive = [layer for layer, kind in enumerate(config.pattern) if kind == "A"]
        half = config.head_dim // 2
        self._frequency = config.rope_base ** (-np.arange(half, dtype=np.float64) / half)
        self._take_last = np.zeros(1, np.int64)
        self.empty = self._empty()
        self._allocate(max(PROBES))
        self.tile = self._find_tile()
        """Rows are computed in multiples of this number, with rows that nobody reads where streams are too few.
        One where a row's bits do not depend on how many rows there are, on this machine and for this graph."""
        self._allocate(-(-max_batch // self.tile) * self.tile)

    def _allocate(self, capacity: int) -> None:
        """The arrays, of `capacity` rows, that all batches share."""
        config = self.config
        self._capacity = capacity
        self._tokens = np.zeros((capacity, 1), np.int64)
        self._logits = np.zeros((capacity, config.vocab_size), np.float32)
        self._fresh = np.zeros((2 * len(self.attentive), capacity, config.head_dim), np.float32)
        self._cos = np.zeros((capacity, config.head_dim), np.float32)
        self._sin = np.zeros((capacity, config.head_dim), np.float32)
        self._rows = np.arange(capacity)

    def _find_tile(self) -> int:
        """The smallest number of rows at whose multiples a row's logits are the same bits.

        MLAS has kernels for one row and for more, and some sum in another order: int8 blocks of 128 under
        AVX-512 move a logit by up to 0.09 between one stream and two.
        """
        self.tile = 1
        tokens = np.arange(1, max(PROBES) + 1) % self.vocab_size
        seen: dict[int, Logits] = {}
        for rows in PROBES:
            batch = OnnxBatch(self.empty, rows, rows)
            for _ in range(rows):
                batch.append(self.empty)
            seen[rows] = self.step(tokens[:rows], batch).copy()

        def same(tile: int) -> bool:
            counts = [rows for rows in PROBES if rows % tile == 0]
            return all(np.array_equal(seen[rows], seen[max(PROBES)][:rows], equal_nan=True) for rows in counts)

        return next(tile for tile in (1, 2, 4, max(PROBES)) if same(tile))

    def _empty(self) -> OnnxState:
        config = self.config
        channels = 2 * config.heads * config.key_dim + config.heads * config.head_dim
        return OnnxState(
            0,
            np.zeros((len(self.recurrent), config.conv_width - 1, channels), np.float32),
            np.zeros((len(self.recurrent), config.heads, config.key_dim, config.head_dim), np.float32),
            np.zeros((2 * len(self.attentive), config.window, config.head_dim), np.float32),
        )

    def feed(self, fed: Tokens, state: OnnxState, *, every: bool) -> tuple[Logits, OnnxState]:
        """See `FeedingRuntime.feed`."""
        time, start = len(fed), state.position
        position = np.arange(start, start + time)
        feeds: dict[str, Any] = {"tokens": fed[None], "take": np.arange(0 if every else time - 1, time)}
        for index, layer in enumerate(self.recurrent):
            feeds[f"conv_{layer}"], feeds[f"memory_{layer}"] = state.conv[None, index], state.memory[None, index]
        if self.attentive:
            angle = np.tile(position[:, None] * self._frequency, 2)[None, :, None]
            feeds["cos"], feeds["sin"] = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
            feeds["bias"] = self._visible(start, time)[None, :, None]
        for index, layer in enumerate(self.attentive):
            feeds[f"keys_{layer}"] = state.ring[None, None, 2 * index]
            feeds[f"values_{layer}"] = state.ring[None, None, 2 * index + 1]
        names = [output.name for output in self.session.get_outputs()]
        out = dict(zip(names, self.session.run(names, feeds), strict=True))
        conv, memory, ring = state.conv.copy(), state.memory.copy(), state.ring.copy()
        for index, layer in enumerate(self.recurrent):
            conv[index], memory[index] = out[f"conv_{layer}_out"][0], out[f"memory_{layer}_out"][0]
        for index, layer in enumerate(self.attentive):
            ring[2 * index, position % self.config.window] = out[f"keys_{layer}_out"][0]
            ring[2 * index + 1, position % self.config.window] = out[f"values_{layer}_out"][0]
        return out["logits"][0], OnnxState(start + time, conv, memory, ring)

    def _visible(self, start: int, time: int) -> Floats:
        """(T, W + T): 0 where the query may look, first into the ring, then among the tokens fed with it."""
        window = self.config.window
        query = np.arange(start, start + time)[:, None]
        slot = np.arange(window)
        held = start - 1 - (start - 1 - slot) % window  # the position that each place of the ring holds
        key = np.concatenate([held, query[:, 0]])
        seen = (key >= 0) & (key <= query) & (key > query - window)
        return np.where(seen, np.float32(0), HIDDEN)

    def new_batch(self) -> OnnxBatch:
        return OnnxBatch(self.empty, self.max_batch, self._capacity)

    def step(self, tokens: Tokens, batch: OnnxBatch) -> Logits:
        """See `Runtime.step`; the returned array is reused by the next call."""
        count = batch.check_tokens(tokens)
        if not count:
            return self._logits[:0]
        self._tokens[:count, 0] = tokens
        if not self._tokens[:count].all():
            for row in np.flatnonzero(self._tokens[:count, 0] == END_ID):
                batch.write(int(row), self.empty)  # a story starts
        position, rows = batch.position[:count], self._rows[:count]
        if self.attentive:
            slot = position % self.config.window
            batch.bias[rows, slot] = HIDDEN  # once the ring is full, its oldest token is out of sight
            angle = position[:, None] * self._frequency
            half = angle.shape[1]
            self._cos[:count, :half] = self._cos[:count, half:] = np.cos(angle)
            self._sin[:count, :half] = self._sin[:count, half:] = np.sin(angle)
        key = (-(-count // self.tile) * self.tile, batch.now)
        binding = batch.bindings.get(key)
        if binding is None:
            binding = batch.bindings[key] = self._bind(batch, key[0])
        self.session.run_with_iobinding(binding)
        if self.attentive:
            batch.ring[:, rows, slot] = self._fresh[:, :count]
            batch.bias[rows, slot] = 0
        batch.now ^= 1
        position += 1
        return self._logits[:count]

    def _bind(self, batch: OnnxBatch, count: int) -> Any:
        """Tie the graph's inputs and outputs to the first `count` rows of the batch's arrays."""
        binding = self.session.io_binding()

        def tie(bind: Any, name: str, array: npt.NDArray[Any], *shape: int) -> None:
            bind(name, "cpu", 0, array.dtype, shape, array.ctypes.data)

        config = self.config
        tie(binding.bind_input, "tokens", self._tokens, count, 1)
        tie(binding.bind_input, "take", self._take_last, 1)
        tie(binding.bind_output, "logits", self._logits, count, 1, config.vocab_size)
        before, after = batch.now, batch.now ^ 1
        for index, layer in enumerate(self.recurrent):
            for name, arenas in (("conv", batch.conv), ("memory", batch.memory)):
                shape = (count, *arenas[0].shape[2:])
                tie(binding.bind_input, f"{name}_{layer}", arenas[before][index], *shape)
                tie(binding.bind_output, f"{name}_{layer}_out", arenas[after][index], *shape)
        if self.attentive:
            tie(binding.bind_input, "cos", self._cos, count, 1, 1, config.head_dim)
            tie(binding.bind_input, "sin", self._sin, count, 1, 1, config.head_dim)
            tie(binding.bind_input, "bias", batch.bias, count, 1, 1, config.window + 1)
        for index, layer in enumerate(self.attentive):
            for offset, name in enumerate(("keys", "values")):
                ring = batch.ring[2 * index + offset]
                tie(binding.bind_input, f"{name}_{layer}", ring, count, 1, config.window, config.head_dim)
                fresh = self._fresh[2 * index + offset]
                tie(binding.bind_output, f"{name}_{layer}_out", fresh, count, 1, config.head_dim)
        return binding
