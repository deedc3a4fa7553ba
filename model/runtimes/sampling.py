"""Choose the next token of many streams at once, from logits, settings and a seed.

Three promises hold to the last bit. A row's token depends on that row alone: not on the other rows, nor on how many
there are. It needs no random state: the random number of a token is a function of (seed, position), so a story can go
on anywhere. And every filter is exact: no candidate is lost to a short cut.

Order, as in vLLM: forbidden tokens (those that would break a character, and the end of story where it may not come
yet), logit biases, repetition penalty, frequency and presence penalty, temperature, min-p, top-k, and top-p over what
those left. All work in float32; sums that decide are of whole numbers (weights times 2^40), which no order of adding
changes.

What makes it fast (16 rows of 4,096: about 0.2 ms on one core): no full sort. A token below (1 - p) / V of the whole
mass cannot be in the nucleus, since all such tokens together weigh less than 1 - p; and at least k tokens weigh as much
as the k-th largest of the row's column maxima. What passes these bounds, some hundred tokens, is sorted once for all
rows, as whole numbers that hold row, weight and token.

Shapes: B rows (streams), V vocabulary, N candidates of all rows.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.architecture.names import NameSpeller
from model.architecture.tokenizer import STATES, TokenMasks
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


def check_sizes(capacity: int, vocab_size: int) -> None:
    """Raise `ValueError` beyond 4,096 rows or 2^20 tokens."""
    if not 1 <= capacity <= 4096 or not 2 <= vocab_size <= 1 << _TOKEN_BITS:
        message = f"got {capacity} rows of {vocab_size} tokens"
        raise ValueError(f"sampling takes 1 to 4096 rows of 2 to 2^20 tokens, {message}")


@dataclass(slots=True)
class _Story:
    """What a row must know of its story."""

    sampling: SamplingParams
    state: int
    """Of the incomplete character at its end (`model.architecture.tokenizer`)."""
    left: float
    """Tokens before which the end of story is forbidden."""
    counts: Counter[int] | None
    """Of generated tokens, where a penalty asks for them."""
    speller: NameSpeller | None
    """Where names are to be kept."""
    spelling: bool = False
    """Whether the next token is within a name."""

    @property
    def mask(self) -> int:
        return self.state + STATES * (self.left > 0)

    @property
    def plain(self) -> bool:
        """Whether a token changes nothing for the next, but for the state."""
        return not self.left and self.counts is None and self.sampling.repetition_penalty == 1


class RowTable:
    """Settings and stories of the rows, in arrays that every sampler reads: all of `Sampler` but the choice itself."""

    def __init__(self, capacity: int, vocab_size: int, masks: TokenMasks | None = None) -> None:
        """Make `capacity` rows; without `masks` no token is forbidden. Raises `ValueError` as `check_sizes` does."""
        check_sizes(capacity, vocab_size)
        self.vocab_size = vocab_size
        self.masks = TokenMasks.none(vocab_size) if masks is None else masks
        # Rows that nobody has set are greedy, which is never wrong for rows that nobody reads.
        self.columns: dict[str, npt.NDArray[Any]] = {
            "scale": np.ones(capacity, np.float32),  # what logits are multiplied with
            "penalty": np.ones(capacity, np.float32),
            "min_p": np.zeros(capacity, np.float64),
            "top_p": np.ones(capacity, np.float64),
            "top_k": np.full(capacity, vocab_size, np.int64),  # V where all are kept
            "start": np.zeros(capacity, np.uint64),  # where the counter of the seed begins
            "greedy": np.ones(capacity, np.bool_),
            "unfiltered": np.zeros(capacity, np.bool_),  # all may be drawn: then in the order of their ids
            "mask": np.zeros(capacity, np.int64),  # the row of `masks.forbidden_SV` that holds now
            "adjusted": np.zeros(capacity, np.bool_),  # whether `bias_BV` and `deduction_BV` hold anything
        }
        self.seen_BV = np.zeros((capacity, vocab_size), np.bool_)
        """Tokens of the story, where there is a repetition penalty."""
        self.bias_BV = np.zeros((capacity, vocab_size), np.float32)
        """Added to logits."""
        self.deduction_BV = np.zeros((capacity, vocab_size), np.float32)
        """Presence and frequency penalties, subtracted after the temperature, which they hold already."""
        self._stories: list[_Story | None] = [None] * capacity
        self._changed = set[int]()  # rows set or moved, for samplers that keep what the settings come to

    def set(
        self, row: int, sampling: SamplingParams, prompt: Sequence[int] = (), generated: Sequence[int] = ()
    ) -> None:
        """See `Sampler.set`."""
        counted = bool(sampling.presence_penalty or sampling.frequency_penalty)
        left = math.inf if sampling.ignore_eos else max(sampling.min_tokens - len(generated), 0)
        state = self.masks.state_of([*prompt[-8:], *generated[-8:]])
        counts = Counter(generated) if counted else None
        speller = NameSpeller(self.masks.words, [*prompt, *generated]) if sampling.keep_names else None
        story = self._stories[row] = _Story(sampling, state, left, counts, speller)
        self._changed.add(row)
        adjusted = counted or bool(sampling.logit_bias)
        greedy, every = sampling.temperature == 0, self.vocab_size
        top_k = min(sampling.top_k, every) or every
        values = {
            "scale": 1.0 if greedy else 1.0 / max(sampling.temperature, _MIN_TEMPERATURE),
            "penalty": sampling.repetition_penalty,
            "min_p": sampling.min_p,
            "top_p": sampling.top_p,
            "top_k": top_k,
            "start": start_of(sampling.seed),
            "greedy": greedy,
            "unfiltered": not greedy and sampling.top_p == 1 and sampling.min_p == 0 and top_k == every,
            "mask": story.mask,
            "adjusted": adjusted,
        }
        for name, value in values.items():
            self.columns[name][row] = value
        if sampling.repetition_penalty != 1:
            self.seen_BV[row] = False
            self.seen_BV[row, [*prompt, *generated]] = True
        if adjusted:
            self._set_bias(row, sampling)
            self.deduction_BV[row] = 0
            for token in story.counts or ():
                self._deduct(row, story, token)
        self._spell(row, story)

    def move(self, source: int, target: int) -> None:
        """See `Sampler.move`."""
        if source == target:
            return
        self._changed.add(target)
        for column in self.columns.values():
            column[target] = column[source]
        story = self._stories[target] = self._stories[source]
        self._stories[source] = None
        if story is not None and story.sampling.repetition_penalty != 1:
            self.seen_BV[target] = self.seen_BV[source]
        if self.columns["adjusted"][source]:
            self.bias_BV[target], self.deduction_BV[target] = self.bias_BV[source], self.deduction_BV[source]

    def note(self, row: int, token: int) -> None:
        """See `Sampler.note`."""
        story = self._stories[row]
        assert story is not None, "a row is set before its story goes on"
        if story.speller is not None:
            story.speller.push(token)
            self._spell(row, story)
        state = self.masks.following[story.state][token]
        if state == story.state and story.plain:
            return
        story.state = state
        story.left -= story.left > 0
        self.columns["mask"][row] = story.mask
        if story.sampling.repetition_penalty != 1:
            self.seen_BV[row, token] = True
        if story.counts is not None:
            story.counts[token] += 1
            self._deduct(row, story, token)

    def _set_bias(self, row: int, sampling: SamplingParams, forbidden_V: Logits | None = None) -> None:
        self.bias_BV[row] = 0 if forbidden_V is None else forbidden_V
        for token, bias in sampling.logit_bias:
            self.bias_BV[row, token] += bias

    def _spell(self, row: int, story: _Story) -> None:
        """Within a name, forbid by `bias_BV` the tokens that do not spell it."""
        forbidden_V = None if story.speller is None else story.speller.forbidden()
        if forbidden_V is None and not story.spelling:
            return
        story.spelling = forbidden_V is not None
        self._changed.add(row)
        self._set_bias(row, story.sampling, forbidden_V)
        if story.counts is None:
            self.deduction_BV[row] = 0
            self.columns["adjusted"][row] = story.spelling or bool(story.sampling.logit_bias)

    def _deduct(self, row: int, story: _Story, token: int) -> None:
        assert story.counts is not None
        sampling = story.sampling
        penalty = sampling.presence_penalty + sampling.frequency_penalty * story.counts[token]
        self.deduction_BV[row, token] = penalty * float(self.columns["scale"][row])


class _Plan:
    """What the settings of the first B rows come to: the same at each step until a row joins or leaves."""

    def __init__(self, columns: dict[str, npt.NDArray[Any]], rows: int, vocab: int) -> None:
        self.rows = rows
        part = {name: column[:rows].copy() for name, column in columns.items()}
        self.start_B = part["start"]
        self.scale_B1 = part["scale"][:, None]
        self.top_k_B, self.top_p_B, self.min_p_B = part["top_k"], part["top_p"], part["min_p"]
        # A weight below this share of the mass cannot be in the nucleus.
        self.share_B = (1 - self.top_p_B) * (_BOUND_SLACK / vocab)
        # Rows whose mass, which top-p speaks of, is what other filters leave.
        self.narrowed_B = (self.top_k_B < vocab) | (self.min_p_B > 0)
        self.narrowed = bool(self.narrowed_B.any())
        self.greedy = part["greedy"].nonzero()[0].tolist()
        self.limited = ((self.top_k_B < vocab) & ~part["greedy"]).nonzero()[0].tolist()
        self.unfiltered = part["unfiltered"].nonzero()[0].tolist()
        self.unsorted = self.greedy + self.unfiltered
        self.adjusted = part["adjusted"].nonzero()[0].tolist()
        self.penalties = [(row, part["penalty"][row]) for row in (part["penalty"] != 1).nonzero()[0].tolist()]


class SamplingRows(RowTable):
    """Implements `model.runtimes.protocol.Sampler` over logits on the host, in numpy."""

    def __init__(self, capacity: int, vocab_size: int, masks: TokenMasks | None = None) -> None:
        """See `RowTable`."""
        super().__init__(capacity, vocab_size, masks)
        self._plan: _Plan | None = None
        self._scaled = np.empty((capacity, vocab_size), dtype=np.float32)
        self._weight = np.empty((capacity, vocab_size), dtype=np.float32)
        self._row_key = np.arange(capacity + 1, dtype=np.int64) << _ROW_SHIFT
        self._never = np.isneginf(self.masks.forbidden_SV[0]).nonzero()[0]  # between two characters

    def sample(self, logits_BV: Logits, position_B: Tokens) -> tuple[Tokens, Flags]:
        """See `Sampler.sample`."""
        rows = len(logits_BV)
        plan = self._plan
        if plan is None or plan.rows != rows or self._changed:
            self._changed.clear()
            plan = self._plan = _Plan(self.columns, rows, self.vocab_size)
        with np.errstate(all="ignore"):
            scaled_BV = np.multiply(logits_BV, plan.scale_B1, out=self._scaled[:rows])
            for row in plan.adjusted:
                scaled_BV[row] = (logits_BV[row] + self.bias_BV[row]) * plan.scale_B1[row]
            for row, penalty in plan.penalties:
                seen_S = self.seen_BV[row].nonzero()[0]
                value_S = scaled_BV[row, seen_S]
                scaled_BV[row, seen_S] = np.where(value_S > 0, value_S / penalty, value_S * penalty)
            for row in plan.adjusted:
                scaled_BV[row] -= self.deduction_BV[row]
            mask_B = self.columns["mask"][:rows]
            # Added and not assigned: a logit that is not finite stays so. After the factors, which change no infinity.
            if mask_B.any():
                scaled_BV += self.masks.forbidden_SV[mask_B]
            elif len(self._never):
                scaled_BV[:, self._never] -= np.inf
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
        vocab = self.vocab_size
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
        vocab = self.vocab_size
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


def log_probabilities(
    logits_TV: Logits, tokens: Sequence[int], best: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """The natural-log probability of each of `tokens` (T), and of the `best` likeliest there, before any filter.

    The lists are likeliest first; ties go to the lower token. Costs about 60 µs a row at V = 4,096.
    """
    level_TV = logits_TV.astype(np.float64)
    level_TV -= level_TV.max(axis=1, keepdims=True)
    level_TV -= np.log(np.exp(level_TV).sum(axis=1, keepdims=True))
    count = min(best, level_TV.shape[1])
    found = []
    for level_V, token in zip(level_TV, tokens, strict=True):
        alternatives: list[tuple[int, float]] = []
        if count:
            place = len(level_V) - count
            candidates = (level_V >= np.partition(level_V, place)[place]).nonzero()[0]
            order = candidates[np.argsort(-level_V[candidates], kind="stable")][:count]
            alternatives = [(int(i), float(level_V[i])) for i in order]
        found.append((float(level_V[token]), alternatives))
    return found
