"""From evidence to a decision: every threshold of the file is judged, by the numbers of the raw rows.

A figure that a run merely states is not used where its rows are there: bits per byte come from each story's nats,
latencies and shares from each request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import numpy as np

from experiments.benchmark.compare import ratios_of
from experiments.benchmark.evidence import BenchmarkEvidence
from experiments.benchmark.measures import Sample, headline
from experiments.common.statistics import (
    ONE_SIDED,
    Estimate,
    exact,
    mean_over_prompts,
    paired_difference,
    ratio_of_sums,
    stratified_bootstrap,
    wilson,
)
from experiments.common.thresholds import Threshold, Thresholds
from experiments.gate.evidence import Baseline, Evidence
from experiments.gate.verdict import Check, Decision, judge, without
from experiments.quality.evidence import QualityEvidence
from experiments.quality.held_out import digest_of
from experiments.quality.written import YES_OR_NO
from training.data.corpus import load_own_stories

SHARES = ("success_rate", "error_rate", "goodput_share")
"""Counted out of n requests: Wilson's bounds."""
COUNTED = (
    "concurrent_handling",
    "max_generation_time",
    "min_generation_time",
    "memory_percent",
    "peak_rss_mb",
)
"""Read off the run as it was: an extreme or a count is no estimate of a mean."""


