"""The same story twice is no second story: exact copies and near copies leave the training set.

A near copy shares at least 40 % of the shorter story's 8-word runs with a story that stays. Comparing all
pairs of 2.5 M stories is out of the question, so MinHash (Broder 1997, "On the resemblance and containment of
documents") proposes pairs and the true runs decide. `BANDS` minima of 4 bytes a story are all that is
remembered. Two stories whose sets have the Jaccard resemblance J agree in each band with probability J; those
that agree in at least `MIN_AGREEING` bands are compared. Equal lengths at the 40 % limit mean J = 0.25, which
is found with probability 0.993. A short story copied whole into a much longer one has a small J and may stay:
the limit of the method.

Work is bounded too. A well-worn opening ("Once upon a time there was a little girl") puts many stories into
one bucket that have nothing else in common; there each story meets only its `WINDOW` next ones, in an order
that puts stories which also agree in the following band side by side.
"""

from __future__ import annotations

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
BANDS = 32
MIN_AGREEING = 3
WINDOW = 16

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_KNOWN_WORDS = 1 << 18
_SEEN_PAIRS = 1 << 18
_U64 = NDArray[np.uint64]


class _WordHashes(dict[str, int]):
    """Word → 64-bit hash, the same in every process (Python's own is salted); forgotten when it grows too
    large.
    """

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


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Which stories to leave out (boolean, one per story, disjoint), and how many pairs were compared."""

    exact: NDArray[np.bool_]
    near: NDArray[np.bool_]
    compared: int


class DuplicateFinder:
    """Remembers 4 · `BANDS` + 8 bytes of every story added, and names the duplicates among them."""

    def __init__(self, seed: int = 0) -> None:
        multipliers = np.random.default_rng(seed).integers(0, 1 << 63, BANDS, dtype=np.uint64)
        self._multipliers: _U64 = multipliers * np.uint64(2) + np.uint64(1)
        self._minima = [array("I") for _ in range(BANDS)]
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
        first = len(self._exact) - len(texts)
        # A story without runs gets minima of its own, so that it looks like no other.
        own = _mix(np.arange(first, first + len(texts), dtype=np.uint64))
        for multiplier, column in zip(self._multipliers, self._minima, strict=True):
            minima = (own * multiplier >> np.uint64(32)).astype(np.uint32)
            if len(starts):
                minima[has_runs] = np.minimum.reduceat(
                    (runs * multiplier >> np.uint64(32)).astype(np.uint32), starts
                )
            column.frombytes(minima.tobytes())

    def find(
        self,
        text_of: Callable[[int], str],
        *,
        reference: NDArray[np.bool_] | None = None,
        keep_reference: bool = False,
        on_band: Callable[[], None] | None = None,
    ) -> Duplicates:
        """Name the duplicates; of each group the first story stays.

        `text_of(i)` gives story i again. Stories marked in `reference` (those of the evaluation split) come
        before all others, so a copy shared by both splits leaves the other one; with `keep_reference` none of
        them is ever named. `on_band` is called `BANDS` times.
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
        return Duplicates(exact=exact, near=near, compared=search.compared)


class _NearSearch:
    """One search for near copies over stories in rank order; marks them in `dropped` as it goes."""

    def __init__(
        self,
        minima: list[array[int]],
        order: NDArray[np.int64],
        dropped: NDArray[np.bool_],
        safe: int,
        text_of: Callable[[int], str],
    ) -> None:
        self._minima = [
            np.frombuffer(column, np.uint32) if len(column) else np.empty(0, np.uint32) for column in minima
        ]
        self._order = order
        self._dropped = dropped
        self._safe = safe
        self._kept_for: dict[int, int] = {}
        self._different: set[tuple[int, int]] = set()
        self._runs_of = lru_cache(maxsize=128)(lambda rank: run_hashes(text_of(int(order[rank]))))
        self.compared = 0

    def scan(self, band: int) -> None:
        """Compare the stories that fall together in one band."""
        alive = np.flatnonzero(~self._dropped)
        minima = self._minima[band][self._order[alive]]
        following = self._minima[(band + 1) % BANDS][self._order[alive]]
        ranked = np.lexsort((following, minima))
        alive, minima = alive[ranked], minima[ranked]
        del following, ranked
        for lag in range(1, min(WINDOW, len(alive) - 1) + 1):
            together = np.flatnonzero(minima[lag:] == minima[:-lag])
            if not len(together):
                break
            one, other = alive[together], alive[together + lag]
            low, high = np.minimum(one, other), np.maximum(one, other)
            agreeing = np.zeros(len(low), np.int8)
            for column in self._minima:
                agreeing += column[self._order[low]] == column[self._order[high]]
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
        self.compared += 1
        if shared_share(self._runs_of(low), self._runs_of(high)) >= SHARED_RUNS:
            self._dropped[high] = True
            self._kept_for[high] = low
        else:
            if len(self._different) >= _SEEN_PAIRS:
                self._different.clear()  # costs a second look at some pairs, never a wrong answer
            self._different.add((low, high))
