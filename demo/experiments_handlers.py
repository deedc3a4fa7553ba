"""What the Experiments page shows, without the page: plain functions from what a store holds to what is drawn.

Read only, and no HTML: tables are plain values in the form that Gradio's component takes, without pandas, and curves,
stories and verdicts are plain values for the scripts in `assets/`.
"""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from demo.growth_handlers import why_no_ages
from experiments.dashboard.client import NOTHING, StoreClient
from experiments.dashboard.records import DecisionRow, Measure, Overview, Row, RunRow, VersionRow
from model.errors import StoryError

SHORT = 8
"""Characters of an id or a digest that are shown."""
MOST_CHOSEN = 6
"""Runs in one picture: more cannot be distinguished. `assets/experiments.css` has a color for each."""
FIRST_CHOSEN = 4
MEASURES: dict[Measure, str] = {
    "held-out": "Bits per byte on stories that it has not seen",
    "training": "Loss in training, nats a token",
    "rate": "Learning rate",
    "gradient": "Norm of the gradient",
    "speed": "Tokens a second",
    "processor": "Processors in use, %",
    "memory": "Memory in use, MB",
}
FIRST_MEASURES: tuple[Measure, ...] = ("held-out", "training")
NO_SAMPLES = "No run has kept sample stories yet; `story train` writes some at each evaluation."
FROM_RECORD = "from the record"
FOLDED, UNFOLDED = "▸ ", "▾ "
"""Before the name of a sweep in the table of runs."""
SWEEP = "sweep"
"""Stands for the id in a sweep's row."""
WORDS = {"pass": "passed", "fail": "failed", "undecided": "undecided"}

RUN_COLUMNS = {
    "run": None,
    "status": None,
    "preset": None,
    "bits per byte": 4,
    "tokens": 0,
    "minutes": 1,
    "parameters": 0,
    "data": None,
    "began (UTC)": None,
    "id": None,
}
"""Heading → digits behind the point; None: a text."""
EVALUATION_COLUMNS = (
    ("bits_per_byte", "bits per byte", 4, 1.0),
    ("bits_per_byte_low", "95 % from", 4, 1.0),
    ("bits_per_byte_high", "to", 4, 1.0),
    ("written/ended", "end by themselves, %", 0, 100.0),
    ("written/looping", "loop, %", 0, 100.0),
    ("written/names_straight", "names kept, %", 0, 100.0),
    ("rare_names/kept", "rare names kept, %", 0, 100.0),
    ("wishes/words", "wished words, %", 0, 100.0),
    ("wishes/length", "wished length, %", 0, 100.0),
)
"""(figure, heading, digits, factor)."""
BENCHMARK_COLUMNS = (
    ("tokens_per_second", "tokens/s, one", 0, 1.0),
    ("total_tokens_per_second", "tokens/s, all", 0, 1.0),
    ("ttft_p50", "first token p50, ms", 1, 1e3),
    ("ttft_p95", "p95, ms", 1, 1e3),
    ("itl_p50", "token to token p50, ms", 2, 1e3),
    ("itl_p99", "p99, ms", 2, 1e3),
    ("success_rate", "succeeded, %", 0, 100.0),
    ("concurrent_handling", "at once", 0, 1.0),
    ("cold_start_s", "cold start, s", 1, 1.0),
    ("peak_rss_mb", "memory, MB", 0, 1.0),
)
"""(figure, heading, digits, factor)."""


Table = dict[str, Any]
"""Headings, rows, and how each cell is written, as `gr.Dataframe` takes them; rows are sorted by their numbers."""
Values = dict[str, Any]
"""What a script of `assets/` draws: of `curves.js`, `learn.js` or `versions.js`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All that the page shows when it is opened."""

    note: str
    runs: Table | None = None
    choices: tuple[tuple[str, str], ...] = ()
    """(label, short id) of every run that has a curve."""
    curves: Values | None = None
    """None: there is nothing below the note."""
    sampled: tuple[tuple[str, str], ...] = ()
    """The same, of every run that kept sample stories or its ages."""
    samples: Values | None = None
    evaluations: Table | None = None
    benchmarks: Table | None = None
    versions: Values | None = None


