"""What is allowed: an amount of stories or tokens in a time, for one client or for all together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from limits import RateLimitItem, parse_many

from model.errors import InputError

Scope = Literal["client", "all"]
Resource = Literal["stories", "tokens"]

OFF = "off"
MAX_UNITS = 20_000
"""A window counts its tokens in at most so many units: one entry of 20 bytes in Redis each, however large the amount.

Each story is rounded up, so with few units many short stories would be charged far too much: with a thousand, no more
than a thousand stories would fit into any window."""
LONGEST = 86_400 * 31
"""Seconds of the longest time: what is counted is remembered for so long."""


@dataclass(frozen=True, slots=True)
class Quota:
    """One amount in one time."""

    scope: Scope
    resource: Resource
    item: RateLimitItem
    """Amount (in units) and time, as the `limits` library knows them."""
    unit: int
    """Stories or tokens that count as one. Above 1 only where more than `MAX_UNITS` tokens are allowed."""

    @property
    def amount(self) -> int:
        """Units allowed in a time."""
        return self.item.amount

    @property
    def allowed(self) -> int:
        """Stories or tokens allowed in a time."""
        return self.item.amount * self.unit

    @property
    def seconds(self) -> int:
        """The time."""
        return self.item.get_expiry()

    def key(self, client: str) -> str:
        """Name of the window in which `client`'s share is counted."""
        who = (client,) if self.scope == "client" else ()
        return self.item.key_for(self.scope, self.resource, *who)

    def cost(self, stories: int, tokens: int) -> int:
        """What so many stories, of so many tokens together, cost, in units."""
        return math.ceil((stories if self.resource == "stories" else tokens) / self.unit)

    def __str__(self) -> str:
        many = self.item.multiples
        name = self.item.GRANULARITY.name
        return f"{self.allowed} {self.resource} per {f'{many} {name}s' if many > 1 else name}"


def read_quotas(name: str, text: str, scope: Scope, resource: Resource) -> list[Quota]:
    """The quotas that a setting says: `30/minute`, `5/second; 2000/day`, or `off` for none.

    Raises `InputError` that names the setting.
    """
    if text.strip().lower() == OFF:
        return []
    try:
        items = parse_many(text)
    except (ValueError, OverflowError):
        items = []
    wrong = not items or any(item.amount < 1 or not 1 <= item.get_expiry() <= LONGEST for item in items)
    if wrong or any(item.amount > 10**9 for item in items):
        raise InputError(
            name, f"must be like 30/minute or 5/second; 2000/day (a month at most), or off, got {text!r}"
        )
    return [_quota(item, scope, resource) for item in items]


def _quota(item: RateLimitItem, scope: Scope, resource: Resource) -> Quota:
    unit = max(1, math.ceil(item.amount / MAX_UNITS)) if resource == "tokens" else 1
    return Quota(scope, resource, type(item)(item.amount // unit, item.multiples, namespace="story"), unit)
