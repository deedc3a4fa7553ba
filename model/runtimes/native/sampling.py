"""`SamplingRows` in C, for the logits that the native runtime leaves in memory: one call chooses for all rows.

The rules are those of `model.runtimes.sampling`, and so are the choices, but for draws that fall within about 1e-7 of
the border of two tokens (`csrc/sample.h` says why). As there, no row's token depends on its batch mates, and it needs
no random state.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from model.generation import SamplingParams
from model.runtimes.native.library import Draw, library
from model.runtimes.protocol import Flags, Logits, Tokens
from model.runtimes.sampling import check_sizes, scale_of, start_of

_BLOCK = 256


class NativeSampler:
    """Implements `model.runtimes.protocol.Sampler` over logits in memory."""

    def __init__(self, capacity: int, vocab_size: int, path_number: int) -> None:
        """Room for `capacity` rows, computed by a path of `model.runtimes.native.library.paths`.

        Raises `ValueError` as `SamplingRows` does, `ModelError` when the library is not built.
        """
        check_sizes(capacity, vocab_size)
        self._sample, self._number = library().story_sample, path_number
        self._vocab_size = vocab_size
        blocks = -(-vocab_size // _BLOCK)
        self._rows: dict[str, npt.NDArray[Any]] = {
            "scale": np.ones(capacity, np.float32),
            "penalty": np.ones(capacity, np.float32),
            "min_p": np.zeros(capacity, np.float64),
            "top_p": np.ones(capacity, np.float64),
            "top_k": np.full(capacity, vocab_size, np.int64),
            "start": np.zeros(capacity, np.uint64),
            "greedy": np.ones(capacity, np.uint8),
            "seen": np.zeros((capacity, vocab_size), np.uint8),
        }
        self._token = np.zeros(capacity, np.int64)
        self._scratch: dict[str, npt.NDArray[Any]] = {
            "levels": np.zeros(blocks * _BLOCK, np.float32),
            "weights": np.zeros(blocks * _BLOCK, np.float32),
            "keys": np.zeros(vocab_size + 8, np.uint64),
            "ends": np.zeros(vocab_size + 8, np.int64),
            "blocks": np.zeros(blocks, np.float64),
        }
        arrays = {**self._rows, **self._scratch, "token": self._token}
        self._draw = Draw(vocab=vocab_size, **{name: each.ctypes.data for name, each in arrays.items()})
        self._address = ctypes.addressof(self._draw)

    def set(self, row: int, sampling: SamplingParams, seen: Iterable[int] = ()) -> None:
        """See `SamplingRows.set`."""
        values = {
            "scale": scale_of(sampling.temperature),
            "penalty": sampling.repetition_penalty,
            "min_p": sampling.min_p,
            "top_p": sampling.top_p,
            "top_k": min(sampling.top_k, self._vocab_size) or self._vocab_size,
            "start": start_of(sampling.seed),
            "greedy": sampling.temperature == 0,
        }
        for name, value in values.items():
            self._rows[name][row] = value
        if sampling.repetition_penalty != 1:
            self._rows["seen"][row] = 0
            self._rows["seen"][row, list(seen)] = 1

    def move(self, source: int, target: int) -> None:
        """See `SamplingRows.move`."""
        if source != target:
            for each in self._rows.values():
                each[target] = each[source]

    def note(self, row: int, token: int) -> None:
        """See `SamplingRows.note`."""
        self._rows["seen"][row, token] = 1

    def sample(self, logits_BV: Logits, position_B: npt.NDArray[np.int64]) -> tuple[Tokens, Flags]:
        """See `SamplingRows.sample`. The tokens' array is written again by the next call.

        Raises `ValueError` for arrays that are not as the C code would read them.
        """
        rows = len(logits_BV)
        if logits_BV.shape != (rows, self._vocab_size) or rows > len(self._token) or len(position_B) != rows:
            raise ValueError(f"got logits of {logits_BV.shape} and {len(position_B)} positions")
        logits_BV = np.ascontiguousarray(logits_BV, np.float32)
        position_B = np.ascontiguousarray(position_B, np.int64)
        draw = self._draw
        draw.rows, draw.logits, draw.position = rows, logits_BV.ctypes.data, position_B.ctypes.data
        self._sample(self._number, self._address)
        token_B = self._token[:rows]
        usable_B = token_B >= 0
        np.maximum(
            token_B, 0, out=token_B
        )  # a token means nothing where the row is not usable, and still is one
        return token_B, usable_B
