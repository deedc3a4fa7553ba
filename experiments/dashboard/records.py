"""What the page gets to know of a store: plain records that cross a pipe.

They hold nothing private: no address, no folder, no tag that was not chosen here. Times are milliseconds since 1970, as
MLflow keeps them; a figure that is missing or not finite is None.

`TrainingRecord` is the file in the repository that shows how the shipped model was made where there is no store
(`experiments.dashboard.recorded`).
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Measure = Literal["held-out", "training", "rate", "gradient", "speed", "processor", "memory"]
"""What a curve shows: bits per byte on held-out stories, loss in training, learning rate, norm of the gradient,
tokens a second, and of the machine the share of its processors (%) and the memory (MB) in use."""


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Row(Record):
    """Base of what stands in a list of the page."""

    recorded: bool = False
    """It comes from the record of the shipped model, not from the store."""


class RunRow(Row):
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
    ages: int = 0
    """Networks of it that are kept: see `AgeRow`."""
    experiment: str = ""
    """Id of its experiment, by which the MLflow UI addresses it."""
    settings: dict[str, str] = {}
    """Its recipe as MLflow parameters (`optimizer.matrix_lr`), data, start, code and processor."""
    sweep: str = ""
    """Name of the sweep that it is a trial of."""


class Curve(Record):
    """One figure of one run over the course of training."""

    run: str
    points: tuple[tuple[int, int, float, float], ...]
    """(step, tokens seen, minutes passed, value), in order."""


class SampleSet(Record):
    """The sample stories of a run at one evaluation."""

    step: int
    tokens: int
    bits_per_byte: float | None
    stories: tuple[tuple[str, str], ...]
    """(prompt, continuation); the same prompts and random numbers each time."""


class AgeRow(Record):
    """An age of a run: its network at one step, which a prompt can be continued by."""

    step: int
    tokens: int
    bits_per_byte: float | None
    held_out: bool
    """Whether that is of the stories that it has not seen; if not, of the ones that it read at this step."""


class EvaluationRow(Row):
    """One evaluation of a model's quality."""

    id: str
    digest: str
    """Of the model folder."""
    data: str
    """Names of the files of held-out stories."""
    stories: int | None
    """Held-out stories."""
    started: int
    figures: dict[str, float]
    """As `story evaluate` logs them."""


class BenchmarkRow(Row):
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


class VersionRow(Row):
    """One registered version."""

    number: int
    digest: str
    aliases: tuple[str, ...]
    created: int
    tags: dict[str, str]
    """Those that describe its training and its promotions: `model.recipe`, `model.step`, `promoted` …"""
    decision: DecisionRow | None
    run: str = ""
    """Of the training that it came of."""


class Overview(Record):
    """Everything that the page shows before the user chooses anything; newest first in each list."""

    runs: tuple[RunRow, ...] = ()
    evaluations: tuple[EvaluationRow, ...] = ()
    benchmarks: tuple[BenchmarkRow, ...] = ()
    versions: tuple[VersionRow, ...] = ()
    more: bool = False
    """Whether older training runs are left out."""
    reason: str = ""
    """Why nothing of the store is among them, where only the record is."""
    exported: int | None = None
    """When the record was exported whose rows are among them."""


class TrainingRecord(Record):
    """How a model was made, as `story record` exports it."""

    format: Literal[1] = 1
    exported: int
    overview: Overview
    """Its training runs, and the version that came of them with its evaluations, benchmarks and decision."""
    curves: dict[Measure, tuple[Curve, ...]]
    samples: dict[str, tuple[SampleSet, ...]]
    """By run."""
