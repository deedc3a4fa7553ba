"""Everything that one evaluation found, as plain values for a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from experiments.common.statistics import Estimate, ratio_of_sums
from experiments.quality.floor import Floor
from experiments.quality.held_out import Figures, HeldOut, RuntimeName
from experiments.quality.judge import Judgement
from experiments.quality.positions import PlaceLoss
from experiments.quality.written import Written


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
    """Runtimes that could not be asked, and why."""
    not_measured: dict[str, str]
    """What else was left out (`written`, `memorisation`, `judge`), and why."""
    floor: Floor | None = None
    places: tuple[PlaceLoss, ...] = ()
    """Loss by place in the story, of the served runtime."""
    written: Written | None = None
    """What the served model writes; None if it was not asked to."""
    floor_written: Written | None = None
    """What the floor writes from the same prompts, for the first of the seeds."""
    judgement: Judgement | None = None
    training_name: str | None = None
    """The stories that were searched for copies; None: none were given."""
    seen_in_training: int | None = None
    """Held-out stories that stand in them word for word."""

    @property
    def runtime(self) -> RuntimeName:
        """The first runtime measured: what readers get, unless it was left out."""
        return next(iter(self.runtimes))

    @property
    def served(self) -> Figures:
        """Figures of `runtime`."""
        return self.runtimes[self.runtime]

    @property
    def left_out(self) -> dict[str, str]:
        """Everything that was not measured, and why."""
        return {str(name): reason for name, reason in self.skipped.items()} | self.not_measured

    @property
    def stories(self) -> int:
        return len(self.held_out.texts)

    @property
    def bytes(self) -> int:
        return int(self.held_out.bytes.sum())

    @property
    def tokens(self) -> int:
        """Prediction targets: every token, and one end a story."""
        return sum(map(len, self.held_out.tokens))

    def intervals(self) -> dict[str, Estimate]:
        """`bits_per_byte` and `loss` of the served runtime, stories resampled."""
        nats, lengths = self.served.story_nats, [len(tokens) for tokens in self.held_out.tokens]
        return {
            "bits_per_byte": ratio_of_sums(nats / math.log(2), self.held_out.bytes),
            "loss": ratio_of_sums(nats, lengths),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values; the served runtime's figures stand at the top."""
        return {
            "model": self.model, "digest": self.digest, "data": list(self.data),
            "bits_per_byte": self.served.bits_per_byte, "loss": self.served.loss,
            "tokens": self.tokens, "bytes": self.bytes, "stories": self.stories,
            "runtimes": {
                name: {"bits_per_byte": figures.bits_per_byte, "loss": figures.loss}
                for name, figures in self.runtimes.items()
            },
            "skipped": dict(self.skipped),
            "written": self.written.as_dict() if self.written else None,
            "data_digest": self.held_out.digest,
            "intervals": {
                name: [estimate.low, estimate.high] for name, estimate in self.intervals().items()
            },
            "places": [place.as_dict() for place in self.places],
            "floor": self._floor_dict(),
            "memorisation": self._memorisation(),
            "judge": self.judgement.as_dict() if self.judgement else None,
            "not_measured": dict(self.not_measured),
        }  # fmt: skip

    def _floor_dict(self) -> dict[str, Any] | None:
        floor = self.floor
        if floor is None:
            return None
        return {
            "bits_per_byte": floor.figures.bits_per_byte, "loss": floor.figures.loss,
            "order": floor.table.order, "source": floor.source,
            "stories": floor.stories, "tokens": floor.tokens,
            "written": self.floor_written.as_dict() if self.floor_written else None,
        }  # fmt: skip

    def _memorisation(self) -> dict[str, Any] | None:
        if self.training_name is None:
            return None
        longest = self.written.longest_copy if self.written else None
        return {
            "source": self.training_name,
            "held_out_seen": self.seen_in_training,
            "longest": None if longest is None else {
                "words": longest.words, "text": longest.text, "story": longest.story
            },
        }  # fmt: skip