async def opened(store: StoreClient, query: Mapping[str, str], unfolded: Collection[str] = ()) -> Page:
    """The page as an address asks for it; what the address names and the store does not hold is left alone.

    `unfolded`: names of the sweeps whose trials are listed.
    """
    try:
        seen = await store.overview()
        if not (seen.runs or seen.benchmarks or seen.versions):
            return Page(note=NOTHING)
        sampled = tuple((_label(run), run.id[:SHORT]) for run in seen.runs if run.stories or run.ages)
        named = dict.fromkeys(query.get("runs", "").split(","))
        asked = [run for run in named if _find(seen, run) is not None]
        sample_run = _run_with_samples(seen, query.get("story", ""))
        return Page(
            note=_summary(seen),
            runs=runs_table(seen, unfolded),
            choices=tuple((_label(run), run.id[:SHORT]) for run in seen.runs),
            curves=await draw(store, asked or first_chosen(seen), query.get("measure", "").split(",")),
            sampled=sampled,
            samples=await samples(store, sample_run, at=query.get("step", "")),
            evaluations=evaluations_table(seen) if seen.evaluations else None,
            benchmarks=benchmarks_table(seen) if seen.benchmarks else None,
            versions=versions_shown(seen),
        )
    except StoryError as error:
        return Page(note=str(error))


async def draw(store: StoreClient, chosen: Sequence[str], measures: Sequence[str]) -> Values:
    """The curves of the chosen runs (short ids), a plot for each measure, and what differs, for `assets/curves.js`.

    Each point is as `Curve` has it.
    """
    wanted: list[Measure] = [known for known in MEASURES if known in measures] or [*FIRST_MEASURES]
    drawn: Values = {"chosen": list(chosen), "measures": wanted, "runs": [], "plots": [], "differences": []}
    drawn |= {"state": "", "note": ""}
    try:
        seen = await store.overview(stale_ok=True)
        found = {run: row for run in chosen[:MOST_CHOSEN] if (row := _find(seen, run)) is not None}
        ids = [row.id for row in found.values()]
        curves = {measure: await store.curves(ids, measure) for measure in wanted}
    except StoryError as error:
        return drawn | {"note": str(error)}
    names = names_in_the_picture(list(found.values()))
    drawn["runs"] = [
        {
            "run": run,
            "id": row.id,
            "experiment": "" if row.recorded else row.experiment,
            "name": names[row.id],
            "running": row.status == "running",
            "known_as": ", ".join(aliases_of(row, seen)),
        }
        for run, row in found.items()
    ]
    drawn["plots"] = [
        {
            "measure": measure,
            "title": MEASURES[measure],
            "curves": [
                {"run": curve.run[:SHORT], "name": names[curve.run], "points": list(curve.points)}
                for curve in curves[measure]
            ],
        }
        for measure in wanted
    ]
    drawn["differences"] = differences(list(found.values()))
    note = "" if found else "Choose a run above to see how it learned."
    if found and not any(curve.points for each in curves.values() for curve in each):
        note = "The chosen runs have not logged this yet."
    return drawn | {"chosen": list(found), "state": state_of(seen), "note": note}


async def news(store: StoreClient, given: object) -> Values:
    """The curves again, for a page that is open: `given` is what it has chosen, as the browser sends it."""
    given = given if isinstance(given, dict) else {}
    chosen, measures = (
        [each for each in value[: len(MEASURES)] if isinstance(each, str)] if isinstance(value, list) else []
        for value in (given.get("chosen"), given.get("measures"))
    )
    with contextlib.suppress(StoryError):  # `draw` says what is wrong
        await store.overview()
    return await draw(store, chosen, measures)


def state_of(seen: Overview) -> str:
    """A text that changes when a run begins, ends or is evaluated better, and when a version or evidence is new."""
    runs = [(run.id, run.status, run.bits_per_byte) for run in seen.runs]
    others = [*(row.id for row in seen.evaluations), *(row.id for row in seen.benchmarks)]
    versions = [(version.digest, version.aliases, version.decision) for version in seen.versions]
    return hashlib.sha256(repr((runs, others, versions)).encode()).hexdigest()[:16]


