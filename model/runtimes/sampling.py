"""Choose the next token of many streams at once, from logits, settings and a seed.

Three promises hold to the last bit. A row's token depends on that row alone: not on the other rows, nor on how many
there are. It needs no random state: the random number of a token is a function of (seed, position), so a story can go
on anywhere. And every filter is exact: no candidate is lost to a short cut.

Order of the filters, as in vLLM: repetition penalty, temperature, min-p, top-k, and top-p over what those left. All
work in float32; sums that decide are of whole numbers (weights times 2^40), which no order of adding changes.

What makes it fast (16 rows of 4,096: about 0.2 ms on one core): no full sort. A token below (1 - p) / V of the whole
mass cannot be in the nucleus, since all such tokens together weigh less than 1 - p; and at least k tokens weigh as much
as the k-th largest of the row's column maxima. What passes these bounds, some hundred tokens, is sorted once for all
rows, as whole numbers that hold row, weight and token.

Shapes: B rows (streams), V vocabulary, N candidates of all rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.generation import SamplingParams
from model.runtimes.protocol import Flags, Logits, Tokens

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_A = np.uint64(0xBF58476D1CE4E5B9)
MIX_B = np.uint64(0x94D049BB133111EB)
_MASK_64 = (1 << 64) - 1
_TOKEN_BITS = 20
_LEVEL_BITS = 31
_ROW_SHIFT = _LEVEL_BITS + _TOKEN_BITS
_TOKEN_MASK = np.int64((1 << _TOKEN_BITS) - 1)
WEIGHT_ONE = float(1 << 40)
_COLUMNS = 256
_MIN_TEMPERATURE = 1e-5
_BELOW_ONE = 1 - 2.0**-53
_BOUND_SLACK = 0.9  # keeps the bound on candidates on the safe side of float32 rounding


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014, figure 17)."""
    z = (z ^ (z >> np.uint64(30))) * MIX_A
    z = (z ^ (z >> np.uint64(27))) * MIX_B
    return z ^ (z >> np.uint64(31))


def start_of(seed: int) -> np.uint64:
    """Where the counter of `seed` begins: mixed, so that neighbouring seeds have nothing in common."""
    return np.uint64(_mix(np.array([seed & _MASK_64], dtype=np.uint64) + GOLDEN)[0])


def uniform(start_B: npt.NDArray[np.uint64], position_B: Tokens) -> npt.NDArray[np.float64]:
    """The random number in [0, 1), of 53 bits, for each (start of a seed, position)."""
    z = _mix(start_B + position_B.astype(np.uint64) * GOLDEN)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


class RowSettings(NamedTuple):
    """What the settings of one stream come to, in the form that all samplers read."""

    scale: float
    """What logits are multiplied with; 1 for greedy choices, which no scale changes."""
    penalty: float
    min_p: float
    top_p: float
    top_k: int
    """V where all are kept."""
    start: np.uint64
    """Where the counter of the seed begins."""
    greedy: bool
    unfiltered: bool
    """Whether all tokens may be drawn: then they are drawn in the order of their ids."""

    @classmethod
    def of(cls, sampling: SamplingParams, vocab_size: int) -> RowSettings:
        """The row for `sampling` over a vocabulary of this size."""
        greedy = sampling.temperature == 0
        top_k = min(sampling.top_k, vocab_size) or vocab_size
        return cls(
            scale=1.0 if greedy else 1.0 / max(sampling.temperature, _MIN_TEMPERATURE),
            penalty=sampling.repetition_penalty,
            min_p=sampling.min_p,
            top_p=sampling.top_p,
            top_k=top_k,
            start=start_of(sampling.seed),
            greedy=greedy,
            unfiltered=not greedy and sampling.top_p == 1 and sampling.min_p == 0 and top_k == vocab_size,
        )


def check_sizes(capacity: int, vocab_size: int) -> None:
    """Raise `ValueError` beyond 4,096 rows or 2^20 tokens."""
    if not 1 <= capacity <= 4096 or not 2 <= vocab_size <= 1 << _TOKEN_BITS:
        message = f"got {capacity} rows of {vocab_size} tokens"
        raise ValueError(f"sampling takes 1 to 4096 rows of 2 to 2^20 tokens, {message}")


class _Seen:
    """The different tokens of one story, as an index array that grows."""

    def __init__(self, vocab_size: int, tokens: Iterable[int]) -> None:
        self._flags = bytearray(vocab_size)
        self._ids = np.empty(64, dtype=np.int64)
        self._count = 0
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        if self._flags[token]:
            return
        self._flags[token] = 1
        if self._count == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
        self._ids[self._count] = token
        self._count += 1

    @property
    def ids(self) -> Tokens:
        return self._ids[: self._count]


