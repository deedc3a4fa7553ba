"""Evidence of a version and its champion: fetched, checked for digest and age, or missing for a stated reason.

Evidence counts for one artifact only, and not for ever. Whatever is missing, of another digest, damaged or too old is
kept as the sentence that says so: the checks that needed it are undecided for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from experiments.benchmark.evidence import AGAINST, BenchmarkEvidence
from experiments.common.evidence_runs import EvidenceError, StoredEvidence
from experiments.quality.evidence import Losses, QualityEvidence
from model.errors import InputError
from model.validation import Record, fault_of

MAX_AGE = timedelta(days=30)
"""Older evidence was most likely measured with other code on another machine."""


class ChampionLosses(Record):
    """The champion's losses, to compare with story by story: from the store, or from a file."""

    format: Literal[1] = 1
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    data_digest: str
    losses: Losses
    run_id: str = Field(default="", exclude=True)
    """The MLflow run, or the file, that they come from."""


Stored = TypeVar("Stored", bound=StoredEvidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything that a decision is based on: evidence of each kind, or the sentence that says why there is none."""

    digest: str
    quality: QualityEvidence | str
    benchmark: BenchmarkEvidence | str
    champion: str | None = None
    """The champion's digest; None: there is none, or it is this very artifact."""
    champion_losses: QualityEvidence | ChampionLosses | str = ""
    comparison: BenchmarkEvidence | str = ""
    """The benchmark of this version that compared it with the champion."""
    speed_compared: bool = True
    """False where the champion is a file and no benchmark compared its model with this one: speeds of two machines
    cannot be compared."""

    def as_dict(self) -> dict[str, dict[str, str]]:
        """By kind: `sources`, the MLflow runs or files that the checks are based on, and why others are `missing`."""
        kinds: dict[str, StoredEvidence | ChampionLosses | str] = {
            "quality": self.quality,
            "benchmark": self.benchmark,
            "comparison": self.comparison,
            "champion": self.champion_losses,
        }
        missing = {kind: found for kind, found in kinds.items() if isinstance(found, str) and found}
        sources = {kind: found.run_id for kind, found in kinds.items() if not isinstance(found, str)}
        return {"sources": sources, "missing": missing}


def gather(uri: str, digest: str, *, champion: str | None = None, against_file: Path | None = None) -> Evidence:
    """The newest evidence of the model `digest` in the store at `uri`, and of its champion.

    Args:
        champion: the champion's digest, if there is one.
        against_file: a champion's losses as `save_champion` wrote them, instead of a champion in the store. Its speed
            counts where a benchmark of this store compared its model folder with this one.

    Raises:
        InputError: the store or the file cannot be used.
    """
    no_evaluation = "no evaluation{} of {:.12} is there; `story evaluate` makes one"
    quality = _newest(QualityEvidence, uri, digest, no_evaluation.format("", digest))
    no_benchmark = "no such benchmark of this artifact is there; `story benchmark{}` makes one"
    benchmark = _newest(BenchmarkEvidence, uri, digest, no_benchmark.format(""))
    losses: QualityEvidence | ChampionLosses | str = ""
    other = "models:/story-writer@champion"
    if against_file is not None:
        losses = load_champion(against_file)
        champion, other = losses.digest, "FOLDER"
    if champion is None or champion == digest:
        return Evidence(digest=digest, quality=quality, benchmark=benchmark)
    if against_file is None:
        stories = "" if isinstance(quality, str) else quality.tags.get("data.digest", "")
        on, tags = (" on the same stories", {"data.digest": stories}) if stories else ("", {})
        losses = _newest(QualityEvidence, uri, champion, no_evaluation.format(on, champion), tags)
        if isinstance(losses, str):
            losses = f"of the champion: {losses}"
    comparison = _newest(
        BenchmarkEvidence, uri, digest, no_benchmark.format(f" --against {other}"), {AGAINST: champion}
    )
    return Evidence(
        digest=digest,
        quality=quality,
        benchmark=benchmark,
        champion=champion,
        champion_losses=losses,
        comparison=comparison,
        speed_compared=against_file is None or not isinstance(comparison, str),
    )


def save_champion(evidence: QualityEvidence, path: Path) -> None:
    """Write a champion's losses to a file, so that a CI job can compare with it without a server."""
    data_digest = evidence.tags.get("data.digest", "")
    losses = ChampionLosses(digest=evidence.digest, data_digest=data_digest, losses=evidence.losses)
    path.write_text(losses.model_dump_json() + "\n", encoding="utf-8")


def load_champion(path: Path) -> ChampionLosses:
    """Read what `save_champion` wrote. Raises `InputError` that names the file and what is wrong."""
    try:
        return ChampionLosses.model_validate_json(path.read_bytes()).model_copy(update={"run_id": path.name})
    except OSError as error:
        raise InputError("against-file", f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise InputError("against-file", f"{path} is not a champion's losses ({' '.join(fault_of(error))})") from None


def _newest(
    kind: type[Stored], uri: str, digest: str, absent: str, tags: Mapping[str, str] | None = None
) -> Stored | str:
    """The newest evidence, or why there is none that counts. Raises `InputError` when the store cannot be used."""
    try:
        item = kind.newest(uri, digest, tags)
    except EvidenceError as error:
        return str(error)
    if item is None:
        return absent
    age = datetime.now(UTC) - item.began
    if age > MAX_AGE:
        what = kind.experiment.removeprefix("story-")
        return f"the newest {what} is {age.days} days old; evidence counts for {MAX_AGE.days}"
    return item
