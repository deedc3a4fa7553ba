"""`SamplingRows` on the device: the same settings, filters and random numbers, as one fixed sequence of operations.

Made to be captured: shapes do not depend on what the logits hold, and the host is asked for nothing. So every row is
sorted whole: work for a GPU, and on one core 6 to 19 times that of `SamplingRows` (1 and 64 rows of 4,096). What
crosses the bus is three integers a row there and two back, and settings when a row joins or leaves.

Given the same logits, a row gets the token that `SamplingRows` gives it, but for the last bit of two float
operations: the exponential, which each library rounds in its own way, and the mass of a row without min-p and top-k,
which `SamplingRows` adds in floating point and this one in integers. A draw within about 1e-7 of the border of two
tokens may fall on the other side. Greedy choices, filters by rank and random numbers are equal to the last bit, and
as there, no row's token depends on its batch mates.

Shapes: B rows (streams), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.generation import SamplingParams
from model.runtimes.protocol import Flags, Logits, Tokens
from model.runtimes.sampling import GOLDEN, MIX_A, MIX_B, WEIGHT_ONE, RowSettings, check_sizes
from model.runtimes.torch.graphs import Recorder, bucket_sizes


def _signed(constant: np.uint64) -> int:
    """The whole number of 64 bits as PyTorch's int64 holds it."""
    return int(constant.astype(np.int64))


