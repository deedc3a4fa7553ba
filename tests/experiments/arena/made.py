"""Votes of made-up users."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.ab.events import Choice, Vote, hashed

DIGESTS = {"old": "c" * 64, "new": "d" * 64}
SETTINGS = "temperature=0.85"


def vote(
    first: str = "old",
    second: str = "new",
    choice: Choice = "second",
    *,
    user: str = "lily",
    prompt: str = "One day",
    settings: tuple[str, str] = (SETTINGS, SETTINGS),
    **given: Any,
) -> Vote:
    about = {
        f"{side}_{name}": value
        for side, contestant, setting in (("first", first, settings[0]), ("second", second, settings[1]))
        for name, value in {
            "digest": DIGESTS.get(contestant, "e" * 64),
            "settings": setting,
            "story": hashlib.sha256(contestant.encode()).hexdigest(),
            "words": 120,
            "read": 20.0,
        }.items()
    }
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    plain = {"user_hash": hashed(user, ""), "prompt_digest": digest, "seed": 7, "seconds": 40.0, "choice": choice}
    return Vote(**{**plain, "first": first, "second": second, **about, **given})


def votes(count: int, *, won: float, seed: int = 0) -> Iterator[Vote]:
    """`count` users, each of whom prefers `new` to `old` with a probability of `won`; sides at random."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        left = rng.random() < 0.5
        first, second = ("new", "old") if left else ("old", "new")
        choice: Choice = "first" if left == (rng.random() < won) else "second"
        yield vote(first, second, choice, user=f"user-{number}")
