"""Assign each user to a variant of a test, as `STORY_SPLIT` says: `champion:90,challenger:10`.

Assignment is stateless: weighted rendezvous hashing of the user's id and the test's name (Schindelhain and Schomaker,
"Weighted Distributed Hash Tables", SPAA 2005, the logarithmic method). Each variant draws a number from a hash of test,
variant and user, and the best one by weight wins. So a user gets the same variant after a restart and on every replica.
A variant's number depends on no other variant, so raising one weight moves users into that variant only, and removing
a variant moves only its own users.
"""

import hashlib
import math
import re
from dataclasses import dataclass

from model.errors import InputError

SETTING = "STORY_SPLIT"
DEFAULT_VARIANT = "default"
"""The model that would serve without a test."""
MAX_VARIANTS = 8
MAX_WEIGHT = 1_000_000
MAX_NAME = 100
ALLOWED = "must be variants with weights, such as champion:90,challenger:10"
_NAME = re.compile(r"[\w.~/@+-]{1,200}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Variant:
    """One model version under test, and its weight."""

    name: str
    """A registered version's number, alias or digest, a model folder, a Modal deployment, or `default`."""
    weight: int


@dataclass(frozen=True, slots=True)
class TrafficSplit:
    """A test: its name, and its variants in the order given; the others are compared with the first."""

    name: str
    variants: tuple[Variant, ...]

    def __str__(self) -> str:
        return ",".join(f"{variant.name}:{variant.weight}" for variant in self.variants)

    def shares(self) -> dict[str, float]:
        """Return the share of users that each variant gets; they sum to 1."""
        total = sum(variant.weight for variant in self.variants)
        return {variant.name: variant.weight / total for variant in self.variants}

    def assign(self, user: str) -> str:
        """Return the name of a user's variant: always the same for the same user, test and split."""
        best, chosen = math.inf, self.variants[0].name
        for variant in self.variants:
            if variant.weight:
                # Exponential with rate `weight`: the smallest of several is this one's with chance weight/total.
                drawn = -math.log(_uniform(self.name, variant.name, user)) / variant.weight
                if drawn < best:
                    best, chosen = drawn, variant.name
        return chosen


def parse_split(text: str, name: str) -> TrafficSplit:
    """Parse `text`, variants with weights, as the test called `name`.

    Weights are whole numbers; they need not sum to 100, and a variant of weight 0 gets nobody. Raises `InputError`,
    which names what is wrong.
    """
    if not 1 <= len(name) <= MAX_NAME:
        raise InputError("STORY_SPLIT_NAME", f"must have 1 to {MAX_NAME} characters, got {len(name)}")
    variants: dict[str, Variant] = {}
    for part in text.split(","):
        variant, colon, weight = part.strip().rpartition(":")
        if not colon or not variant or not weight:
            fault = f"; {_shortened(part)} is not a variant with a weight"
        elif not _NAME.fullmatch(variant):
            fault = f"; a variant's name holds letters, digits and ._~/@+- only, got {_shortened(variant)}"
        elif not (weight.isascii() and weight.isdecimal() and int(weight[:20]) <= MAX_WEIGHT):
            fault = f"; a weight is a whole number from 0 to {MAX_WEIGHT}, got {_shortened(weight)}"
        elif variant in variants:
            fault = f"; {variant} is given twice"
        else:
            variants[variant] = Variant(variant, int(weight))
            continue
        raise InputError(SETTING, ALLOWED + fault)
    if len(variants) > MAX_VARIANTS:
        raise InputError(SETTING, f"{ALLOWED}, at most {MAX_VARIANTS} of them; got {len(variants)}")
    if not any(variant.weight for variant in variants.values()):
        raise InputError(SETTING, f"{ALLOWED}; no variant has a weight above 0")
    return TrafficSplit(name, tuple(variants.values()))


def without_test(name: str) -> TrafficSplit:
    """Return the split that gives everyone the default model."""
    return TrafficSplit(name, (Variant(DEFAULT_VARIANT, 1),))


def _uniform(test: str, variant: str, user: str) -> float:
    """Hash to a number above 0 and below 1, uniform over users and independent for each test and variant."""
    digest = hashlib.blake2b(digest_size=8, person=b"story-split")
    for text in (test, variant, user):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8) + data)
    return ((int.from_bytes(digest.digest()) >> 11) + 0.5) / 2**53


def _shortened(text: str) -> str:
    text = repr(text)
    return text if len(text) <= 60 else f"{text[:60]}…"