def differences(runs: Sequence[RunRow]) -> list[dict[str, Any]]:
    """The settings that are not the same in all of `runs`: a name and a value for each run, empty where it has none."""
    if len(runs) < 2:
        return []
    names = sorted({name for run in runs for name in run.settings})
    rows = [{"name": name, "values": [run.settings.get(name, "") for run in runs]} for name in names]
    return [row for row in rows if len(set(row["values"])) > 1]


def aliases_of(run: RunRow, seen: Overview) -> list[str]:
    """The aliases of the versions that came of a run: `champion`, `challenger` …"""
    return sorted({alias for version in seen.versions if version.run == run.id for alias in version.aliases})


def ui_address(uri: str, *, local: bool) -> str:
    """Where the MLflow UI of the store at `uri` is, for a browser on this machine (`local`); empty for any other.

    The UI of a database is that of `story ui`, at its usual port.
    """
    if not local:
        return ""
    return (
        re.sub(r"//[^/@]*@", "//", uri).rstrip("/")
        if uri.startswith(("http://", "https://"))
        else "http://127.0.0.1:5000"
    )


async def pick(store: StoreClient, chosen: Sequence[str], row: Sequence[Any], measures: Sequence[str]) -> Values:
    """The curves after a row of the table of runs was pressed: its run joins the chosen ones, or leaves them."""
    run = str(row[-1]) if row else ""
    kept = [each for each in chosen if each != run]
    if len(kept) == len(chosen) and run:
        kept = [*kept[-MOST_CHOSEN + 1 :], run]
    return await draw(store, kept, measures)


async def fold(store: StoreClient, row: Sequence[Any], unfolded: Collection[str]) -> tuple[Table, list[str]] | None:
    """The table of runs after a row was pressed, and the sweeps that are unfolded then; None: it is no sweep's row."""
    if not row or row[-1] != SWEEP:
        return None
    name = str(row[0])[len(FOLDED) :]
    now = [each for each in unfolded if each != name]
    if len(now) == len(unfolded):
        now.append(name)
    try:
        return runs_table(await store.overview(stale_ok=True), now), now
    except StoryError:  # the page says it at its next look for news
        return None


async def samples(store: StoreClient, run: str, *, at: str = "") -> Values:
    """What a run (a short id) wrote while it learned, for `assets/learn.js`; `at` is the step to begin with."""
    try:
        seen = await store.overview(stale_ok=True)
        row = _find(seen, run)
        moments = [] if row is None else await store.samples(row.id)
    except StoryError as error:
        return {"run": "", "name": "", "moments": [], "at": None, "note": str(error), "no_ages": str(error)}
    missing = "This run has kept no sample stories." if row is not None and row.ages else NO_SAMPLES
    return {
        "run": run if row is not None and (moments or row.ages) else "",
        "name": row.name if row else "",
        "moments": [moment.model_dump() for moment in moments],
        "at": int(at) if re.fullmatch(r"[0-9]{1,9}", at) else None,
        "note": "" if moments else missing,
        "no_ages": why_no_ages(row),
    }


def runs_table(seen: Overview, unfolded: Collection[str] = ()) -> Table:
    """A row for each run, and one for each sweep, with its best trial's figures, above its trials if it is `unfolded`.

    A figure that is missing is an empty cell.
    """
    rows: list[list[Any]] = []
    for group in grouped(seen.runs):
        best, sweep = group[0], group[0].sweep
        if sweep:
            running = sum(trial.status == "running" for trial in group)
            known_as = [alias for trial in group for alias in aliases_of(trial, seen)]
            count = f"{len(group):,} trial{'s' * (len(group) != 1)}"
            status = ", ".join([count, *([f"{running} running"] if running else []), *known_as])
            mark = UNFOLDED if sweep in unfolded else FOLDED
            rows.append([mark + sweep, _marked(status, best), *_figures_of(best), SWEEP])
        if not sweep or sweep in unfolded:
            for run in group:
                status = ", ".join([run.status, *aliases_of(run, seen)])
                rows.append([run.name, _marked(status, run), *_figures_of(run), run.id[:SHORT]])
    return _table(RUN_COLUMNS, rows)


