"""What is known of a version and its champion: fetched, held to its digest and its age, or missing for a reason.

Evidence counts for one artifact only, and not for ever. What is missing, of another digest, damaged or too old is
kept as the sentence that says so: the checks that needed it are then undecided, and the reader knows why.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from experiments.benchmark.evidence import BenchmarkEvidence, load_benchmark_evidence
from experiments.quality.evidence import QualityEvidence, StoryLoss, load_quality_evidence
from model.errors import InputError, StoryError

MAX_AGE = timedelta(days=30)
"""Older evidence was measured with other code on another machine more often than not."""
BASELINE_FORMAT = 1

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True)
class Found:
    """Evidence of one kind, or why there is none."""

    quality: QualityEvidence | None = None
    benchmark: BenchmarkEvidence | None = None
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Baseline:
    """The champion's losses, to compare with story by story: from the store, or from a file."""

    digest: str
    data_digest: str
    losses: tuple[StoryLoss, ...]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that a decision stands on."""

    digest: str
    quality: Found
    benchmark: Found
    champion: str | None = None
    """The champion's digest; None: there is none, or it is this very artifact."""
    baseline: Baseline | None = None
    no_baseline: str = ""
    """Why the champion's losses are not there."""
    comparison: Found = field(default_factory=Found)
    """The benchmark of this version that compared it with the champion."""
    speed_compared: bool = True
    """False where the champion is a file and no benchmark asked its model in turn with this one: a speed that was
    measured on another machine is no yardstick."""

    def sources(self) -> dict[str, str]:
        """What the checks stand on, by what it is."""
        sources = {}
        if self.quality.quality:
            sources["quality"] = self.quality.quality.run_id
        if self.benchmark.benchmark:
            sources["benchmark"] = self.benchmark.benchmark.run_id
        if self.comparison.benchmark:
            sources["comparison"] = self.comparison.benchmark.run_id
        if self.baseline:
            sources["champion"] = self.baseline.source
        return sources


def gather(
    uri: str, digest: str, *, champion: str | None = None, against_file: Path | None = None
) -> Evidence:
    """The newest evidence of the model `digest` in the store at `uri`, and of its champion.

    Args:
        champion: the champion's digest, if there is one.
        against_file: a champion's losses as `save_baseline` wrote them, instead of a champion in the store. Its speed
            counts where a benchmark of this store asked its model folder in turn with this one.

    Raises:
        InputError: the store or the file cannot be used.
    """
    quality = _quality(uri, digest)
    benchmark = _benchmark(lambda: load_benchmark_evidence(uri, digest), "`story benchmark`")
    if against_file is not None:
        baseline = load_baseline(against_file)
        if baseline.digest == digest:
            return Evidence(digest=digest, quality=quality, benchmark=benchmark)
        beside = _benchmark(
            lambda: load_benchmark_evidence(uri, digest, against=baseline.digest),
            "`story benchmark --against FOLDER`",
        )
        return Evidence(
            digest=digest, quality=quality, benchmark=benchmark, champion=baseline.digest, baseline=baseline,
            comparison=beside, speed_compared=beside.benchmark is not None,
        )  # fmt: skip
    if champion is None or champion == digest:
        return Evidence(digest=digest, quality=quality, benchmark=benchmark)
    theirs = _quality(uri, champion, data_digest=_data_digest(quality.quality))
    comparison = _benchmark(
        lambda: load_benchmark_evidence(uri, digest, against=champion),
        "`story benchmark --against models:/story-writer@champion`",
    )
    return Evidence(
        digest=digest, quality=quality, benchmark=benchmark, champion=champion,
        baseline=_as_baseline(theirs.quality) if theirs.quality else None,
        no_baseline=f"of the champion: {theirs.missing}" if theirs.missing else "", comparison=comparison,
    )  # fmt: skip


def save_baseline(evidence: QualityEvidence, path: Path) -> None:
    """Write a champion's losses to a file, so that a CI job can compare with it without any server."""
    baseline = _as_baseline(evidence)
    rows = [asdict(loss) for loss in baseline.losses]
    text = json.dumps(
        {
            "format": BASELINE_FORMAT,
            "digest": baseline.digest,
            "data_digest": baseline.data_digest,
            "losses": rows,
        }
    )
    path.write_text(text + "\n", encoding="utf-8")


def load_baseline(path: Path) -> Baseline:
    """Read what `save_baseline` wrote. Raises `InputError` that names the file and what is wrong."""
    try:
        values = json.loads(path.read_text("utf-8"))
        if values["format"] != BASELINE_FORMAT or not values["losses"]:
            raise ValueError("it is of another format, or empty")
        losses = tuple(
            StoryLoss(str(row["id"]), float(row["nats"]), int(row["tokens"]), int(row["bytes"]))
            for row in values["losses"]
        )
        return Baseline(str(values["digest"]), str(values["data_digest"]), losses, path.name)
    except OSError as error:
        raise InputError("against-file", f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("against-file", f"{path} is not a champion's losses ({error})") from None


def _as_baseline(evidence: QualityEvidence) -> Baseline:
    return Baseline(evidence.digest, _data_digest(evidence) or "", evidence.losses, evidence.run_id)


def _data_digest(evidence: QualityEvidence | None) -> str | None:
    return None if evidence is None else evidence.tags.get("data.digest")


def _quality(uri: str, digest: str, data_digest: str | None = None) -> Found:
    try:
        evidence = load_quality_evidence(uri, digest, data_digest=data_digest)
    except InputError:
        raise
    except StoryError as error:
        return Found(missing=str(error))
    if evidence is None:
        on = " on the same stories" if data_digest else ""
        return Found(missing=f"no evaluation{on} of {digest[:12]} is there; `story evaluate` makes one")
    ended = datetime.fromtimestamp(evidence.ended_at / 1000, UTC)
    return Found(missing=stale) if (stale := _stale("evaluation", ended)) else Found(quality=evidence)


def _benchmark(load: Callable[[], BenchmarkEvidence | None], made_by: str) -> Found:
    try:
        evidence = load()
    except InputError:
        raise
    except StoryError as error:
        return Found(missing=str(error))
    if evidence is None:
        return Found(missing=f"no such benchmark of this artifact is there; {made_by} makes one")
    return (
        Found(missing=stale) if (stale := _stale("benchmark", evidence.began)) else Found(benchmark=evidence)
    )


def _stale(what: str, when: datetime) -> str:
    age = datetime.now(UTC) - when
    if age <= MAX_AGE:
        return ""
    return f"the newest {what} is {age.days} days old; evidence counts for {MAX_AGE.days}"


def as_plain(evidence: Evidence) -> dict[str, Any]:
    """Where each kind of evidence comes from, or why it is missing: for the report."""
    missing = {
        "quality": evidence.quality.missing,
        "benchmark": evidence.benchmark.missing,
        "comparison": evidence.comparison.missing,
        "champion": evidence.no_baseline,
    }
    return {"sources": evidence.sources(), "missing": {key: why for key, why in missing.items() if why}}
