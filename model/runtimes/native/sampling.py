"""`SamplingRows` in C, for the logits that the native runtime leaves in memory: one call chooses for all rows.

The rules are those of `model.runtimes.sampling`, and so are the choices, but for draws that fall within about 1e-7 of
the border of two tokens (`csrc/sample.h` says why). As there, no row's token depends on its batch mates, and it needs
no random state.
"""

from __future__ import annotations

import ctypes

import numpy as np

from model.architecture.characters import TokenMasks
from model.runtimes.native.library import Draw, library
from model.runtimes.protocol import Flags, Logits, Tokens
from model.runtimes.sampling import RowTable

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