def decide(evidence: Evidence, thresholds: Thresholds, *, version: int | None = None) -> Decision:
    """Judge every threshold. Nothing is skipped in silence: what does not apply is told in the notes."""
    checks: list[Check] = []
    notes: list[str] = []
    bounds = _benchmark_bounds(evidence.benchmark.benchmark)
    for threshold in thresholds:
        if not _applies(threshold, evidence):
            continue
        if threshold.scope == "benchmark":
            checks.append(_benchmark_check(threshold, evidence, bounds))
        elif threshold.scope == "quality":
            checks.append(_quality_check(threshold, evidence))
        elif evidence.champion is None:
            notes.append(f"{threshold.metric}: there is no other champion to compare with")
        elif threshold.unit == "ratio" and not evidence.speed_compared:
            notes.append(
                f"{threshold.metric}: the champion is a file, and its model was not asked in turn with this one"
            )
        else:
            checks.append(_compare_check(threshold, evidence))
    return Decision(
        digest=evidence.digest, version=version, champion=evidence.champion, checks=tuple(checks),
        thresholds_digest=thresholds.digest, evidence=evidence.sources(), notes=tuple(notes),
        decided=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _applies(threshold: Threshold, evidence: Evidence) -> bool:
    """Whether the bound is one for the stories that the version was judged on."""
    if threshold.stories is None:
        return True
    quality = evidence.quality.quality
    own = digest_of(story.text for story in load_own_stories("heldout"))
    return (threshold.stories == "own") == (quality is not None and quality.tags.get("data.digest") == own)


def _benchmark_check(threshold: Threshold, evidence: Evidence, bounds: dict[str, Estimate]) -> Check:
    if evidence.benchmark.benchmark is None:
        return without(threshold, evidence.benchmark.missing)
    found = bounds.get(threshold.metric)
    if found is None:
        return without(
            threshold, "the benchmark did not measure it: its phase was left out, or nothing of it came"
        )
    return judge(threshold, found)


def _benchmark_bounds(evidence: BenchmarkEvidence | None) -> dict[str, Estimate]:
    """Every figure of a benchmark with its bounds."""
    if evidence is None:
        return {}
    plan = evidence.report["plan"]
    own = [row for row in evidence.samples if row.target == "target"]

    def figures(rows: list[Sample]) -> dict[str, float]:
        every = headline(rows, ttft_limit=plan["ttft_limit"], itl_limit=plan["itl_limit"], memory=None)
        return {name: figure.value for name, figure in every.items()}

    groups: dict[tuple[str, int], list[Sample]] = {}
    for row in own:
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


def _quality_check(threshold: Threshold, evidence: Evidence) -> Check:
    quality = evidence.quality.quality
    if quality is None:
        return without(threshold, evidence.quality.missing)
    if threshold.metric in ("bits_per_byte", "loss"):
        return judge(threshold, _loss_bounds(quality, threshold.metric))
    found = _written_bounds(quality, threshold.metric.removeprefix("written/"))
    if found is None:
        return without(threshold, "the evaluation wrote no stories, or none that it is defined for")
    return judge(threshold, found)


def _written_bounds(quality: QualityEvidence, figure: str) -> Estimate | None:
    """A figure of the written stories, out of their rows; None: no row has it."""
    if figure == "copied_words_max":
        lengths = [
            float(row["copied_words"]) for row in quality.stories if row.get("copied_words") is not None
        ]
        return exact(max(lengths), len(lengths)) if lengths else None
    seeds = {seed: column for column, seed in enumerate(sorted({row["seed"] for row in quality.stories}))}
    numbers = {
        number: place for place, number in enumerate(sorted({row["number"] for row in quality.stories}))
    }
    values_PS = np.full((len(numbers), len(seeds)), np.nan)
    for row in quality.stories:
        if row.get(figure) is not None:
            values_PS[numbers[row["number"]], seeds[row["seed"]]] = row[figure]
    # The middle 90 %: each of its ends is a one-sided bound of 95 %, as every bound of the gate.
    return mean_over_prompts(values_PS, binary=figure in YES_OR_NO, level=ONE_SIDED)


def _loss_bounds(quality: QualityEvidence, metric: str) -> Estimate:
    nats = [loss.nats for loss in quality.losses]
    if metric == "loss":
        return ratio_of_sums(nats, [loss.tokens for loss in quality.losses], level=ONE_SIDED)
    bits = [value / math.log(2) for value in nats]
    return ratio_of_sums(bits, [loss.bytes for loss in quality.losses], level=ONE_SIDED)


def _compare_check(threshold: Threshold, evidence: Evidence) -> Check:
    if threshold.metric == "bits_per_byte_difference":
        return _difference_check(threshold, evidence)
    benchmark = evidence.comparison.benchmark
    if benchmark is None:
        return without(threshold, evidence.comparison.missing)
    # Out of the rows of both sides: what the report states is only looked at to see that it is the same.
    found = ratios_of(benchmark.samples, seed=benchmark.report["plan"]["seed"])
    ratio = found.get(threshold.metric.removesuffix("_ratio"))
    stated = ((benchmark.report.get("comparison") or {}).get("ratios") or {}).get(threshold.metric)
    if ratio is None and stated is None:
        return without(threshold, "the comparison did not measure it")
    if ratio is None or stated != asdict(ratio):
        return without(threshold, "the ratio that the benchmark states does not follow from its rows")
    return judge(threshold, ratio)


def _difference_check(threshold: Threshold, evidence: Evidence) -> Check:
    if evidence.quality.quality is None:
        return without(threshold, evidence.quality.missing)
    if evidence.baseline is None:
        return without(threshold, evidence.no_baseline)
    pairs = _pairs(evidence.quality.quality, evidence.baseline)
    if isinstance(pairs, str):
        return without(threshold, pairs)
    ours, theirs, sizes = pairs
    return judge(threshold, paired_difference(ours, theirs, sizes, level=ONE_SIDED))


def _pairs(
    quality: QualityEvidence, baseline: Baseline
) -> tuple[Sequence[float], Sequence[float], Sequence[float]] | str:
    """Bits of the same stories under both models, and their bytes; or why they cannot be paired."""
    theirs = {loss.id: loss for loss in baseline.losses}
    ours = {loss.id: loss for loss in quality.losses}
    if theirs.keys() != ours.keys():
        common = len(theirs.keys() & ours.keys())
        return f"champion and challenger were measured on different stories; {common} are common to both"
    bits = [ours[name].nats / math.log(2) for name in ours]
    champion_bits = [theirs[name].nats / math.log(2) for name in ours]
    return bits, champion_bits, [float(ours[name].bytes) for name in ours]
