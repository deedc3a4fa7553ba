"""From evidence to a decision: pass, fail or undecided for every threshold, and for all of them together.

Evidence counts for one artifact only, and not for ever. Whatever is missing, of another digest, damaged or too old is
kept as the sentence that says so: the checks that needed it are undecided for that reason.

A figure that a run merely states is not used where its rows exist: bits per byte come from each story's nats, latencies
and shares from each request. Every bound is one-sided at 95 %.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from experiments.arena.report import METRIC as ARENA
from experiments.arena.report import ArenaEvidence
from experiments.benchmark.evidence import AGAINST, BenchmarkEvidence
from experiments.benchmark.measures import Sample, headline
from experiments.benchmark.report import ratios_of
from experiments.common.evidence_runs import EvidenceError, StoredEvidence
from experiments.common.statistics import (
    CONFIDENCE,
    ONE_SIDED,
    Estimate,
    exact,
    ratio_of_sums,
    stratified_bootstrap,
    wilson,
)
from experiments.common.thresholds import Threshold, Thresholds
from experiments.quality.evidence import Losses, QualityEvidence
from experiments.quality.generation import mean_of
from experiments.quality.held_out import digest_of
from model.errors import InputError
from model.validation import Record, fault_of
from training.data.corpus import load_own_stories

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
    arena: ArenaEvidence | str = ""
    """Users' votes between this version and the champion; empty: no threshold asks for them."""
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
            "arena": self.arena,
        }
        missing = {kind: found for kind, found in kinds.items() if isinstance(found, str) and found}
        sources = {kind: found.run_id for kind, found in kinds.items() if not isinstance(found, str)}
        return {"sources": sources, "missing": missing}


def gather(
    uri: str, digest: str, *, champion: str | None = None, against_file: Path | None = None, arena: bool = False
) -> Evidence:
    """The newest evidence of the model `digest` in the store at `uri`, and of its champion.

    Args:
        champion: the champion's digest, if there is one.
        against_file: a champion's losses as `save_champion` wrote them, instead of a champion in the store. Its speed
            counts where a benchmark of this store compared its model folder with this one.
        arena: also users' votes between the two.

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
    no_votes = f"no votes between this artifact and {champion:.12} are there; `story arena` logs them"
    return Evidence(
        digest=digest,
        quality=quality,
        benchmark=benchmark,
        champion=champion,
        arena=_newest(ArenaEvidence, uri, digest, no_votes, {AGAINST: champion}) if arena else "",
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


Verdict = Literal["pass", "fail", "undecided"]
EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 1, "undecided": 3}
SHARES = ("success_rate", "error_rate", "goodput_share")
"""Shares of n requests: Wilson's bounds."""
COUNTED = ("concurrent_handling", "max_generation_time", "min_generation_time", "memory_percent", "peak_rss_mb")
"""Extremes and counts of the run as it was: no estimates, so no interval."""


@dataclass(frozen=True, slots=True)
class Check:
    """One threshold's verdict, with everything that it is based on."""

    threshold: Threshold
    verdict: Verdict
    why: str
    """One line."""
    bounds: Estimate | None = None
    """None: there is no evidence."""

    @property
    def margin(self) -> float | None:
        """How far the value is inside the threshold, in its unit; negative: outside."""
        return None if self.bounds is None else self.threshold.margin(self.bounds.value)

    def as_dict(self) -> dict[str, Any]:
        found = dict.fromkeys(("value", "low", "high")) | {"n": 0} if self.bounds is None else asdict(self.bounds)
        verdict = {"verdict": self.verdict, "why": self.why, "margin": self.margin, "confidence": CONFIDENCE}
        return self.threshold.as_dict() | {"scope": self.threshold.scope} | verdict | found


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The verdict on one version."""

    digest: str
    """Of the version's model folder."""
    version: int | None
    champion: str | None
    """The champion's digest; None: there is none to compare with."""
    checks: tuple[Check, ...]
    thresholds_digest: str
    evidence: dict[str, str] = field(default_factory=dict)
    """MLflow runs or files that the checks are based on, by kind."""
    notes: tuple[str, ...] = ()
    decided: str = ""
    """UTC, ISO 8601."""
    run_id: str | None = None
    """MLflow's, once it is logged."""

    @property
    def verdict(self) -> Verdict:
        """`fail` if one check failed, else `undecided` if one is; `pass` only if every one passed."""
        return overall(check.verdict for check in self.checks)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        checks = [check.as_dict() for check in self.checks]
        return {"verdict": self.verdict} | plain | {"checks": checks, "notes": list(self.notes)}


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """All verdicts in one; without any verdict nothing is decided."""
    found = set(verdicts)
    if "fail" in found:
        return "fail"
    return "pass" if found == {"pass"} else "undecided"


def judge(threshold: Threshold, found: Estimate | str) -> Check:
    """What `threshold` says of a value with its bounds; of evidence that is missing, for the reason given, nothing.

    It passes if even the pessimistic bound holds, and fails if even the optimistic bound does not. In between, and
    below the threshold's own `min_n`, the evidence does not decide.
    """
    if isinstance(found, str):
        return Check(threshold, "undecided", found)
    if threshold.min_n is not None and found.n < threshold.min_n:
        why = f"{found.n} observations are too few to decide by; at least {threshold.min_n} are needed"
        return Check(threshold, "undecided", why, found)
    pessimist, optimist = (found.low, found.high) if threshold.higher_is_better else (found.high, found.low)
    if threshold.holds(pessimist):
        return Check(threshold, "pass", f"{threshold} holds", found)
    if not threshold.holds(optimist):
        return Check(threshold, "fail", f"{threshold} does not hold", found)
    between = f"it lies between {found.low:.4g} and {found.high:.4g} with 95 % on either side"
    return Check(threshold, "undecided", f"the evidence does not decide {threshold}: {between}", found)


