"""The embedded runtime in C: int8 on one core, 2.5 to 4 times as fast as ONNX Runtime (experiments/LOG.md).

One call a step, for all streams. Each stream's memory is one row of one array, changed in place. Prefill, step and
scoring are the same C function over other rows, and a row's result depends neither on the other rows nor on the
processor: all paths do the same additions in the same order (`csrc/`).

Tokens are chosen from the logits that a step leaves in memory: one call more for all rows. The rules are those of
`model.runtimes.sampling`, and so are the choices, but for draws that fall within about 1e-7 of the border of two tokens
(`csrc/sample.h` says why). As there, no row's token depends on its batch mates, and it needs no random state.

Shapes: B streams in the batch, M most streams, T tokens, V vocabulary, S floats of a stream's memory.
"""

import ctypes
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.architecture.folder import ModelConfig, read_weights
from model.architecture.tokenizer import TokenMasks
from model.errors import ModelError
from model.runtimes.native.library import Draw, Floats, Matrix, PackedNetwork, Work, library, paths
from model.runtimes.protocol import Batch, FeedingRuntime, Flags, Logits, Tokens
from model.runtimes.sampling import RowTable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NativeState:
    """One stream's memory: about 400 KB, however long the story."""

    position: int
    """Tokens taken in since the story began."""
    memory: Floats
    """(S,): layer by layer, convolution and recurrence, or attention's keys and values."""


class NativeBatch(Batch):
    """Rows of `NativeState`, as the decoder reads them."""

    def __init__(self, runtime: "NativeRuntime", rows: int) -> None:
        super().__init__(rows)
        self.memory = np.zeros((rows, runtime.packed.memory), np.float32)
        self.position = np.zeros(rows, np.int64)
        self.work = runtime.work_on(self.memory, self.position)

    def write(self, row: int, state: NativeState) -> None:
        self.position[row], self.memory[row] = state.position, state.memory

    def copy_row(self, source: int, target: int) -> None:
        self.position[target], self.memory[target] = self.position[source], self.memory[source]


class NativeRuntime(FeedingRuntime):
    """Implements `model.runtimes.protocol.SamplingRuntime` over the weights of a model folder.

    Args:
        path: the folder's `model.safetensors`.
        config: the network's sizes.
        max_batch: most streams in one batch.
        path_name: a path of `model.runtimes.native.library.paths`; None takes the best that proves right here.

    Raises:
        ModelError: the library is not built, the weights are unusable, or the sizes are none that it can run.
    """

    def __init__(self, path: Path, config: ModelConfig, *, max_batch: int = 16, path_name: str | None = None) -> None:
        available = paths()
        if path_name is not None and path_name not in available:
            raise ModelError(f"path must be one of {', '.join(available)} on this machine, got {path_name!r}")
        self.config, self.vocab_size, self.max_batch = config, config.vocab_size, max_batch
        self._library = library()
        self.packed = PackedNetwork(config, read_weights(path), str(path))
        sizes = (self._library.story_scratch(number, self.packed.address) for number in available.values())
        self._scratch = _aligned(max(sizes))
        self._slot, self._token = np.arange(max_batch), np.zeros(max_batch, np.int64)
        self._take = np.ones(max_batch, np.int64)
        self._logits = np.zeros((max_batch, self.vocab_size), np.float32)
        self.path = path_name or self._best_path(available)
        self.name = f"native int8 {self.path}"
        self._number = available[self.path]
        self.empty = NativeState(0, np.zeros(self.packed.memory, np.float32))

    def _best_path(self, available: dict[str, int]) -> str:
        """The first path whose products have the bits of the plain one's.

        So a processor that is other than it says, or a compiler that errs, costs speed and not sense.
        """
        rng = np.random.default_rng(0)
        layer = self.packed.layers[0]
        trials = []
        for matrix, rows in ((layer.up, 1), (layer.up, 15), (layer.down, 2), (layer.down, 3)):
            x = rng.standard_normal((rows, matrix.inputs)).astype(np.float32)
            trials.append((matrix, np.abs(x) if matrix.positive_inputs else x))
        *faster, plain = available
        for name in faster:
            if all(
                np.array_equal(self.product(matrix, x, name), self.product(matrix, x, plain)) for matrix, x in trials
            ):
                return name
            log.warning("the native path %s computes wrongly on this machine and is not used", name)
        return plain

    def product(self, matrix: Matrix, x: Floats, path_name: str) -> Floats:
        """x (rows, inputs) times a packed matrix, by one path: (rows, outputs)."""
        x = np.ascontiguousarray(x, np.float32)
        out = np.empty((len(x), matrix.outputs), np.float32)
        self._library.story_product(
            paths()[path_name],
            self.packed.address,
            ctypes.addressof(matrix),
            x.ctypes.data,
            len(x),
            self._scratch.ctypes.data,
            out.ctypes.data,
        )
        return out

    def work_on(self, memory: Floats, position: Tokens) -> Work:
        """A record that feeds `self._token` to the slots 0, 1, 2 … of `memory`, and takes all logits."""
        return self._work(self._slot, self._token, self._take, memory, position, self._logits)

    def _work(self, *arrays: npt.NDArray[Any]) -> Work:
        """A record of the arrays `slot`, `token`, `take`, `memory`, `position` and `logits`, which must outlive it."""
        return Work(len(arrays[1]), *(array.ctypes.data for array in (*arrays, self._scratch)))

    def _run(self, work: Work) -> None:
        if self._library.story_forward(self._number, self.packed.address, ctypes.addressof(work)):
            raise ValueError(f"tokens must be between 0 and {self.vocab_size - 1}")

    def feed(self, fed: Tokens, state: NativeState, *, every: bool) -> tuple[Logits, NativeState]:
        """See `FeedingRuntime.feed`."""
        memory, position = state.memory.copy(), np.array([state.position])
        take, slot = np.full(len(fed), every, np.int64), np.zeros(len(fed), np.int64)
        take[-1] = 1
        logits = np.empty((int(take.sum()), self.vocab_size), np.float32)
        self._run(self._work(slot, fed, take, memory, position, logits))
        return logits, NativeState(int(position[0]), memory)

    def new_batch(self) -> NativeBatch:
        return NativeBatch(self, self.max_batch)

    def step(self, tokens: Tokens, batch: NativeBatch) -> Logits:
        """See `Runtime.step`; the returned array is reused by the next call."""
        count = batch.check_tokens(tokens)
        self._token[:count] = tokens
        batch.work.rows = count
        self._run(batch.work)
        return self._logits[:count]

    step_in_place = step  # where the logits are, the sampler reads them

    def new_sampler(self, slots: int, masks: TokenMasks | None = None) -> "NativeSampler":
        """See `SamplingRuntime.new_sampler`."""
        return NativeSampler(slots, self.vocab_size, self._number, masks)

    new_host_sampler = new_sampler


