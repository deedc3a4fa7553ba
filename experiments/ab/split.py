"""Which version a reader gets: `champion:90,challenger:10`, and the arm of one visitor.

Nothing is remembered. An arm is computed from the visitor's id and the test's name by weighted rendezvous hashing
(Schindelhain and Schomaker, "Weighted Distributed Hash Tables", SPAA 2005, the logarithmic method): each arm draws a
number from a hash of test, arm and visitor, and the best one by share wins. So the same visitor meets the same arm
after a restart and on every replica; and as an arm's number depends on no other arm, raising one arm's share moves
visitors into that arm only, and taking an arm away moves its visitors only.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass

from model.errors import InputError

SETTING = "STORY_SPLIT"
USUAL = "default"
"""The arm that the demo would write with if there were no test."""
MAX_ARMS = 8
MAX_SHARE = 1_000_000
MAX_NAME = 100
ALLOWED = "must be arms with shares, such as champion:90,challenger:10"
_NAME = re.compile(r"[\w.~/@+-]{1,200}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Share:
    """One arm: what writes there, and how many parts of the readers it gets."""

    arm: str
    """A registered version's number, alias or digest, a model folder, a Modal deployment, or `default`."""
    parts: int


@dataclass(frozen=True, slots=True)
class Split:
    """A test: its name, and its arms in the order given; the first is what the others are compared with."""

    name: str
    shares: tuple[Share, ...]

    def __str__(self) -> str:
        return ",".join(f"{share.arm}:{share.parts}" for share in self.shares)

    @property
    def total(self) -> int:
        """Parts of all arms together."""
        return sum(share.parts for share in self.shares)

    def chances(self) -> dict[str, float]:
        """For each arm, the share of visitors that it gets; they sum to 1."""
        return {share.arm: share.parts / self.total for share in self.shares}

    def arm_of(self, visitor: str) -> str:
        """The arm of one visitor: always the same for the same visitor, test and split."""
        best, chosen = math.inf, self.shares[0].arm
        for share in self.shares:
            if share.parts:
                # Exponential with rate `parts`: the smallest of several is theirs with chance parts/total.
                drawn = -math.log(_uniform(self.name, share.arm, visitor)) / share.parts
                if drawn < best:
                    best, chosen = drawn, share.arm
        return chosen


def parse_split(text: str, name: str) -> Split:
    """Read `text`, arms with shares, as the test called `name`.

    Shares are whole numbers of parts; they need not sum to 100, and an arm of 0 gets nobody. Raises `InputError`
    that names what is wrong.
    """
    if not 1 <= len(name) <= MAX_NAME:
        raise InputError("STORY_SPLIT_NAME", f"must have 1 to {MAX_NAME} characters, got {len(name)}")
    shares: list[Share] = []
    for part in text.split(","):
        arm, colon, parts = part.strip().rpartition(":")
        if not colon or not arm or not parts:
            raise InputError(SETTING, f"{ALLOWED}; {_shown(part)} is not an arm with a share")
        if not _NAME.fullmatch(arm):
            raise InputError(
                SETTING, f"{ALLOWED}; an arm's name holds letters, digits and ._~/@+- only, got {_shown(arm)}"
            )
        if not (parts.isascii() and parts.isdecimal() and int(parts[:20]) <= MAX_SHARE):
            raise InputError(
                SETTING, f"{ALLOWED}; a share is a whole number from 0 to {MAX_SHARE}, got {_shown(parts)}"
            )
        if arm in (share.arm for share in shares):
            raise InputError(SETTING, f"{ALLOWED}; {arm} stands there twice")
        shares.append(Share(arm, int(parts)))
    if len(shares) > MAX_ARMS:
        raise InputError(SETTING, f"{ALLOWED}, at most {MAX_ARMS} of them; got {len(shares)}")
    if not any(share.parts for share in shares):
        raise InputError(SETTING, f"{ALLOWED}; no arm has a share above 0")
    return Split(name, tuple(shares))


def everyone(name: str) -> Split:
    """No test: all readers get the usual model."""
    return Split(name, (Share(USUAL, 1),))


def _uniform(test: str, arm: str, visitor: str) -> float:
    """A number above 0 and below 1, even over visitors, and of its own for each test and arm."""
    digest = hashlib.blake2b(digest_size=8, person=b"story-split")
    for text in (test, arm, visitor):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8) + data)
    return ((int.from_bytes(digest.digest()) >> 11) + 0.5) / 2**53


def _shown(text: str) -> str:
    text = repr(text)
    return text if len(text) <= 60 else f"{text[:60]}…"
