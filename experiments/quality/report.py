"""Everything that one evaluation found, as one record."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from experiments.common.statistics import Estimate, ratio_of_sums
from experiments.quality.generation import StorySet, Written
from experiments.quality.held_out import Figures, HeldOut, PlaceLoss, RuntimeName
from experiments.quality.judge import Judgement
from experiments.quality.ngram import NgramBaseline


@dataclass(frozen=True, slots=True)
class QualityReport:
    """Figures of one model on one set of stories."""

    model: str
    digest: str
    """Of the model folder."""
    data: tuple[str, ...]
    held_out: HeldOut
    runtimes: dict[RuntimeName, Figures]
    skipped: dict[RuntimeName, str]
    """Runtimes that could not be measured, and why."""
    not_measured: dict[str, str]
    """What else was left out (`written`, `memorisation`, `judge`), and why."""
    baseline: NgramBaseline | None = None
    places: tuple[PlaceLoss, ...] = ()
    """Loss by place in the story, of the served runtime."""
    written: Written | None = None
    """What the served model generates; None if it was not asked to."""
    baseline_written: Written | None = None
    """What the baseline generates from the same prompts, for the first seed."""
    rare_names: StorySet | None = None
    judgement: Judgement | None = None
    training_name: str | None = None
    """The stories that were searched for copies; None: none were given."""
    seen_in_training: int | None = None
    """Held-out stories that occur in them word for word."""

    @property
    def runtime(self) -> RuntimeName:
        """The first runtime measured, which is the one that serves."""
        return next(iter(self.runtimes))

    @property
    def served(self) -> Figures:
        return self.runtimes[self.runtime]

    @property
    def figures(self) -> dict[str, Figures]:
        """Of each runtime by its name, and of the `baseline`."""
        figures = {str(name): found for name, found in self.runtimes.items()}
        return figures | ({} if self.baseline is None else {"baseline": self.baseline.figures})

    @property
    def left_out(self) -> dict[str, str]:
        return {str(name): reason for name, reason in self.skipped.items()} | self.not_measured

    @property
    def stories(self) -> int:
        return len(self.held_out.texts)

    @property
    def bytes(self) -> int:
        return int(self.held_out.bytes.sum())

    @property
    def tokens(self) -> int:
        return sum(map(len, self.held_out.tokens))

    def intervals(self) -> dict[str, Estimate]:
        """`bits_per_byte` and `loss` of the served runtime, stories resampled."""
        nats, lengths = self.served.story_nats, [len(tokens) for tokens in self.held_out.tokens]
        return {
            "bits_per_byte": ratio_of_sums(nats / math.log(2), self.held_out.bytes),
            "loss": ratio_of_sums(nats, lengths),
        }

    def as_dict(self) -> dict[str, Any]:
        intervals = self.intervals().items()
        return {
            "model": self.model,
            "digest": self.digest,
            "data": list(self.data),
            **self.served.as_dict(),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "stories": self.stories,
            "runtimes": {name: figures.as_dict() for name, figures in self.runtimes.items()},
            "skipped": dict(self.skipped),
            "written": self.written.as_dict() if self.written else None,
            "data_digest": self.held_out.digest,
            "intervals": {name: [estimate.low, estimate.high] for name, estimate in intervals},
            "places": [asdict(place) for place in self.places],
            "baseline": self._baseline_dict(),
            "memorisation": self._memorisation(),
            "rare_names": self.rare_names.as_dict() if self.rare_names else None,
            "judge": self.judgement.as_dict() if self.judgement else None,
            "not_measured": dict(self.not_measured),
        }

    def _baseline_dict(self) -> dict[str, Any] | None:
        baseline = self.baseline
        if baseline is None:
            return None
        return baseline.figures.as_dict() | {
            "order": baseline.table.order,
            "source": baseline.source,
            "stories": baseline.stories,
            "tokens": baseline.tokens,
            "written": self.baseline_written.as_dict() if self.baseline_written else None,
        }

    def _memorisation(self) -> dict[str, Any] | None:
        if self.training_name is None:
            return None
        longest = self.written.longest_copy if self.written else None
        copy = {"words": longest.words, "text": longest.text, "story": longest.story} if longest else None
        return {"source": self.training_name, "held_out_seen": self.seen_in_training, "longest": copy}
