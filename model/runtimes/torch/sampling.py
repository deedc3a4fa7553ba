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

from functools import partial

import numpy as np
import torch
from torch import Tensor

from model.architecture.tokenizer import TokenMasks
from model.runtimes.protocol import Flags, Logits, Tokens
from model.runtimes.sampling import GOLDEN, MIX_A, MIX_B, WEIGHT_ONE, RowTable, check_sizes
from model.runtimes.torch.forward import Recorder, bucket_sizes


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


_TYPES = {"start": np.int64}
"""Of columns that PyTorch has no type for."""


class DeviceSampler(RowTable):
    """Implements `model.runtimes.protocol.Sampler` over `DeviceLogits`.

    Settings go to the device when a row joins or leaves; what a token changes goes there with each step.
    """

    def __init__(
        self, capacity: int, vocab_size: int, device: torch.device, recorder: Recorder, masks: TokenMasks | None = None
    ) -> None:
        """Make `capacity` rows. Raises `ValueError` as `RowTable` does."""
        check_sizes(capacity, vocab_size)
        sizes = bucket_sizes(capacity)
        allocated = sizes[-1]
        super().__init__(allocated, vocab_size, masks)
        pinned = device.type == "cuda"

        def on_host(tensor: Tensor) -> Tensor:
            return tensor.pin_memory() if pinned else tensor

        self._host = {
            name: torch.from_numpy(column.view(_TYPES.get(name, column.dtype)))
            for name, column in self.columns.items()
            if name != "mask"
        }
        self._settings = {name: column.to(device, copy=True) for name, column in self._host.items()}
        self._forbidden_SV = torch.from_numpy(self.masks.forbidden_SV).to(device)
        self._logits_BV = torch.zeros(allocated, vocab_size, device=device)
        self._seen = torch.zeros(allocated, vocab_size, dtype=torch.bool, device=device)
        self._bias = torch.zeros(allocated, vocab_size, device=device)
        self._deduction = torch.zeros(allocated, vocab_size, device=device)
        # Of each row: the place of the token to be chosen, its mask, and the last token that joined the story, if any,
        # with the bits of its deduction.
        self._news_host = on_host(torch.zeros(5, allocated, dtype=torch.int64))
        self._news_5B = torch.zeros(5, allocated, dtype=torch.int64, device=device)
        self._news = self._news_host.numpy()
        # Back: the chosen token, and whether the row was usable.
        self._chosen_host = on_host(torch.zeros(2, allocated, dtype=torch.int64))
        self._chosen_2B = torch.zeros(2, allocated, dtype=torch.int64, device=device)
        self._place_V = torch.arange(vocab_size, device=device)
        self._launches = {size: recorder(partial(self._choose, size)) for size in sizes}

    def note(self, row: int, token: int) -> None:
        """See `Sampler.note`. The last recorded token goes to the device with the next step."""
        super().note(row, token)
        if self.columns["penalty"][row] == 1 and not self.columns["adjusted"][row]:
            return  # all that changes is the mask
        if self._news[3, row]:  # two between two steps
            self._changed.add(row)
        self._news[2:4, row] = token, 1
        self._news[4, row] = self.deduction_BV[row, token : token + 1].view(np.int32)[0]

    def sample(self, logits_BV: DeviceLogits, position_B: Tokens) -> tuple[Tokens, Flags]:
        """See `Sampler.sample`."""
        rows = len(logits_BV)
        size = next(size for size in self._launches if size >= rows)
        if self._changed:
            self._send(sorted(self._changed))
        self._news[0, :rows] = position_B
        self._news[1] = self.columns["mask"]
        # Not waited for: the host writes these numbers again only after it has read what comes of them.
        self._news_5B.copy_(self._news_host, non_blocking=True)
        self._logits_BV[:rows].copy_(logits_BV.tensor_BV)
        self._launches[size]()
        self._chosen_host.copy_(self._chosen_2B)
        self._news[3] = 0
        chosen_2B = self._chosen_host.numpy()[:, :rows].copy()
        return chosen_2B[0], chosen_2B[1] != 0

    def _send(self, rows: list[int]) -> None:
        """Copy everything about these rows to the device."""
        for name, column in self._host.items():
            self._settings[name].copy_(column)
        penalised, adjusted = self.columns["penalty"] != 1, self.columns["adjusted"]
        for there, here, wanted in (
            (self._seen, self.seen_BV, penalised),
            (self._bias, self.bias_BV, adjusted),
            (self._deduction, self.deduction_BV, adjusted),
        ):
            for row in rows:
                if wanted[row]:
                    there[row].copy_(torch.from_numpy(here[row]))
        self._news[3, rows] = 0
        self._changed.clear()

    @torch.no_grad()
    def _choose(self, rows: int) -> None:
        """Choose for the first `rows` rows, from the buffers and into them."""
        position_B, mask_B, noted_B, news_B, bits_B = self._news_5B[:, :rows].unbind(0)
        column = {name: column[:rows] for name, column in self._settings.items()}
        scale_B1, penalty_B1, adjusted_B1 = (column[name][:, None] for name in ("scale", "penalty", "adjusted"))
        seen_BV, bias_BV, deduction_BV = self._seen[:rows], self._bias[:rows], self._deduction[:rows]
        noted_B1, news_B1 = noted_B[:, None], (news_B != 0)[:, None]
        seen_BV.scatter_(1, noted_B1, seen_BV.gather(1, noted_B1) | news_B1)
        bits_B1 = bits_B[:, None].int().view(torch.float32)
        deduction_BV.scatter_(1, noted_B1, torch.where(news_B1, bits_B1, deduction_BV.gather(1, noted_B1)))
        logits_BV = self._logits_BV[:rows] + self._forbidden_SV.index_select(0, mask_B)
        scaled_BV = torch.where(adjusted_B1, logits_BV + bias_BV, logits_BV) * scale_B1
        penalised_BV = torch.where(scaled_BV > 0, scaled_BV / penalty_B1, scaled_BV * penalty_B1)
        scaled_BV = torch.where(seen_BV & (penalty_B1 != 1), penalised_BV, scaled_BV)
        scaled_BV = torch.where(adjusted_B1, scaled_BV - deduction_BV, scaled_BV)
        usable_B = scaled_BV.amax(1).isfinite()
        scaled_BV = torch.where(usable_B[:, None], scaled_BV, 0.0)
        best_B1, likeliest_B1 = scaled_BV.amax(1, keepdim=True), scaled_BV.argmax(1, keepdim=True)

        # Likeliest first, ties by token; a row without filters is drawn in the order of tokens instead.
        below_BV = scaled_BV - best_B1
        order_BV = below_BV.sort(dim=1, descending=True, stable=True).indices
        order_BV = torch.where(column["unfiltered"][:, None], self._place_V, order_BV)
        weight_BV = below_BV.exp().gather(1, order_BV)
        kept_BV = (weight_BV >= column["min_p"][:, None]) & (self._place_V < column["top_k"][:, None])
        mass_BV = torch.where(kept_BV, (weight_BV * WEIGHT_ONE).long(), 0).cumsum(1)
        wanted_B = (column["top_p"] * mass_BV[:, -1].double()).long().clamp_min(1)
        last = self.vocab_size - 1
        edge_B1 = torch.searchsorted(mass_BV, wanted_B[:, None]).clamp_max(last)
        nucleus_B1 = mass_BV.gather(1, edge_B1)
        point_B1 = (uniform(column["start"], position_B)[:, None] * nucleus_B1.double()).long()
        point_B1 = torch.minimum(point_B1, nucleus_B1 - 1)
        index_B1 = torch.searchsorted(mass_BV, point_B1, right=True).clamp_max(last)
        drawn_B1 = order_BV.gather(1, index_B1)
        self._chosen_2B[0, :rows] = torch.where(column["greedy"][:, None], likeliest_B1, drawn_B1)[:, 0]
        self._chosen_2B[1, :rows] = usable_B
