"""`story ab`: read the store, compare each variant with the first, decide, log the look to MLflow, and show it.

Variants are assigned to users, so users are the independent units: ten stories of one user are not ten observations.
Each user counts once in every metric, for the first variant: with the first story, and for likes with the first rating.
Later stories are stored and counted as stories.

A metric belongs to an artifact. Where a variant has served several (an alias moved), only the newest one counts; the
number of stories left out is reported.

There are two kinds of intervals. A rate's own (Wilson, 95 %) holds for one look and is descriptive. The difference's
holds at all looks together (`sequential`), and it alone decides.
"""

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa
from rich.console import Console

from experiments.ab.assignment import TrafficSplit, parse_split
from experiments.ab.sequential import Comparison, SampleRatio, block_sizes, check_sample_ratio, compare
from experiments.ab.store import endings, exposures, ratings, reading
from experiments.common.evidence_runs import EvidenceStore
from experiments.common.statistics import Estimate, wilson
from experiments.common.tables import ABSENT, Table, markdown_text, shown
from model.errors import InputError, StoryError
from training.tracking.provenance import provenance

Metric = Literal["like", "finished", "stopped", "failed"]
METRICS: dict[Metric, str] = {
    "like": "liked, of those who rated",
    "finished": "the model ended the story",
    "stopped": "the user stopped it or disconnected",
    "failed": "the generation failed",
}
HIGHER_IS_BETTER: dict[Metric, bool] = {"like": True, "finished": True, "stopped": False, "failed": False}
ENDING_METRICS: tuple[Metric, ...] = ("finished", "stopped", "failed")
INFORMATIVE = frozenset({"finished", "length", "stopped", "failed"})
"""Outcomes that say something about the model; a refusal or a shutdown does not."""


@dataclass(slots=True)
class VariantEvidence:
    """What is known about one variant's newest artifact."""

    name: str
    digest: str = ""
    version: str = ""
    stories: int = 0
    users: int = 0
    likes: int = 0
    dislikes: int = 0
    """Stories by their last rating."""
    endings: Counter[str] = field(default_factory=Counter)
    """Stories by their first outcome."""
    tokens: list[int] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    observed: dict[Metric, list[tuple[bool, str]]] = field(default_factory=lambda: {name: [] for name in METRICS})
    """Each observation, and the split under which it was made."""

    def rate(self, metric: Metric) -> Estimate | None:
        """Return the share of users with a positive observation; None without any."""
        values = [value for value, _ in self.observed[metric]]
        return wilson(sum(values), len(values)) if values else None


@dataclass(slots=True)
class Evidence:
    """Everything that is known about one test."""

    test: str
    split: TrafficSplit
    """The newest one."""
    variants: dict[str, VariantEvidence]
    """In the split's order; variants that it no longer names come last."""
    new_users: list[tuple[str, Counter[str]]] = field(default_factory=list)
    """For each split that was in force, the new users of each variant, whatever its artifact."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Stories of earlier artifacts, by variant."""


def known_tests(connection: sa.Connection) -> dict[str, int]:
    """Return the tests that have stories, and how many, newest first."""
    newest = sa.func.max(exposures.c.id)
    rows = connection.execute(
        sa.select(exposures.c.test, sa.func.count()).group_by(exposures.c.test).order_by(newest.desc())
    )
    return {str(name): int(count) for name, count in rows}


