"""What a training run tells the outside: a few plain records, and the protocol of whoever listens.

The loop knows nothing of MLflow or of terminals; it hands these records to its observers, which log them,
draw them or test them. All times are seconds of the run itself, interruptions left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Outcome = Literal["finished", "stopped", "failed"]
"""`finished`: the budget was used or early stopping decided. `stopped`: interrupted by hand. `failed`: an
error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """What is known before the first step."""

    recipe: dict[str, Any]
    """The whole recipe, nested as in its file."""
    parameters: int
    data: dict[str, Any]
    """`meta.json` of the shards, its `digest` included."""
    data_folder: Path
    out: Path
    world_size: int
    resumed_from: int
    """Step at which the run goes on; 0 for a new one."""
    init: str | None = None
    """Digest of the model whose weights it started from; None: random ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimiser step."""

    step: int
    tokens: int
    """Target tokens seen since the run began."""
    loss: float
    """Mean nats a token of this step's batch."""
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    elapsed: float
    progress: float
    """Share of the budget used, 0 to 1: the larger of steps done and minutes gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """One look at the validation stories, with what the model writes at this step."""

    step: int
    tokens: int
    loss: float
    bits_per_byte: float
    best: bool
    """True when no earlier evaluation of this run was lower."""
    samples: tuple[tuple[str, str], ...]
    """(prompt, continuation) pairs; the same prompts and dice at every evaluation."""
    elapsed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """How it ended."""

    outcome: Outcome
    reason: str
    step: int
    tokens: int
    best_bits_per_byte: float | None
    checkpoint: Path | None
    """The best checkpoint kept."""


class EndRun(Exception):
    """What an observer raises from `stepped` or `evaluated` to end a run: it is saved, and `stopped` for this reason.

    At an evaluation that uses up the budget it comes too late, and the run is `finished`.
    """


class Observer(Protocol):
    """Listens to a run; called by the first process only, in order, from one thread."""

    def started(self, start: RunStart) -> None:
        """Called once, before the first step."""

    def stepped(self, report: StepReport) -> None:
        """Called after each optimiser step; should return at once."""

    def evaluated(self, report: EvaluationReport) -> None:
        """Called after each evaluation, when the best network so far is on disk."""

    def ended(self, end: RunEnd) -> None:
        """Called once, however the run ended."""