def decide(evidence: Evidence, thresholds: Thresholds, *, version: int | None = None) -> Decision:
    """Judge every threshold. One that does not apply is named in the notes."""
    checks: list[Check] = []
    notes: list[str] = []
    bounds = _benchmark_bounds(evidence.benchmark)
    for threshold in thresholds:
        if not _applies(threshold, evidence):
            continue
        if threshold.scope == "compare" and evidence.champion is None:
            notes.append(f"{threshold.metric}: there is no other champion to compare with")
        elif threshold.unit == "ratio" and not evidence.speed_compared:
            notes.append(f"{threshold.metric}: the champion is a file, and no benchmark compared its model")
        else:
            checks.append(judge(threshold, _found(threshold, evidence, bounds)))
    return Decision(
        digest=evidence.digest,
        version=version,
        champion=evidence.champion,
        checks=tuple(checks),
        thresholds_digest=thresholds.digest,
        evidence=evidence.as_dict()["sources"],
        notes=tuple(notes),
        decided=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _applies(threshold: Threshold, evidence: Evidence) -> bool:
    """Whether the bound is one for the stories that the version was evaluated on."""
    if threshold.stories is None:
        return True
    quality = evidence.quality
    own = digest_of(story.text for story in load_own_stories("heldout"))
    return (threshold.stories == "own") == (not isinstance(quality, str) and quality.tags.get("data.digest") == own)


def _found(threshold: Threshold, evidence: Evidence, benchmark: dict[str, Estimate]) -> Estimate | str:
    """The metric with its bounds, or why there is no evidence of it."""
    metric, quality = threshold.metric, evidence.quality
    if threshold.scope == "benchmark":
        if isinstance(evidence.benchmark, str):
            return evidence.benchmark
        return benchmark.get(metric) or "the benchmark did not measure it: no request of its phase succeeded"
    if metric == ARENA:
        votes = evidence.arena
        return votes if isinstance(votes, str) else votes.win_rate()
    if threshold.unit == "ratio":
        found = evidence.comparison
        return found if isinstance(found, str) else _ratio(metric, found)
    if isinstance(quality, str):
        return quality
    if metric == "bits_per_byte_difference":
        champion = evidence.champion_losses
        return champion if isinstance(champion, str) else _difference(quality, champion)
    if metric in ("bits_per_byte", "loss"):
        rows = [(loss.nats, loss.tokens) if metric == "loss" else (loss.bits, loss.bytes) for loss in quality.losses]
        return ratio_of_sums(*zip(*rows, strict=True), level=ONE_SIDED)
    stories, figure = metric.split("/")
    by_set = {"written": quality.stories, "rare_names": quality.rare_names, "wishes": quality.wishes}
    written = _written_bounds(by_set[stories], figure)
    return written or "the evaluation wrote no stories, or none that it is defined for"


def _benchmark_bounds(evidence: BenchmarkEvidence | str) -> dict[str, Estimate]:
    """Every figure of a benchmark with its bounds."""
    if isinstance(evidence, str):
        return {}
    plan = evidence.report.plan

    def figures(rows: list[Sample]) -> dict[str, float]:
        every = headline(rows, ttft_limit=plan.ttft_limit, itl_limit=plan.itl_limit)
        return {name: figure.value for name, figure in every.items()}

    groups: dict[tuple[str, int], list[Sample]] = {}
    for row in evidence.samples:
        if row.target == "target":
            groups.setdefault((row.phase, row.level), []).append(row)
    spread = stratified_bootstrap(groups, figures, level=ONE_SIDED)
    bounds = {}
    for name, figure in evidence.figures.items():
        if name in SHARES:
            bounds[name] = wilson(round(figure.value * figure.n), figure.n, level=ONE_SIDED)
        elif name in COUNTED or name not in spread:
            bounds[name] = exact(figure.value, figure.n)
        else:
            low, high = spread[name]
            bounds[name] = Estimate(figure.value, min(low, figure.value), max(high, figure.value), figure.n)
    return bounds


def _written_bounds(stories: Sequence[dict[str, Any]], figure: str) -> Estimate | None:
    """A figure of generated stories, computed from their rows; None: no row has it."""
    if figure == "copied_words_max":
        known = [row["copied_words"] for row in stories if row.get("copied_words") is not None]
        return exact(float(max(known)), len(known)) if known else None
    return mean_of(stories, figure, level=ONE_SIDED)


def _ratio(metric: str, benchmark: BenchmarkEvidence) -> Estimate | str:
    """Computed from the rows of both sides; the stated ratio must be the same."""
    report = benchmark.report
    ratio = ratios_of(benchmark.samples, seed=report.plan.seed).get(metric)
    stated = report.comparison.ratios.get(metric) if report.comparison is not None else None
    if ratio is None and stated is None:
        return "the comparison did not measure it"
    if ratio is None or stated != ratio:
        return "the ratio that the benchmark states does not follow from its rows"
    return ratio


def _difference(quality: QualityEvidence, champion: QualityEvidence | ChampionLosses) -> Estimate | str:
    """Bits per byte more than the champion's, over the same stories.

    What makes a story hard is common to both sides and cancels, so the interval is much narrower than either side's.
    """
    ours, theirs = ({loss.id: loss for loss in losses} for losses in (quality.losses, champion.losses))
    if ours.keys() != theirs.keys():
        common = len(ours.keys() & theirs.keys())
        return f"champion and challenger were measured on different stories; {common} are common to both"
    rows = [(loss.bits - theirs[name].bits, loss.bytes) for name, loss in ours.items()]
    return ratio_of_sums(*zip(*rows, strict=True), level=ONE_SIDED)