def _shifted(z: Tensor, by: int) -> Tensor:
    """A right shift that brings in zeros; that of int64 brings in the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def uniform(start_B: Tensor, position_B: Tensor) -> Tensor:
    """`model.runtimes.sampling.uniform` bit for bit: int64 products wrap as unsigned ones do."""
    z = start_B + position_B * _signed(GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(MIX_A)
    z = (z ^ _shifted(z, 27)) * _signed(MIX_B)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 11).double() * 2.0**-53


class DeviceLogits:
    """The logits (B, V) of a step, on the device until the next step; a row comes to the host when asked for."""

    def __init__(self, logits_BV: Tensor) -> None:
        self.tensor_BV = logits_BV

    def __len__(self) -> int:
        return len(self.tensor_BV)

    def __getitem__(self, row: int) -> Logits:
        logits_V: Logits = self.tensor_BV[row].numpy(force=True)
        return logits_V


class _Settings(NamedTuple):
    """`RowSettings` of all rows: one on the host, where rows are set, and one on the device, where they are read."""

    scale_B: Tensor
    penalty_B: Tensor
    min_p_B: Tensor
    top_p_B: Tensor
    top_k_B: Tensor
    start_B: Tensor
    greedy_B: Tensor
    unfiltered_B: Tensor

    @classmethod
    def make(cls, allocated: int, vocab: int, device: torch.device) -> _Settings:
        """Rows that nobody has set are greedy, which is never wrong for rows that nobody reads."""
        full = partial(torch.full, (allocated,), device=device)
        ones, zeros = full(1.0, dtype=torch.float32), full(0.0, dtype=torch.float32)
        top_p, start = full(1.0, dtype=torch.float64), full(0, dtype=torch.int64)
        greedy, unfiltered = full(True, dtype=torch.bool), full(False, dtype=torch.bool)
        return cls(ones, ones.clone(), zeros, top_p, full(vocab, dtype=torch.int64), start, greedy, unfiltered)


class DeviceSampler:
    """Implements `model.runtimes.protocol.Sampler` over `DeviceLogits`."""

    def __init__(self, capacity: int, vocab_size: int, device: torch.device, recorder: Recorder) -> None:
        """Make `capacity` rows. Raises `ValueError` as `SamplingRows` does."""
        check_sizes(capacity, vocab_size)
        self._vocab_size = vocab_size
        sizes = bucket_sizes(capacity)
        allocated = sizes[-1]
        pinned = device.type == "cuda"

        def on_host(tensor: Tensor) -> Tensor:
            return tensor.pin_memory() if pinned else tensor

        self._host = _Settings.make(allocated, vocab_size, torch.device("cpu"))
        self._settings = _Settings.make(allocated, vocab_size, device)
        self._changed = False
        self._penalised = np.zeros(allocated, np.bool_)
        self._logits_BV = torch.zeros(allocated, vocab_size, device=device)
        self._seen_BV = torch.zeros(allocated, vocab_size, dtype=torch.bool, device=device)
        # Of each row: the place of the token to be chosen, a token that has joined the story, and whether one has.
        self._news_host = on_host(torch.zeros(3, allocated, dtype=torch.int64))
        self._news_3B = torch.zeros(3, allocated, dtype=torch.int64, device=device)
        self._news = self._news_host.numpy()
        # Back: the chosen token, and whether the row was usable.
        self._chosen_host = on_host(torch.zeros(2, allocated, dtype=torch.int64))
        self._chosen_2B = torch.zeros(2, allocated, dtype=torch.int64, device=device)
        self._place_V = torch.arange(vocab_size, device=device)
        self._launches = {size: recorder.record(partial(self._choose, size)) for size in sizes}

    def set(self, row: int, sampling: SamplingParams, seen: Iterable[int] = ()) -> None:
        """See `Sampler.set`."""
        settings = RowSettings.of(sampling, self._vocab_size)
        values = {**settings._asdict(), "start": _signed(settings.start)}
        for part, value in zip(self._host, values.values(), strict=True):
            part[row] = value
        self._changed = True
        self._news[2, row] = 0
        self._penalised[row] = settings.penalty != 1
        if self._penalised[row]:
            self._seen_BV[row] = False
            if ids := list(seen):
                self._seen_BV[row, torch.tensor(ids, device=self._seen_BV.device)] = True

    def move(self, source: int, target: int) -> None:
        """See `Sampler.move`."""
        if source == target:
            return
        for part in self._host:
            part[target] = part[source]
        self._changed = True
        self._news[1:, target] = self._news[1:, source]
        self._news[2, source] = 0
        self._penalised[target] = self._penalised[source]
        if self._penalised[source]:
            self._seen_BV[target] = self._seen_BV[source]

    def note(self, row: int, token: int) -> None:
        """See `Sampler.note`. The last recorded token goes to the device with the next step."""
        if self._penalised[row]:
            if self._news[2, row]:
                self._seen_BV[row, int(self._news[1, row])] = True
            self._news[1:, row] = token, 1

    def sample(self, logits_BV: DeviceLogits, position_B: Tokens) -> tuple[Tokens, Flags]:
        """See `Sampler.sample`."""
        rows = len(logits_BV)
        size = next(size for size in self._launches if size >= rows)
        if self._changed:
            for here, there in zip(self._host, self._settings, strict=True):
                there.copy_(here)
            self._changed = False
        self._news[0, :rows] = position_B
        # Not waited for: the host writes these numbers again only after it has read what comes of them.
        self._news_3B.copy_(self._news_host, non_blocking=True)
        self._logits_BV[:rows].copy_(logits_BV.tensor_BV)
        self._launches[size]()
        self._chosen_host.copy_(self._chosen_2B)
        self._news[2, :rows] = 0
        chosen_2B = self._chosen_host.numpy()[:, :rows].copy()
        return chosen_2B[0], chosen_2B[1] != 0

    @torch.no_grad()
    def _choose(self, rows: int) -> None:
        """Choose for the first `rows` rows, from the buffers and into them."""
        settings = self._settings
        position_B, noted_B, news_B = self._news_3B[:, :rows].unbind(0)
        scale_B, penalty_B, min_p_B, top_p_B, top_k_B, start_B, greedy_B, unfiltered_B = (
            part[:rows] for part in settings
        )
        seen_BV = self._seen_BV[:rows]
        noted_B1 = noted_B[:, None]
        seen_BV.scatter_(1, noted_B1, seen_BV.gather(1, noted_B1) | (news_B != 0)[:, None])
        scaled_BV = self._logits_BV[:rows] * scale_B[:, None]
        penalty_B1 = penalty_B[:, None]
        penalised_BV = torch.where(scaled_BV > 0, scaled_BV / penalty_B1, scaled_BV * penalty_B1)
        scaled_BV = torch.where(seen_BV & (penalty_B1 != 1), penalised_BV, scaled_BV)
        usable_B = scaled_BV.amax(1).isfinite()
        scaled_BV = torch.where(usable_B[:, None], scaled_BV, 0.0)
        best_B1, likeliest_B1 = scaled_BV.amax(1, keepdim=True), scaled_BV.argmax(1, keepdim=True)

        # Likeliest first, ties by token; a row without filters is drawn in the order of tokens instead.
        below_BV = scaled_BV - best_B1
        order_BV = below_BV.sort(dim=1, descending=True, stable=True).indices
        order_BV = torch.where(unfiltered_B[:, None], self._place_V, order_BV)
        weight_BV = below_BV.exp().gather(1, order_BV)
        kept_BV = (weight_BV >= min_p_B[:, None]) & (self._place_V < top_k_B[:, None])
        mass_BV = torch.where(kept_BV, (weight_BV * WEIGHT_ONE).long(), 0).cumsum(1)
        wanted_B = (top_p_B * mass_BV[:, -1].double()).long().clamp_min(1)
        last = self._vocab_size - 1
        edge_B1 = torch.searchsorted(mass_BV, wanted_B[:, None]).clamp_max(last)
        nucleus_B1 = mass_BV.gather(1, edge_B1)
        point_B1 = (uniform(start_B, position_B)[:, None] * nucleus_B1.double()).long()
        point_B1 = torch.minimum(point_B1, nucleus_B1 - 1)
        index_B1 = torch.searchsorted(mass_BV, point_B1, right=True).clamp_max(last)
        drawn_B1 = order_BV.gather(1, index_B1)
        self._chosen_2B[0, :rows] = torch.where(greedy_B[:, None], likeliest_B1, drawn_B1)[:, 0]
        self._chosen_2B[1, :rows] = usable_B