class _Plan:
    """What the settings of the first B rows come to: the same at each step until a row joins or leaves."""

    def __init__(self, settings: list[RowSettings], seen: list[_Seen | None], vocab: int) -> None:
        scale, _, min_p, top_p, top_k, start, greedy, unfiltered = zip(*settings, strict=True)
        self.rows = len(settings)
        self.start_B = np.array(start, dtype=np.uint64)
        self.scale_B1 = np.array(scale, dtype=np.float32)[:, None]
        self.top_k_B = np.array(top_k, dtype=np.int64)
        self.top_p_B = np.array(top_p, dtype=np.float64)
        self.min_p_B = np.array(min_p, dtype=np.float64)
        # A weight below this share of the mass cannot be in the nucleus.
        self.share_B = (1 - self.top_p_B) * (_BOUND_SLACK / vocab)
        # Rows whose mass, which top-p speaks of, is what other filters leave.
        self.narrowed_B = (self.top_k_B < vocab) | (self.min_p_B > 0)
        self.narrowed = bool(self.narrowed_B.any())
        self.greedy = [row for row in range(self.rows) if greedy[row]]
        self.limited = [row for row in range(self.rows) if top_k[row] < vocab and not greedy[row]]
        self.unfiltered = [row for row in range(self.rows) if unfiltered[row]]
        self.unsorted = self.greedy + self.unfiltered
        self.penalties = [
            (row, np.float32(settings[row].penalty), tokens)
            for row, tokens in enumerate(seen[: self.rows])
            if tokens is not None
        ]


class SamplingRows:
    """Implements `model.runtimes.protocol.Sampler` over logits on the host, in numpy."""

    def __init__(self, capacity: int, vocab_size: int) -> None:
        """Make `capacity` rows. Raises `ValueError` beyond 4,096 rows or 2^20 tokens."""
        check_sizes(capacity, vocab_size)
        self._vocab_size = vocab_size
        self._settings: list[RowSettings | None] = [None] * capacity
        self._seen: list[_Seen | None] = [None] * capacity
        self._plan: _Plan | None = None
        self._scaled = np.empty((capacity, vocab_size), dtype=np.float32)
        self._weight = np.empty((capacity, vocab_size), dtype=np.float32)
        self._row_key = np.arange(capacity + 1, dtype=np.int64) << _ROW_SHIFT

    def set(self, row: int, sampling: SamplingParams, seen: Iterable[int] = ()) -> None:
        """See `Sampler.set`."""
        self._settings[row] = RowSettings.of(sampling, self._vocab_size)
        self._seen[row] = _Seen(self._vocab_size, seen) if sampling.repetition_penalty != 1 else None
        self._plan = None

    def move(self, source: int, target: int) -> None:
        """See `Sampler.move`."""
        self._settings[target], self._seen[target] = self._settings[source], self._seen[source]
        if source != target:
            self._settings[source] = self._seen[source] = None
        self._plan = None

    def note(self, row: int, token: int) -> None:
        """See `Sampler.note`."""
        if (seen := self._seen[row]) is not None:
            seen.add(token)

    def sample(self, logits_BV: Logits, position_B: Tokens) -> tuple[Tokens, Flags]:
        """See `Sampler.sample`."""
        rows = len(logits_BV)
        plan = self._plan
        if plan is None or plan.rows != rows:
            settings = [each for each in self._settings[:rows] if each is not None]
            plan = self._plan = _Plan(settings, self._seen, self._vocab_size)
        with np.errstate(all="ignore"):
            scaled_BV = np.multiply(logits_BV, plan.scale_B1, out=self._scaled[:rows])
            for row, penalty, seen in plan.penalties:
                value_S = scaled_BV[row, seen.ids]
                scaled_BV[row, seen.ids] = np.where(value_S > 0, value_S / penalty, value_S * penalty)
            best_B = np.maximum.reduce(scaled_BV, axis=1)
            usable_B = np.isfinite(best_B)
            if not usable_B.all():
                scaled_BV[~usable_B] = 0
                best_B[~usable_B] = 0
            if len(plan.greedy) == rows:
                return scaled_BV.argmax(axis=1), usable_B
            greedy_token_B = [int(scaled_BV[row].argmax()) for row in plan.greedy]
            np.subtract(scaled_BV, best_B[:, None], out=scaled_BV)
            chosen_B = self._draw(plan, scaled_BV, uniform(plan.start_B, position_B))
        for row, token in zip(plan.greedy, greedy_token_B, strict=True):
            chosen_B[row] = token
        return chosen_B, usable_B

    def _draw(self, plan: _Plan, scaled_BV: Logits, uniform_B: npt.NDArray[np.float64]) -> Tokens:
        """Draw one token a row (B,) from `scaled_BV`, whose rows have their maximum at 0."""
        vocab = self._vocab_size
        weight_BV = np.exp(scaled_BV, out=self._weight[: plan.rows])
        mass_B = np.add.reduce(weight_BV, axis=1).astype(np.float64)
        if plan.narrowed:
            # Where top-p speaks of the mass that other filters leave, all that they leave must be counted.
            bound_B = np.maximum(np.where(plan.narrowed_B, 0.0, mass_B * plan.share_B), plan.min_p_B)
            for row, bound in self._kth_bounds(plan, weight_BV):
                bound_B[row] = max(bound_B[row], bound)
        else:
            bound_B = mass_B * plan.share_B
        bound_B[plan.unsorted] = 1.0
        passing_N = (weight_BV >= bound_B.astype(np.float32)[:, None]).reshape(-1).nonzero()[0]

        # Sorted by row, then by how far a token is below the maximum, then by token: ties go to the lower one.
        row_N = passing_N // vocab
        level_N = np.abs(scaled_BV.reshape(-1)[passing_N]).view(np.int32).astype(np.int64)
        row_key_N = row_N << _ROW_SHIFT
        key_N = row_key_N | (level_N << _TOKEN_BITS) | (passing_N - row_N * vocab)
        border = row_key_N.searchsorted(self._row_key[: plan.rows + 1])
        edges = border.tolist()
        for first, last in itertools.pairwise(edges):
            key_N[first:last].sort()
        start_B, end_B = border[:-1], np.minimum(border[1:], border[:-1] + plan.top_k_B)

        token_N = key_N & _TOKEN_MASK
        weight_N = weight_BV.reshape(-1)[row_N * vocab + token_N].astype(np.float64)
        mass_N = np.zeros(len(key_N) + 1, dtype=np.int64)  # of the tokens before each, all rows in one array
        np.cumsum((weight_N * WEIGHT_ONE).astype(np.int64), out=mass_N[1:])
        base_B = mass_N[start_B]
        mass_B *= WEIGHT_ONE
        if plan.narrowed:
            mass_B = np.where(plan.narrowed_B, mass_N[end_B] - base_B, mass_B)
        wanted_B = np.maximum((plan.top_p_B * mass_B).astype(np.int64), 1)
        last_B = np.minimum(mass_N.searchsorted(base_B + wanted_B), end_B)
        point_B = base_B + (uniform_B * (mass_N[last_B] - base_B)).astype(np.int64)
        chosen_B: Tokens = token_N[mass_N.searchsorted(point_B, side="right") - 1]
        for row in plan.unfiltered:
            chosen_B[row] = _draw_unfiltered(weight_BV[row], float(uniform_B[row]))
        return chosen_B

    def _kth_bounds(self, plan: _Plan, weight_BV: Logits) -> Iterator[tuple[int, float]]:
        """For each row with top-k, a weight that at least k of its tokens reach."""
        vocab = self._vocab_size
        # Each column's maximum is a token of its own, so k tokens reach the k-th of these maxima. For k = 50
        # and V = 4,096 this costs 6 µs a row; a partition of the whole row costs 23 µs.
        whole = vocab - vocab % _COLUMNS
        for row in plan.limited:
            k = int(plan.top_k_B[row])
            weight_V = weight_BV[row]
            if 2 * k <= _COLUMNS <= vocab // 2:
                weight_V = np.maximum.reduce(weight_V[:whole].reshape(-1, _COLUMNS), axis=0)
            place = len(weight_V) - k
            yield row, _BOUND_SLACK * float(np.partition(weight_V, place)[place])


