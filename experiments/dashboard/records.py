"""What the page is told of a store: plain records that cross a pipe as JSON and come back typed.

Nothing in them may be private: no address, no folder, no tag that was not chosen here. Times are milliseconds since
1970, as MLflow keeps them; a figure that is missing or no number is None.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One training run."""

    id: str
    """MLflow's, whole."""
    name: str
    status: str
    """`running`, `finished`, `stopped`, `killed` or `failed`."""
    preset: str
    started: int
    minutes: float | None
    """Of the training itself, interruptions left out."""
    tokens: int | None
    bits_per_byte: float | None
    """The best on held-out stories."""
    parameters: int | None
    data: str
    stories: bool
    """Whether it kept sample stories."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One figure of one run as training went on."""

    run: str
    points: tuple[tuple[int, float, float], ...]
    """(tokens seen, minutes gone, value), in order."""

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        """From what `as_plain` made."""
        return cls(run=plain["run"], points=tuple((int(t), m, v) for t, m, v in plain["points"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What a run wrote at one evaluation."""

    step: int
    tokens: int
    bits_per_byte: float | None
    stories: tuple[tuple[str, str], ...]
    """(prompt, continuation); the same prompts and dice each time."""

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        """From what `as_plain` made."""
        stories = tuple((prompt, told) for prompt, told in plain["stories"])
        return cls(**{**plain, "stories": stories})


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkRow:
    """One benchmark."""

    id: str
    target: str
    digest: str
    """Of the model folder; empty where the target does not tell it."""
    started: int
    passed: bool | None
    figures: dict[str, float]
    """By the names of DESIGN §2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow:
    """One threshold's verdict."""

    metric: str
    verdict: str
    """`pass`, `fail` or `undecided`."""
    value: float | None
    unit: str
    bound: str
    """`at_least`, `above`, `at_most` or `below`."""
    threshold: float
    margin: float | None
    low: float | None
    high: float | None
    n: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRow:
    """The gate's newest decision on a version."""

    verdict: str
    decided: int
    champion: str
    """Digest of the champion that it was compared with; empty: there was none."""
    checks: tuple[CheckRow, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        """From what `as_plain` made."""
        checks = tuple(CheckRow(**check) for check in plain["checks"])
        return cls(**{**plain, "checks": checks, "notes": tuple(plain["notes"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRow:
    """One registered version."""

    number: int
    digest: str
    aliases: tuple[str, ...]
    created: int
    tags: dict[str, str]
    """Those that say what it is made of and what became of it: `recipe`, `step`, `promoted` …"""
    decision: DecisionRow | None

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        """From what `as_plain` made."""
        decision = plain["decision"] and DecisionRow.of(plain["decision"])
        return cls(**{**plain, "aliases": tuple(plain["aliases"]), "decision": decision})


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """All that the page shows before anything is chosen; newest first in each list."""

    runs: tuple[RunRow, ...] = ()
    benchmarks: tuple[BenchmarkRow, ...] = ()
    versions: tuple[VersionRow, ...] = ()
    more: bool = False
    """Whether older training runs are left out."""

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        """From what `as_plain` made."""
        return cls(
            runs=tuple(RunRow(**row) for row in plain["runs"]),
            benchmarks=tuple(BenchmarkRow(**row) for row in plain["benchmarks"]),
            versions=tuple(VersionRow.of(row) for row in plain["versions"]),
            more=plain["more"],
        )


def as_plain(record: Any) -> dict[str, Any]:
    """A record as values that JSON knows."""
    return asdict(record)