def gather(connection: sa.Connection, test: str, *, since: float | None = None) -> Evidence:
    """Read one test's events, optionally only those since a time (seconds since 1970).

    Raises `InputError` when there is no such test; the message names the existing ones.
    """
    wanted = [exposures.c.test == test]
    if since is not None:
        wanted.append(exposures.c.at >= since)
    rows = connection.execute(sa.select(exposures).where(*wanted).order_by(exposures.c.id)).all()
    if not rows:
        known = known_tests(connection)
        if test in known:
            raise InputError("since", f"leaves no story of the test {test!r}")
        there = ", ".join(f"{name} ({count} stories)" for name, count in known.items())
        raise InputError("test", f"{test!r} has no stories; there is {there or 'none at all'}")
    split = parse_split(rows[-1].split, test)
    newest = {row.variant: row for row in rows}
    variants = {variant.name: VariantEvidence(variant.name) for variant in split.variants}
    for name, row in newest.items():
        variants[name] = VariantEvidence(name, row.digest, row.version)
    evidence = Evidence(test, split, variants)
    counted, home, first = _add_stories(evidence, rows)
    of_test = sa.select(exposures.c.story).where(*wanted)

    def events(table: sa.Table) -> Iterator[tuple[Any, Any]]:
        """Yield the table's rows in order, each with the exposure of its story."""
        for row in connection.execute(sa.select(table).where(table.c.story.in_(of_test)).order_by(table.c.id)):
            if row.story in counted:
                yield row, counted[row.story]

    ended: set[str] = set()
    for row, story in events(endings):
        if row.story in ended:
            continue
        ended.add(row.story)
        variant = variants[story.variant]
        variant.endings[row.outcome] += 1
        measured = (variant.tokens, row.tokens or None), (variant.ttfts, row.ttft), (variant.rates, row.rate)
        for values, value in measured:
            if value is not None:
                values.append(value)
        if row.story in first and row.outcome in INFORMATIVE:
            for metric in ENDING_METRICS:
                variant.observed[metric].append((row.outcome == metric, story.split))
    last: dict[str, tuple[str, int]] = {}
    rated: set[str] = set()
    for row, story in events(ratings):
        last[row.story] = story.variant, row.rating
        if row.rating and story.user_hash not in rated and home[story.user_hash] == story.variant:
            rated.add(story.user_hash)
            variants[story.variant].observed["like"].append((row.rating > 0, story.split))
    for name, rating in last.values():
        variants[name].likes += rating > 0
        variants[name].dislikes += rating < 0
    return evidence


def _add_stories(evidence: Evidence, rows: Iterable[Any]) -> tuple[dict[str, Any], dict[str, str], set[str]]:
    """Return the stories that count, by id; each user's variant; and the ids of users' first stories."""
    counted: dict[str, Any] = {}
    first_of: dict[str, str] = {}
    home: dict[str, str] = {}
    for row in rows:
        if row.user_hash not in home:
            home[row.user_hash] = row.variant
            if not evidence.new_users or evidence.new_users[-1][0] != row.split:
                evidence.new_users.append((row.split, Counter()))
            evidence.new_users[-1][1][row.variant] += 1
        variant = evidence.variants[row.variant]
        if row.digest != variant.digest:
            evidence.left_out[row.variant] += 1
            continue
        counted[row.story] = row
        variant.stories += 1
        if row.user_hash not in first_of and home[row.user_hash] == row.variant:
            first_of[row.user_hash] = row.story
            variant.users += 1
    return counted, home, set(first_of.values())