def grouped(runs: Sequence[RunRow]) -> list[list[RunRow]]:
    """Each run by itself, and the trials of each sweep together, the best first, in the place of the newest."""
    groups: dict[tuple[str, bool], list[RunRow]] = {}
    for run in runs:
        groups.setdefault((f"sweep {run.sweep}" if run.sweep else run.id, run.recorded), []).append(run)
    return [sorted(group, key=_from_the_best) for group in groups.values()]


def evaluations_table(seen: Overview) -> Table:
    """A row for each evaluation, with the version that was measured, where it is one of the registered ones."""
    rows: list[list[Any]] = []
    for row in seen.evaluations:
        values = _values(row.figures, EVALUATION_COLUMNS)
        stories = "" if row.stories is None else f"{row.stories:,} of {row.data or 'unknown data'}"
        rows.append([_marked(_measured(row.digest, seen), row), stories, *values, _moment(row.started)])
    columns: dict[str, int | None] = {"model": None, "held-out stories": None}
    columns |= {heading: digits for _, heading, digits, _ in EVALUATION_COLUMNS}
    return _table(columns | {"began (UTC)": None}, rows)


def benchmarks_table(seen: Overview) -> Table:
    """A row for each benchmark, with the version that was measured, where it is one of the registered ones."""
    rows: list[list[Any]] = []
    for row in seen.benchmarks:
        values = _values(row.figures, BENCHMARK_COLUMNS)
        held = {True: "✓ held", False: "✗ missed", None: ""}[row.passed]
        rows.append([_marked(row.target, row), _measured(row.digest, seen), *values, held, _moment(row.started)])
    columns: dict[str, int | None] = {"target": None, "model": None}
    columns |= {heading: digits for _, heading, digits, _ in BENCHMARK_COLUMNS}
    return _table(columns | {"thresholds": None, "began (UTC)": None}, rows)


def first_chosen(seen: Overview) -> list[str]:
    """The runs of the first picture: the newest, of a sweep the best, and of the record at least one beside them."""
    best = [group[0] for group in grouped(seen.runs)]
    own = [run.id[:SHORT] for run in best if run.tokens and not run.recorded]
    recorded = [run.id[:SHORT] for run in best if run.tokens and run.recorded]
    shown = own[: FIRST_CHOSEN - 1] if recorded else own[:FIRST_CHOSEN]
    return [*shown, *recorded[: FIRST_CHOSEN - len(shown)]]


def versions_shown(seen: Overview) -> Values:
    """Each version with its verdict and checks, every figure already in words, for `assets/versions.js`."""
    numbers = {version.digest: version.number for version in seen.versions}
    note = "" if seen.versions else "No version is registered yet; `story register` makes one."
    return {"note": note, "versions": [_version(version, numbers) for version in seen.versions]}


def names_in_the_picture(runs: Sequence[RunRow]) -> dict[str, str]:
    """A name for each run by its id: its own, with a part of the id where two share one."""
    count = Counter(run.name for run in runs)
    return {
        run.id: run.name if run.name and count[run.name] == 1 else f"{run.name} {run.id[:SHORT]}".strip()
        for run in runs
    }


def _figures_of(run: RunRow) -> list[Any]:
    """The cells of a run between its status and its id."""
    figures = [run.bits_per_byte, run.tokens, run.minutes, run.parameters]
    return [run.preset, *figures, run.data, _moment(run.started)]


def _from_the_best(run: RunRow) -> tuple[bool, float]:
    """Sorts runs; those without a figure come last."""
    return run.bits_per_byte is None, run.bits_per_byte or 0.0


def _values(figures: Mapping[str, float], columns: Sequence[tuple[str, str, int, float]]) -> list[float | None]:
    return [None if (value := figures.get(name)) is None else value * factor for name, _, _, factor in columns]


def _measured(digest: str, seen: Overview) -> str:
    """`version 3`, else the beginning of the digest."""
    numbers = {version.digest: version.number for version in seen.versions}
    return f"version {numbers[digest]}" if digest in numbers else digest[:SHORT]


