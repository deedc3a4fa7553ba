"""What the page gets to know of a store: plain records that cross a pipe.

They hold nothing private: no address, no folder, no tag that was not chosen here. Times are milliseconds since 1970, as
MLflow keeps them; a figure that is missing or not finite is None.
"""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunRow(Record):
    """One training run."""

    id: str
    """MLflow's, whole."""
    name: str
    status: str
    """`running`, `finished`, `stopped`, `killed` or `failed`."""
    preset: str
    started: int
    minutes: float | None
    """Of the training itself, without interruptions."""
    tokens: int | None
    bits_per_byte: float | None
    """The best on held-out stories."""
    parameters: int | None
    data: str
    stories: bool
    """Whether it kept sample stories."""


class Curve(Record):
    """One figure of one run over the course of training."""

    run: str
    points: tuple[tuple[int, float, float], ...]
    """(tokens seen, minutes passed, value), in order."""


class SampleSet(Record):
    """The sample stories of a run at one evaluation."""

    step: int
    tokens: int
    bits_per_byte: float | None
    stories: tuple[tuple[str, str], ...]
    """(prompt, continuation); the same prompts and random numbers each time."""


class BenchmarkRow(Record):
    """One benchmark."""

    id: str
    target: str
    digest: str
    """Of the model folder; empty where the target does not state it."""
    started: int
    passed: bool | None
    figures: dict[str, float]
    """As `story benchmark` logs them."""


class DecisionRow(Record):
    """The gate's newest decision on a version."""

    verdict: str
    decided: int
    champion: str
    """Digest of the champion that it was compared with; empty: there was none."""
    checks: tuple[dict[str, str], ...]
    """Each with every figure in words: `metric`, `verdict`, `value`, `threshold`, `margin`, `bounds`, `n`, `why`."""
    notes: tuple[str, ...]


class VersionRow(Record):
    """One registered version."""

    number: int
    digest: str
    aliases: tuple[str, ...]
    created: int
    tags: dict[str, str]
    """Those that describe its training and its promotions: `model.recipe`, `model.step`, `promoted` …"""
    decision: DecisionRow | None


class Overview(Record):
    """Everything that the page shows before the user chooses anything; newest first in each list."""

    runs: tuple[RunRow, ...] = ()
    benchmarks: tuple[BenchmarkRow, ...] = ()
    versions: tuple[VersionRow, ...] = ()
    more: bool = False
    """Whether older training runs are left out."""