EXPERIMENT = "story-ab"
Verdict = Literal["better", "worse", "undecided"]
EXIT_CODES: dict[Verdict, int] = {"better": 0, "worse": 1, "undecided": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantComparison(Comparison):
    """One variant against the first, in one metric."""

    variant: str
    metric: Metric
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Report:
    """One look at a test."""

    evidence: Evidence
    metric: Metric
    """The one that decides."""
    alpha: float
    """Probability of a wrong decision, over all variants together."""
    comparisons: list[VariantComparison]
    ratio: SampleRatio
    verdict: Verdict
    why: str
    """One line."""
    made: str

    @property
    def exit_code(self) -> int:
        """Return 0 if a variant is better than the first, 1 if all are worse, 3 if undecided."""
        return EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        return {
            "test": self.evidence.test,
            "split": str(self.evidence.split),
            "made": self.made,
            "metric": self.metric,
            "alpha": self.alpha,
            "verdict": self.verdict,
            "why": self.why,
            "variants": [_variant(variant) for variant in self.evidence.variants.values()],
            "comparisons": [asdict(each) for each in self.comparisons],
            "sample_ratio": {**asdict(self.ratio), "mismatch": self.ratio.mismatch},
            "left_out": self.evidence.left_out,
        }


def _variant(variant: VariantEvidence) -> dict[str, Any]:
    plain = ("version", "digest", "stories", "users", "likes", "dislikes", "endings")
    rates = {name: variant.rate(name) for name in METRICS}
    return {
        "variant": variant.name,
        **{name: getattr(variant, name) for name in plain},
        "rates": {
            name: rate and {"value": rate.value, "low": rate.low, "high": rate.high, "users": rate.n}
            for name, rate in rates.items()
        },
        "median_tokens": median(variant.tokens),
        "median_ttft": median(variant.ttfts),
        "median_tokens_per_second": median(variant.rates),
    }


def median(values: list[float] | list[int]) -> float | None:
    """Return the median; None of no values."""
    return float(statistics.median(values)) if values else None


def look(
    url: str, test: str | None, *, metric: Metric = "like", alpha: float = 0.05, since: float | None = None
) -> Report:
    """Report on `test`, or on the newest one in the database at `url`.

    Raises:
        InputError: there is no such database or test, or `alpha` is no probability.
    """
    if not 0 < alpha < 1:
        raise InputError("alpha", f"must be above 0 and below 1, got {alpha:g}")
    with reading(url) as connection:
        test = test if test is not None else next(iter(known_tests(connection)), None)
        if test is None:
            raise InputError("DATABASE_URL", "holds no stories yet; users of `story demo` add them")
        evidence = gather(connection, test, since=since)
    return make_report(evidence, metric=metric, alpha=alpha)


def make_report(evidence: Evidence, *, metric: Metric = "like", alpha: float = 0.05) -> Report:
    """Compare and decide. With several variants beside the first, each gets an equal part of `alpha`."""
    first, *others = evidence.variants.values()
    each = alpha / max(1, len(others))
    comparisons = [_compare(first, variant, name, each) for variant in others for name in METRICS]
    ratio = check_sample_ratio(
        [(parse_split(text, evidence.test).shares(), counts) for text, counts in evidence.new_users]
    )
    deciding = [found for found in comparisons if found.metric == metric]
    verdict, why = _decide(first.name, deciding, ratio)
    return Report(
        evidence=evidence,
        metric=metric,
        alpha=alpha,
        comparisons=comparisons,
        ratio=ratio,
        verdict=verdict,
        why=why,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def log(uri: str, report: Report, text: str) -> dict[str, str]:
    """Log one look as a run, with `text` as its Markdown; a failure is returned as `failed`, not raised."""
    evidence = report.evidence
    tags = provenance().tags() | {"ab.verdict": report.verdict, "ab.test": evidence.test}
    tags |= {f"{each.name}.digest": each.digest for each in evidence.variants.values() if each.digest}
    try:
        with EvidenceStore(uri, EXPERIMENT).run(f"{evidence.test}: {report.verdict}", tags) as run:
            params = {"test": evidence.test, "split": str(evidence.split), "metric": report.metric}
            run.log_params(params | {"alpha": report.alpha})
            run.log_metrics(_metrics(report))
            plain = json.dumps(report.as_dict(), ensure_ascii=False, indent=2)
            run.log_texts({"report.json": plain + "\n", "report.md": text})
    except StoryError as error:
        return {"failed": str(error)}
    return {"run_id": run.run_id, "experiment": EXPERIMENT}


def _compare(first: VariantEvidence, variant: VariantEvidence, metric: Metric, alpha: float) -> VariantComparison:
    a, b = first.observed[metric], variant.observed[metric]
    known: dict[str, tuple[int, int]] = {}
    for text in {text for _, text in a}:
        weights = {each.name: each.weight for each in parse_split(text, "any").variants}
        known[text] = block_sizes(weights.get(first.name, 0), weights.get(variant.name, 0))
    sizes = [known[text] for _, text in a] or [(1, 1)]
    found = compare([value for value, _ in a], [value for value, _ in b], sizes, alpha=alpha)
    verdict: Verdict = "undecided"
    if found.decided_at_block is not None:
        verdict = "better" if (found.difference_low >= 0) == HIGHER_IS_BETTER[metric] else "worse"
    return VariantComparison(variant=variant.name, metric=metric, verdict=verdict, **asdict(found))


def _decide(first: str, found: list[VariantComparison], ratio: SampleRatio) -> tuple[Verdict, str]:
    if not found:
        return "undecided", f"only {first} has served stories: there is nothing to compare it with"
    if ratio.mismatch:
        return "undecided", (
            "sample ratio mismatch: the variants did not get the users that the split promised, so no metric can be "
            f"trusted until the cause is found: {', '.join(f'{name} {n}' for name, n in ratio.found.items())}; "
            f"promised were {', '.join(f'{name} {n:.0f}' for name, n in ratio.expected.items())}"
        )
    verdicts = {each.verdict for each in found}
    verdict: Verdict = "better" if "better" in verdicts else "worse" if verdicts == {"worse"} else "undecided"
    if verdict == "undecided":
        n = min(min(each.used) for each in found)
        return verdict, f"{n} users of the smaller variant are not enough yet; looking again costs nothing"
    names = [each.variant for each in found if each.verdict == verdict]
    return verdict, f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {verdict} than {first}"


def _metrics(report: Report) -> dict[str, float]:
    """Name the figures as MLflow allows: letters, digits, and a few signs."""
    found: dict[str, float] = {"sample_ratio/e": report.ratio.e}
    for variant in report.evidence.variants.values():
        values: dict[str, float] = {"users": variant.users, "stories": variant.stories}
        values |= {name: rate.value for name in METRICS if (rate := variant.rate(name)) is not None}
        found |= {f"{_key(variant.name)}/{name}": value for name, value in values.items()}
    for each in report.comparisons:
        for name in ("e", "difference_low", "difference_high"):
            found[f"{_key(each.variant)}/{each.metric}_{name}"] = getattr(each, name)
    return found


def _key(name: str) -> str:
    """Return a variant's name as part of a metric's name: the slashes of a folder would group metrics."""
    return re.sub(r"[^\w. -]", "_", name).strip(". ") or "variant"


COLORS: dict[Verdict, str] = {"better": "green", "worse": "red", "undecided": "yellow"}
VARIANT_COLUMNS = (
    *("variant", "version", "digest", "users", "stories", "👍 / 👎"),
    *METRICS,
    *("tokens", "first token", "tokens/s"),
)
COMPARISON_COLUMNS = ("metric", "variant", "difference, all looks", "evidence (e)", "users used", "verdict")


def print_report(report: Report, console: Console) -> None:
    """Print both tables, the notes and the verdict."""
    console.print(f"Test {report.evidence.test}: {report.evidence.split}", markup=False, highlight=False)
    for table in tables(report):
        console.print(table)
    for note in notes(report):
        console.print(note, markup=False, highlight=False)
    console.print(f"[{COLORS[report.verdict]}]{report.verdict.upper()}[/]: ", end="")
    console.print(report.why, markup=False, highlight=False)


def markdown(report: Report) -> str:
    """Return the same as Markdown."""
    title = f"### Test {markdown_text(report.evidence.test)}: {report.verdict.upper()}"
    lines = [title, "", markdown_text(report.why)]
    for table in tables(report):
        lines += ["", *table.markdown()]
    return "\n".join([*lines, "", *(f"- {markdown_text(note)}" for note in notes(report))]) + "\n"


def notes(report: Report) -> list[str]:
    """Explain how to read the tables."""
    metrics = ", ".join(f"{name}: {text}" for name, text in METRICS.items())
    lines = [
        f"Each user counts once, with the first story or rating ({metrics}).",
        "A rate's interval is Wilson's, 95 %, for one look; the difference's holds at all looks together, with "
        f"{100 * (1 - report.alpha):g} %. {report.metric} decides.",
    ]
    if len(report.ratio.expected) > 1:
        state = "NOT as promised" if report.ratio.mismatch else "as promised"
        lines.append(f"Shares of users are {state}: sequential evidence against them {report.ratio.e:.3g}.")
    lines += [
        f"{count} stories of {name} are left out: another artifact served it then."
        for name, count in report.evidence.left_out.items()
    ]
    return lines


def tables(report: Report) -> list[Table]:
    """The variants, and each beside the first if there are others."""
    variants = [
        [
            *(variant.name, variant.version or ABSENT, variant.digest[:12] or ABSENT),
            *(str(variant.users), str(variant.stories), f"{variant.likes} / {variant.dislikes}"),
            *(_rate(variant.rate(name)) for name in METRICS),
            shown(median(variant.tokens), ",.0f"),
            shown(median([1000 * seconds for seconds in variant.ttfts]), ".0f", " ms"),
            shown(median(variant.rates), ",.0f"),
        ]
        for variant in report.evidence.variants.values()
    ]
    compared = [
        [
            f"{each.metric} ({'higher' if HIGHER_IS_BETTER[each.metric] else 'lower'} is better)",
            each.variant,
            f"{100 * each.difference_low:+.1f} … {100 * each.difference_high:+.1f}",
            f"{each.e:.3g}",
            f"{each.used[0]} + {each.used[1]}",
            each.verdict,
        ]
        for each in report.comparisons
    ]
    found = (Table(VARIANT_COLUMNS, variants), Table(COMPARISON_COLUMNS, compared))
    return [table for table in found if table.rows]


def _rate(found: Estimate | None) -> str:
    if found is None:
        return ABSENT
    return f"{100 * found.value:.1f} % ({100 * found.low:.0f} to {100 * found.high:.0f})"