def _marked(text: str, row: Row) -> str:
    return f"{text}, {FROM_RECORD}" if row.recorded else text


def _table(columns: Mapping[str, int | None], rows: list[list[Any]]) -> Table:
    def written(value: Any, digits: int | None) -> Any:
        if digits is None:
            return value
        return "" if value is None else f"{value:,.{digits}f}"

    texts = [[written(*cell) for cell in zip(row, columns.values(), strict=True)] for row in rows]
    return {"headers": list(columns), "data": rows, "metadata": {"display_value": texts}}


def _version(version: VersionRow, numbers: dict[str, int]) -> dict[str, Any]:
    tags, decision = version.tags, version.decision
    bits, step, tokens = (tags.get(f"model.{name}", "") for name in ("best_bits_per_byte", "step", "tokens"))
    facts = [
        f"recipe {tags['model.recipe']}" if tags.get("model.recipe") else "",
        f"{float(bits):.4f} bits per byte in training" if re.fullmatch(r"[0-9]+(\.[0-9]+)?", bits) else "",
        f"step {int(step):,}" if step.isdecimal() else "",
        f"{int(tokens):,} tokens" if tokens.isdecimal() else "",
        f"registered {_moment(version.created)} UTC",
        f"promoted {tags['promoted'][:10]}" if tags.get("promoted") else "",
        f"rolled back {tags['rolled_back'][:10]}" if tags.get("rolled_back") else "",
    ]
    return {
        "id": f"{'recorded-' * version.recorded}version-{version.number}",
        "number": version.number,
        "origin": FROM_RECORD if version.recorded else "",
        "digest": version.digest[:12],
        "aliases": list(version.aliases),
        "facts": [fact for fact in facts if fact],
        "verdict": "" if decision is None else decision.verdict,
        "headline": _headline(decision, numbers),
        "checks": [] if decision is None else list(decision.checks),
        "notes": [] if decision is None else list(decision.notes),
    }


def _headline(decision: DecisionRow | None, numbers: dict[str, int]) -> str:
    if decision is None:
        return "Not judged yet; `story gate` does it."
    counts = Counter(check["verdict"] for check in decision.checks)
    parts = [f"{counts[verdict]} {word}" for verdict, word in WORDS.items() if counts[verdict]]
    champion = numbers.get(decision.champion)
    against = f" against version {champion}" if champion is not None else ""
    return f"{', '.join(parts) or 'no checks'}{against}, judged {_moment(decision.decided)} UTC"


def _summary(seen: Overview) -> str:
    """`3 training runs, 2 versions, 4 benchmarks.`, and what of it comes from the record."""
    counts = {"training run": seen.runs, "version": seen.versions, "benchmark": seen.benchmarks}
    listed = ", ".join(f"{len(rows):,} {word}{'s' * (len(rows) != 1)}" for word, rows in counts.items())
    line = f"{listed}.{' Older runs are left out.' * seen.more}"
    if seen.exported is None or not any(row.recorded for row in (*seen.runs, *seen.versions)):
        return line
    line += f" How the shipped model was made is shown from its record of {_moment(seen.exported)[:10]}."
    if all(row.recorded for row in (*seen.runs, *seen.benchmarks, *seen.versions)):
        reason = seen.reason if seen.reason and seen.reason != NOTHING else "`story train` adds runs of your own."
        line += f" {reason}"
    return line


def _find(seen: Overview, short: str) -> RunRow | None:
    return next((run for run in seen.runs if short and run.id[:SHORT] == short), None)


def _run_with_samples(seen: Overview, asked: str) -> str:
    """The run whose stories are shown: the one that is asked for, else the best, for it has come farthest."""
    sampled = [run for run in seen.runs if run.stories or run.ages]
    if any(run.id[:SHORT] == asked for run in sampled):
        return asked
    best = min(sampled, key=_from_the_best, default=None)
    return "" if best is None else best.id[:SHORT]


def _label(run: RunRow) -> str:
    return _marked(f"{run.name or 'a run'} · {run.id[:SHORT]}", run)


def _moment(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M}"
