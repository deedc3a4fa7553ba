"""The record of how a model was made, compared with what the training loop, the evaluation and the gate reported."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import story
from experiments.benchmark.evidence import BenchmarkEvidence
from experiments.dashboard.client import NOTHING, UnreadableError
from experiments.dashboard.recorded import (
    FEWEST_SAMPLE_SETS,
    MAX_BYTES,
    RECORD,
    export_record,
    fitted,
    packed,
    read_record,
    with_record,
)
from experiments.dashboard.records import Overview, RunRow, SampleSet, TrainingRecord
from experiments.quality.evidence import QualityEvidence
from model.architecture.folder import PRETRAINED, ModelFolder
from model.errors import InputError
from tests.experiments.dashboard.direct import DirectClient
from tests.experiments.dashboard.made import made, shipped
from tests.training.tracked import observer_on, start, step
from training.tracking.store import open_store


@pytest.fixture(scope="module")
def record() -> TrainingRecord:
    """Of the version that came of the run `learned`."""
    return export_record(shipped().uri, ["challenger"])


def of_sets(count: int) -> TrainingRecord:
    """A record of one run with so many sets of sample stories."""
    run = RunRow(
        id="a" * 32, name="a", status="finished", preset="small", started=0, minutes=1.0, tokens=5,
        bits_per_byte=1.0, parameters=1, data="d", stories=True,
    )  # fmt: skip
    sets = tuple(
        SampleSet(step=number, tokens=number, bits_per_byte=None, stories=(("A", f" story {number}"),))
        for number in range(count)
    )
    return TrainingRecord(exported=0, overview=Overview(runs=(run,)), curves={}, samples={run.id: sets})


def test_a_record_holds_the_run_as_the_loop_reported_it(record: TrainingRecord) -> None:
    trained = made().trained
    (run,) = record.overview.runs
    assert (run.name, run.status, run.tokens) == ("learned", "finished", trained.steps[-1].tokens)
    assert (run.settings["name"], run.settings["steps"]) == ("smallest", "12")
    (held_out,) = record.curves["held-out"]
    assert held_out.run == run.id
    assert [point[:2] for point in held_out.points] == [(each.step, each.tokens) for each in trained.evaluations]
    assert [point[3] for point in held_out.points] == pytest.approx(
        [each.bits_per_byte for each in trained.evaluations], rel=1e-5
    )
    for measure, name in (("training", "loss"), ("rate", "learning_rate"), ("speed", "tokens_per_second")):
        (curve,) = record.curves[measure]  # type: ignore[index]
        assert [point[3] for point in curve.points] == pytest.approx(
            [getattr(each, name) for each in trained.steps], rel=1e-5
        )
    assert [each.stories for each in record.samples[run.id]] == [each.samples for each in trained.evaluations]


def test_a_record_holds_what_was_measured_and_judged_of_the_version_and_nothing_of_others(
    record: TrainingRecord,
) -> None:
    seen, digest = record.overview, shipped().version.digest
    (version,) = seen.versions
    assert (version.digest, version.aliases) == (digest, ("challenger",))
    assert version.decision is not None
    assert version.decision.verdict == shipped().decision.verdict
    assert len(version.decision.checks) == len(shipped().decision.checks)
    (evaluation,) = seen.evaluations
    quality = QualityEvidence.newest(shipped().uri, digest)
    assert quality is not None
    assert (evaluation.digest, evaluation.stories) == (digest, len(quality.losses))
    bits = sum(loss.bits for loss in quality.losses) / sum(loss.bytes for loss in quality.losses)
    assert evaluation.figures["bits_per_byte"] == pytest.approx(bits)
    (benchmark,) = seen.benchmarks
    speed = BenchmarkEvidence.newest(shipped().uri, digest)
    assert speed is not None
    assert (benchmark.id, benchmark.figures["ttft_p95"]) == (speed.run_id, speed.figures["ttft_p95"].value)


def test_a_record_is_the_same_after_it_was_written_and_read_and_names_no_folder(
    record: TrainingRecord, tmp_path: Path
) -> None:
    path = tmp_path / "record.json.gz"
    path.write_bytes(packed(record))
    assert read_record(path) == record
    assert packed(record) == path.read_bytes(), "the same bytes each time"
    text = gzip.decompress(path.read_bytes()).decode()
    folder = Path(shipped().uri.removeprefix("sqlite:///")).parent
    assert str(folder) not in text
    assert folder.name not in text


@given(count=st.integers(1, 40), limit=st.integers(200, 3_000))
def test_a_record_that_is_too_large_keeps_the_first_and_the_last_stories(count: int, limit: int) -> None:
    whole = of_sets(count)
    try:
        smaller = fitted(whole, limit)
    except InputError:
        assert len(packed(of_sets(min(count, FEWEST_SAMPLE_SETS)))) > limit - 20
        return
    assert len(packed(smaller)) <= limit
    (sets,), (kept,) = whole.samples.values(), smaller.samples.values()
    assert (kept[0], kept[-1]) == (sets[0], sets[-1])
    assert [each for each in sets if each in kept] == list(kept)
    assert (smaller == whole) == (len(packed(whole)) <= limit)


def test_no_record_is_none_and_a_damaged_one_is_named(record: TrainingRecord, tmp_path: Path) -> None:
    path = tmp_path / "record.json.gz"
    assert read_record(path) is None
    content = packed(record)
    plain = json.loads(gzip.decompress(content))
    for damaged in (
        b"no gzip",
        content[:-20],
        content[:300],
        gzip.compress(b"[]"),
        gzip.compress(json.dumps(plain | {"format": 2}).encode()),
        gzip.compress(json.dumps(plain | {"written by": "hand"}).encode()),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"made, got record\.json\.gz: ") as caught:
            read_record(path)
        assert "\n" not in str(caught.value)


def test_a_store_that_is_not_there_leaves_the_record_alone(record: TrainingRecord, tmp_path: Path) -> None:
    async def ask() -> None:
        client = DirectClient(f"sqlite:///{tmp_path}/mlflow.db", record=record)
        seen = await client.overview()
        assert (seen.reason, seen.exported) == (NOTHING, record.exported)
        assert [run.recorded for run in seen.runs] == [True]
        run = seen.runs[0].id
        assert await client.curves([run], "rate") == list(record.curves["rate"])
        assert tuple(await client.samples(run)) == record.samples[run]
        with pytest.raises(UnreadableError):
            await client.curves([run, "b" * 32], "rate")

    asyncio.run(ask())
    assert list(tmp_path.iterdir()) == []


def test_what_the_store_has_itself_is_not_shown_twice(record: TrainingRecord) -> None:
    async def ask() -> None:
        direct, both = DirectClient(shipped().uri), DirectClient(shipped().uri, record=record)
        alone = await direct.overview()
        assert await both.overview() == alone.model_copy(update={"exported": record.exported})
        ids = [run.id for run in alone.runs]
        assert await both.curves(ids, "training") == await direct.curves(ids, "training")

    asyncio.run(ask())


def test_a_record_stands_beside_another_store(record: TrainingRecord) -> None:
    foreign = record.overview.runs[0].model_copy(update={"id": "f" * 32})
    other = record.model_copy(
        update={
            "overview": record.overview.model_copy(update={"runs": (foreign,)}),
            "curves": {"rate": (record.curves["rate"][0].model_copy(update={"run": foreign.id}),)},
            "samples": {},
        }
    )

    async def ask() -> None:
        client = DirectClient(made().uri, record=other)
        seen = await client.overview()
        assert [run.recorded for run in seen.runs] == [False, False, True]
        assert [version.recorded for version in seen.versions] == [False, False, True]
        stored = await DirectClient(made().uri).overview()
        assert seen.runs[:2] == stored.runs
        mixed = await client.curves([foreign.id, stored.runs[0].id], "rate")
        assert [curve.run for curve in mixed] == [foreign.id, stored.runs[0].id]
        assert mixed[0].points == other.curves["rate"][0].points

    asyncio.run(ask())


def test_only_an_ended_training_can_be_exported(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    observer = observer_on(uri)
    (tmp_path / "alive").mkdir()
    observer.started(start(tmp_path / "alive"))
    observer.stepped(step(1))
    assert observer._outbox is not None
    observer._outbox.close()
    with pytest.raises(InputError, match="must have ended, and alive is running"):
        export_record(uri, ["alive"])
    with pytest.raises(InputError, match="must be a training run or a version of one, and version 1"):
        export_record(made().uri, ["1"])


def story_record(*arguments: str) -> Result:
    return CliRunner().invoke(story.app, ["record", *arguments])


def test_the_verb_writes_the_file_and_says_what_is_in_it(
    record: TrainingRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shipped().uri)
    out = tmp_path / "new" / "record.json.gz"
    result = story_record("challenger", "--out", str(out), "--json")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    made_again = read_record(out)
    assert made_again is not None
    assert made_again.model_copy(update={"exported": record.exported}) == record
    assert (shown["bytes"], shown["versions"], shown["evaluations"]) == (out.stat().st_size, 1, 1)
    assert shown["points"] == sum(len(curve.points) for curves in record.curves.values() for curve in curves)
    words = story_record("learned", "--out", str(out))
    assert words.stdout.startswith(f"wrote {out}: bytes ")
    assert story_record("nobody", "--out", str(out)).exit_code == 2
    assert story_record("learned", "--out", str(out / "below")).exit_code == 2


def test_an_empty_store_is_no_error_beside_a_record(record: TrainingRecord) -> None:
    assert [run.recorded for run in with_record(Overview(), record).runs] == [True]


def test_the_machine_s_figures_lie_where_the_training_was_at_that_moment(tmp_path: Path) -> None:
    from mlflow.entities import Metric

    from experiments.dashboard.rows import curves

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = open_store(uri)
    run = client.create_run("0").info.run_id
    began = 1_700_000_000_000
    points = [
        Metric(key, value, began + 1000 * second, 10 * second)
        for second in range(11)
        for key, value in (("elapsed_seconds", second), ("tokens", 100 * second))
    ]
    points += [Metric("system/cpu_utilization_percentage", 50.0 + n, began + 2500 * n, n) for n in range(4)]
    client.log_batch(run, metrics=points)
    (curve,) = curves(client, [run], "processor")
    assert [point[:2] for point in curve.points] == [(round(25 * n), 250 * n) for n in range(4)]
    assert [point[2] for point in curve.points] == pytest.approx([2.5 * n / 60 for n in range(4)], abs=1e-3)
    assert [point[3] for point in curve.points] == [50.0 + n for n in range(4)]


@pytest.mark.skipif(not RECORD.exists(), reason="no record was exported yet")
def test_the_record_in_the_repository_is_of_the_model_that_ships() -> None:
    record = read_record()
    assert record is not None
    assert RECORD.stat().st_size <= MAX_BYTES
    assert ModelFolder.open(PRETRAINED).digest in {version.digest for version in record.overview.versions}
    assert record.overview.runs
    assert all(record.samples[run.id] for run in record.overview.runs)
