"""Find exact and near duplicates among millions of stories.

A near duplicate shares at least 40 % of the shorter story's 8-word runs with a story that stays. MinHash (Broder
1997) proposes pairs and the true runs decide. Of each story `MINIMA` minima of 16 bits are kept (Li and König 2010,
"b-Bit Minwise Hashing"). Two stories with the Jaccard resemblance J agree in each minimum with probability J; they
are proposed if they agree in two neighbouring minima (a *band*) and in at least `MIN_AGREEING` of all. By simulation:
stories of equal length at the 40 % limit (J = 0.25) are proposed with probability 0.995, two with the same opening (J
= 0.02) with 0.0002. A short story inside a much longer one has a small J and may stay.

In a bucket that many stories share each is compared with its `WINDOW` next ones only; true copies meet in other
bands.
"""

import hashlib
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RUN_WORDS = 8
SHARED_RUNS = 0.4
MINIMA = 64
MIN_AGREEING = 7
WINDOW = 16
_PAIRS = [(first, (first + step) % MINIMA) for step in (1, 2) for first in range(MINIMA)]
BANDS = len(_PAIRS)

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_KNOWN_WORDS = 1 << 18
_SEEN_PAIRS = 1 << 18
_PAIRS_AT_ONCE = 1 << 16
_U64 = NDArray[np.uint64]


class _WordHashes(dict[str, int]):
    """Word → 64-bit hash, the same in every process (Python's own is salted); cleared when it grows too large."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _KNOWN_WORDS:
            self.clear()
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = value
        return value


_hash_of_word = _WordHashes()


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation: what two copies have in common."""
    return _WORD.findall(text.lower())


def _mix(x: _U64) -> _U64:
    """Spread every input bit over the whole word (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _runs(word_hashes: _U64) -> _U64:
    """Hashes of all `RUN_WORDS`-word runs of a sequence of word hashes (length n → n - 7)."""
    count = len(word_hashes) - RUN_WORDS + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    runs = word_hashes[:count].copy()
    for shift in range(1, RUN_WORDS):
        runs *= np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplying loses nothing
        runs += word_hashes[shift : shift + count]
    return _mix(runs)


def run_hashes(text: str) -> _U64:
    """The set of a text's 8-word runs as sorted 64-bit hashes; empty for a text of fewer than eight words."""
    hashes = np.fromiter(map(_hash_of_word.__getitem__, words(text)), np.uint64)
    return np.unique(_runs(hashes))


def shared_share(runs_a: _U64, runs_b: _U64) -> float:
    """Which part of the smaller set of runs the larger one holds too, 0 to 1 (0 if one is empty)."""
    smaller = min(len(runs_a), len(runs_b))
    if not smaller:
        return 0.0
    return len(np.intersect1d(runs_a, runs_b, assume_unique=True)) / smaller