def _aligned(size: int) -> npt.NDArray[Any]:
    """`size` bytes that begin at a multiple of 64."""
    data = np.zeros(size + 64, np.uint8)
    return data[-data.ctypes.data % 64 :][:size]


_BLOCK = 256


class NativeSampler(RowTable):
    """Implements `model.runtimes.protocol.Sampler` over logits in memory."""

    def __init__(self, capacity: int, vocab_size: int, path_number: int, masks: TokenMasks | None = None) -> None:
        """Make `capacity` rows, computed by a path of `model.runtimes.native.library.paths`.

        Raises `ValueError` as `RowTable` does, `ModelError` when the library is not built.
        """
        super().__init__(capacity, vocab_size, masks)
        self._sample, self._number = library().story_sample, path_number
        blocks = -(-vocab_size // _BLOCK)
        self._token = np.zeros(capacity, np.int64)
        self._arrays = {  # kept alive: the record below holds their addresses
            **{name: column for name, column in self.columns.items() if name != "unfiltered"},
            "forbidden": self.masks.forbidden_SV,
            "seen": self.seen_BV,
            "bias": self.bias_BV,
            "deduction": self.deduction_BV,
            "token": self._token,
            "levels": np.zeros(blocks * _BLOCK, np.float32),
            "weights": np.zeros(blocks * _BLOCK, np.float32),
            "keys": np.zeros(vocab_size + 8, np.uint64),
            "ends": np.zeros(vocab_size + 8, np.int64),
            "blocks": np.zeros(blocks, np.float64),
        }
        pointers = {name: each.ctypes.data for name, each in self._arrays.items()}
        self._draw = Draw(vocab=vocab_size, **pointers)
        self._address = ctypes.addressof(self._draw)

    def sample(self, logits_BV: Logits, position_B: Tokens) -> tuple[Tokens, Flags]:
        """See `Sampler.sample`. Raises `ValueError` for arrays that are not as the C code would read them."""
        rows = len(logits_BV)
        if logits_BV.shape != (rows, self.vocab_size) or rows > len(self._token) or len(position_B) != rows:
            raise ValueError(f"got logits of {logits_BV.shape} and {len(position_B)} positions")
        logits_BV = np.ascontiguousarray(logits_BV, np.float32)
        position_B = np.ascontiguousarray(position_B, np.int64)
        draw = self._draw
        draw.rows, draw.logits, draw.position = rows, logits_BV.ctypes.data, position_B.ctypes.data
        self._sample(self._number, self._address)
        token_B = self._token[:rows]
        usable_B = token_B >= 0
        np.maximum(token_B, 0, out=token_B)  # means nothing where the row is not usable, and still is a token
        return token_B, usable_B