def _draw_unfiltered(weight_V: Logits, point: float) -> int:
    """Draw from all tokens in the order of their ids: first a block of them, then one of the block."""
    block_mass = np.add.reduceat(weight_V, range(0, len(weight_V), _COLUMNS)).cumsum(dtype=np.float64)
    block, rest = _find(block_mass, point)
    first = block * _COLUMNS
    token, _ = _find(weight_V[first : first + _COLUMNS].cumsum(dtype=np.float64), rest)
    return first + token


def _find(mass: npt.NDArray[np.float64], point: float) -> tuple[int, float]:
    """The entry of a running sum in which the share `point` in [0, 1) lies, and where in it, in [0, 1).

    Never an entry without mass, whatever the rounding.
    """
    total = mass[-1]
    index = min(int(mass.searchsorted(point * total, side="right")), int(mass.searchsorted(total)))
    before = mass[index - 1] if index else 0.0
    inside = (point * total - before) / (mass[index] - before)
    return index, min(max(float(inside), 0.0), _BELOW_ONE)


def log_probabilities(logits_V: Logits, token: int, best: int) -> tuple[float, list[tuple[int, float]]]:
    """The natural-log probability of `token`, and of the `best` likeliest tokens, before any filter.

    The list is likeliest first; ties go to the lower token. Costs about 60 µs at V = 4,096.
    """
    level_V = logits_V.astype(np.float64)
    level_V -= level_V.max()
    level_V -= np.log(np.exp(level_V).sum())
    count = min(best, len(level_V))
    if not count:
        return float(level_V[token]), []
    place = len(level_V) - count
    candidates = (level_V >= np.partition(level_V, place)[place]).nonzero()[0]
    order = candidates[np.argsort(-level_V[candidates], kind="stable")][:count]
    return float(level_V[token]), [(int(i), float(level_V[i])) for i in order]