def _upper_half(x: _U64) -> NDArray[np.uint32]:
    return (x >> np.uint64(32)).astype(np.uint32)


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Which stories to leave out (boolean, one per story, disjoint)."""

    exact: NDArray[np.bool_]
    near: NDArray[np.bool_]


class DuplicateFinder:
    """Keeps 2 · `MINIMA` + 8 bytes of every story added, and names the duplicates among them."""

    def __init__(self, seed: int = 0) -> None:
        multipliers = np.random.default_rng(seed).integers(0, 1 << 31, MINIMA, dtype=np.uint32)
        self._multipliers = multipliers * np.uint32(2) + np.uint32(1)
        self._minima = array("H")
        self._exact = array("Q")

    def __len__(self) -> int:
        return len(self._exact)

    def add(self, texts: Sequence[str]) -> None:
        """Take in stories; they are numbered in the order in which they come.

        Many at once (a megabyte, say) is fast: numpy hashes the runs of all of them in one go.
        """
        if not texts:
            return
        lists = [words(text) for text in texts]
        for found in lists:
            key = hashlib.blake2b(" ".join(found).encode(), digest_size=8).digest()
            self._exact.append(int.from_bytes(key, "little"))
        hashes = np.fromiter((h for ws in lists for h in map(_hash_of_word.__getitem__, ws)), np.uint64)
        lengths = np.array([len(ws) for ws in lists], np.int64)
        runs = _runs(hashes)
        # Runs that reach into the next story are taken out; what is left of each story stands in one stretch.
        story_of_word = np.repeat(np.arange(len(texts)), lengths)
        if len(runs):
            runs = runs[story_of_word[: len(runs)] == story_of_word[RUN_WORDS - 1 :]]
        counts = np.maximum(lengths - RUN_WORDS + 1, 0)
        has_runs = counts > 0
        starts = (np.cumsum(counts) - counts)[has_runs]
        # A story without runs gets one of its own, its number, so that it looks like no other.
        first = len(self._exact) - len(texts)
        own = _upper_half(_mix(np.arange(first, first + len(texts), dtype=np.uint64)))
        short_runs = _upper_half(runs)
        rows = np.empty((len(texts), MINIMA), np.uint16)
        for column, multiplier in enumerate(self._multipliers):
            # Multiplying by an odd number permutes the 32-bit words; the lower bits of a minimum are the
            # random ones.
            rows[:, column] = (own * multiplier).astype(np.uint16)
            if len(starts):
                minima = np.minimum.reduceat(short_runs * multiplier, starts)
                rows[has_runs, column] = minima.astype(np.uint16)
        self._minima.frombytes(rows.tobytes())

    def find(
        self,
        text_of: Callable[[int], str],
        *,
        reference: NDArray[np.bool_] | None = None,
        keep_reference: bool = False,
        on_band: Callable[[], None] | None = None,
    ) -> Duplicates:
        """Find the duplicates; of each group the first story stays.

        `text_of(i)` gives story i again. Stories marked in `reference` (the validation split) come before all others,
        so a copy in both splits leaves the other one; with `keep_reference` none of them is dropped. `on_band` is
        called `BANDS` times.
        """
        total = len(self)
        reference = np.zeros(total, np.bool_) if reference is None else reference
        # `order[rank]` is a story's number; a story may be dropped only for one of lower rank.
        order = np.concatenate([np.flatnonzero(reference), np.flatnonzero(~reference)]).astype(np.int64)
        safe = int(reference.sum()) if keep_reference else 0

        keys = np.frombuffer(self._exact, np.uint64)[order] if total else np.empty(0, np.uint64)
        by_key = np.argsort(keys, kind="stable")
        same = np.zeros(total, np.bool_)
        same[by_key[1:]] = keys[by_key[1:]] == keys[by_key[:-1]]
        same[:safe] = False
        del keys, by_key
        dropped = same.copy()
        search = _NearSearch(self._minima, order, dropped, safe, text_of)
        for band in range(BANDS):
            search.scan(band)
            if on_band:
                on_band()
        exact, near = np.zeros(total, np.bool_), np.zeros(total, np.bool_)
        exact[order] = same
        near[order] = dropped & ~same
        return Duplicates(exact=exact, near=near)


class _NearSearch:
    """One search for near copies over stories in rank order; marks them in `dropped` as it goes."""

    def __init__(
        self,
        minima: "array[int]",
        order: NDArray[np.int64],
        dropped: NDArray[np.bool_],
        safe: int,
        text_of: Callable[[int], str],
    ) -> None:
        self._minima = np.frombuffer(minima, np.uint16).reshape(-1, MINIMA)
        self._order = order
        self._dropped = dropped
        self._safe = safe
        self._kept_for: dict[int, int] = {}
        self._different: set[tuple[int, int]] = set()
        self._runs_of = lru_cache(maxsize=128)(lambda rank: run_hashes(text_of(int(order[rank]))))

    def scan(self, band: int) -> None:
        """Compare the stories that agree in both minima of one band."""
        alive = np.flatnonzero(~self._dropped)
        one, two = _PAIRS[band]
        places = self._order[alive]
        keys = self._minima[places, one].astype(np.uint32) << np.uint32(16) | self._minima[places, two]
        del places
        # Stable, so that the window over equal keys holds the same stories on every machine.
        by_key = np.argsort(keys, kind="stable")
        alive, keys = alive[by_key], keys[by_key]
        del by_key
        for lag in range(1, min(WINDOW, len(alive) - 1) + 1):
            together = np.flatnonzero(keys[lag:] == keys[:-lag])
            if not len(together):
                break
            for start in range(0, len(together), _PAIRS_AT_ONCE):
                chosen = together[start : start + _PAIRS_AT_ONCE]
                self._propose(alive[chosen], alive[chosen + lag])

    def _propose(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
        """Compare those of the pairs (in ranks) that agree often enough."""
        low, high = np.minimum(one, other), np.maximum(one, other)
        agreeing = (self._minima[self._order[low]] == self._minima[self._order[high]]).sum(1)
        likely = (agreeing >= MIN_AGREEING) & (high >= self._safe)
        for a, b in zip(low[likely].tolist(), high[likely].tolist(), strict=True):
            self._compare(a, b)

    def _compare(self, low: int, high: int) -> None:
        # Where the lower one is gone already, the story that it was dropped for stands for it.
        if self._dropped[high]:
            return
        while low in self._kept_for:
            low = self._kept_for[low]
        if low == high or (low, high) in self._different:
            return
        if shared_share(self._runs_of(low), self._runs_of(high)) >= SHARED_RUNS:
            self._dropped[high] = True
            self._kept_for[high] = low
        else:
            if len(self._different) >= _SEEN_PAIRS:
                self._different.clear()  # costs a second look at some pairs, never a wrong answer
            self._different.add((low, high))
