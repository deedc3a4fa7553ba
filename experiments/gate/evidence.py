"""Evidence of a version and its champion: fetched, checked for digest and age, or missing for a stated reason.

Evidence counts for one artifact only, and not for ever. Whatever is missing, of another digest, damaged or too old is
kept as the sentence that says so: the checks that needed it are undecided for that reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

from experiments.benchmark.evidence import BenchmarkEvidence, load_benchmark_evidence
from experiments.quality.evidence import QualityEvidence, StoryLoss, load_quality_evidence
from model.errors import InputError, StoryError

MAX_AGE = timedelta(days=30)
"""Older evidence was most likely measured with other code on another machine."""
FORMAT = 1
"""Of a file of a champion's losses."""

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True)
class Found(Generic[Kind]):
    """Evidence of one kind, or why there is none."""

    item: Kind | None = None
    missing: str = ""


@dataclass(frozen=True, slots=True)
class ChampionLosses:
    """The champion's losses, to compare with story by story: from the store, or from a file."""

    digest: str
    data_digest: str
    losses: tuple[StoryLoss, ...]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything that a decision is based on."""

    digest: str
    quality: Found[QualityEvidence]
    benchmark: Found[BenchmarkEvidence]
    champion: str | None = None
    """The champion's digest; None: there is none, or it is this very artifact."""
    champion_losses: Found[ChampionLosses] = field(default_factory=Found)
    comparison: Found[BenchmarkEvidence] = field(default_factory=Found)
    """The benchmark of this version that compared it with the champion."""
    speed_compared: bool = True
    """False where the champion is a file and no benchmark compared its model with this one: speeds of two machines
    cannot be compared."""

    def _kinds(self) -> dict[str, Found[Any]]:
        return {
            "quality": self.quality,
            "benchmark": self.benchmark,
            "comparison": self.comparison,
            "champion": self.champion_losses,
        }

    def sources(self) -> dict[str, str]:
        """MLflow runs or files that the checks are based on, by kind."""
        return {
            kind: getattr(found.item, "run_id", None) or found.item.source
            for kind, found in self._kinds().items()
            if found.item
        }

    def as_dict(self) -> dict[str, Any]:
        missing = {kind: found.missing for kind, found in self._kinds().items() if found.missing}
        return {"sources": self.sources(), "missing": missing}


def gather(uri: str, digest: str, *, champion: str | None = None, against_file: Path | None = None) -> Evidence:
    """The newest evidence of the model `digest` in the store at `uri`, and of its champion.

    Args:
        champion: the champion's digest, if there is one.
        against_file: a champion's losses as `save_champion` wrote them, instead of a champion in the store. Its speed
            counts where a benchmark of this store compared its model folder with this one.

    Raises:
        InputError: the store or the file cannot be used.
    """
    quality = _quality(uri, digest)
    benchmark = _benchmark(uri, digest, None, "`story benchmark`")
    losses: Found[ChampionLosses] = Found()
    other = "models:/story-writer@champion"
    if against_file is not None:
        saved = load_champion(against_file)
        losses, champion, other = Found(saved), saved.digest, "FOLDER"
    if champion is None or champion == digest:
        return Evidence(digest=digest, quality=quality, benchmark=benchmark)
    if against_file is None:
        data_digest = quality.item.tags.get("data.digest") if quality.item else None
        theirs = _quality(uri, champion, data_digest)
        losses = Found(
            _as_losses(theirs.item) if theirs.item else None,
            f"of the champion: {theirs.missing}" if theirs.missing else "",
        )
    comparison = _benchmark(uri, digest, champion, f"`story benchmark --against {other}`")
    return Evidence(
        digest=digest,
        quality=quality,
        benchmark=benchmark,
        champion=champion,
        champion_losses=losses,
        comparison=comparison,
        speed_compared=against_file is None or comparison.item is not None,
    )


def save_champion(evidence: QualityEvidence, path: Path) -> None:
    """Write a champion's losses to a file, so that a CI job can compare with it without a server."""
    champion = _as_losses(evidence)
    values = {"format": FORMAT, "digest": champion.digest, "data_digest": champion.data_digest}
    text = json.dumps(values | {"losses": [asdict(loss) for loss in champion.losses]})
    path.write_text(text + "\n", encoding="utf-8")


def load_champion(path: Path) -> ChampionLosses:
    """Read what `save_champion` wrote. Raises `InputError` that names the file and what is wrong."""
    try:
        values = json.loads(path.read_text("utf-8"))
        if values["format"] != FORMAT or not values["losses"]:
            raise ValueError("it is of another format, or empty")
        losses = tuple(map(StoryLoss.from_row, values["losses"]))
        return ChampionLosses(str(values["digest"]), str(values["data_digest"]), losses, path.name)
    except OSError as error:
        raise InputError("against-file", f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("against-file", f"{path} is not a champion's losses ({error})") from None


def _as_losses(evidence: QualityEvidence) -> ChampionLosses:
    data_digest = evidence.tags.get("data.digest", "")
    return ChampionLosses(evidence.digest, data_digest, evidence.losses, evidence.run_id)


def _quality(uri: str, digest: str, data_digest: str | None = None) -> Found[QualityEvidence]:
    on = " on the same stories" if data_digest else ""
    return _usable(
        lambda: load_quality_evidence(uri, digest, data_digest=data_digest),
        f"no evaluation{on} of {digest[:12]} is there; `story evaluate` makes one",
        lambda item: ("evaluation", datetime.fromtimestamp(item.ended_at / 1000, UTC)),
    )


def _benchmark(uri: str, digest: str, against: str | None, made_by: str) -> Found[BenchmarkEvidence]:
    return _usable(
        lambda: load_benchmark_evidence(uri, digest, against=against),
        f"no such benchmark of this artifact is there; {made_by} makes one",
        lambda item: ("benchmark", item.began),
    )


def _usable(load: Callable[[], Kind | None], absent: str, made: Callable[[Kind], tuple[str, datetime]]) -> Found[Kind]:
    """What `load` gives if it is neither damaged nor too old. Raises `InputError` when the store cannot be used."""
    try:
        item = load()
    except InputError:
        raise
    except StoryError as error:
        return Found(missing=str(error))
    if item is None:
        return Found(missing=absent)
    what, when = made(item)
    age = datetime.now(UTC) - when
    if age > MAX_AGE:
        return Found(missing=f"the newest {what} is {age.days} days old; evidence counts for {MAX_AGE.days}")
    return Found(item)
