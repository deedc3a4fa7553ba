"""The store as the page shows it, compared with what the training loop, the gate and the benchmark reported."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.benchmark.evidence import BenchmarkEvidence
from experiments.dashboard.records import Overview, RunRow
from experiments.dashboard.rows import (
    MAX_SAMPLE_SETS,
    benchmark_rows,
    curves,
    finite,
    overview,
    run_rows,
    sample_sets,
    target_name,
    version_rows,
    without_places,
)
from experiments.registry.versions import versions
from tests.experiments.dashboard.direct import DirectClient
from tests.experiments.dashboard.made import Made, made
from tests.training.tracked import observer_on, start, step
from training.tracking.observer import STORIES
from training.tracking.store import OWNER, open_store

NAME = st.text("abcXYZ019_-.", min_size=1, max_size=12)


@pytest.fixture(scope="module")
def store() -> Made:
    return made()


def row_of(uri: str, name: str) -> RunRow:
    rows, _ = run_rows(open_store(uri, read_only=True))
    return next(row for row in rows if row.name == name)


def test_each_training_run_has_a_row_and_nothing_else_has(store: Made) -> None:
    rows, more = run_rows(open_store(store.uri, read_only=True))
    assert {row.name for row in rows} == {"learned", "stopped"}, "no evaluation, benchmark or verdict is among them"
    assert [row.started for row in rows] == sorted((row.started for row in rows), reverse=True)
    assert not more


def test_a_row_says_what_the_loop_reported(store: Made) -> None:
    row, last = row_of(store.uri, "learned"), store.trained.steps[-1]
    begin = store.trained.starts[0]
    assert (row.status, row.preset, row.stories) == ("finished", "smallest", True)
    assert (row.tokens, row.parameters) == (last.tokens, begin.parameters)
    assert row.minutes == pytest.approx(store.trained.evaluations[-1].elapsed / 60, abs=0.05)
    assert row.bits_per_byte == pytest.approx(min(each.bits_per_byte for each in store.trained.evaluations))


def test_a_run_that_was_stopped_by_hand_is_not_called_killed(store: Made) -> None:
    assert row_of(store.uri, "stopped").status == "stopped"


def test_a_run_whose_process_died_is_shown_as_killed_and_left_as_it_is(store: Made, tmp_path: Path) -> None:
    shutil.copy(store.uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    observer = observer_on(uri)
    (tmp_path / "alive").mkdir()
    observer.started(start(tmp_path / "alive"))
    observer.stepped(step(1))
    assert observer._outbox is not None
    observer._outbox.close()
    client = open_store(uri)
    assert row_of(uri, "alive").status == "running"
    owner = json.loads(client.get_run(observer.run_id).data.tags[OWNER])
    client.set_tag(observer.run_id, OWNER, json.dumps(owner | {"began": owner["began"] - 1000}))
    assert row_of(uri, "alive").status == "killed"
    assert client.get_run(observer.run_id).info.status == "RUNNING"


def test_a_curve_is_what_the_loop_reported_over_tokens_and_over_minutes(store: Made) -> None:
    client = open_store(store.uri, read_only=True)
    run = row_of(store.uri, "learned").id
    (held_out,) = curves(client, [run], "held-out")
    evaluations = store.trained.evaluations
    assert [point[:2] for point in held_out.points] == [(each.step, each.tokens) for each in evaluations]
    assert [point[2] for point in held_out.points] == pytest.approx(
        [each.elapsed / 60 for each in evaluations], abs=1e-3
    )
    assert [point[3] for point in held_out.points] == pytest.approx(
        [each.bits_per_byte for each in evaluations], rel=1e-5
    )
    (training,) = curves(client, [run], "training")
    steps = store.trained.steps
    assert [point[1] for point in training.points] == [each.tokens for each in steps]
    assert [point[3] for point in training.points] == pytest.approx([each.loss for each in steps], rel=1e-5)
    over_tokens = {each.step: each.value for each in client.get_metric_history(run, "val/bits_per_byte_by_tokens")}
    assert {point[1]: point[3] for point in held_out.points} == pytest.approx(over_tokens, rel=1e-5)


def test_sample_stories_are_those_that_were_written_by_step(store: Made) -> None:
    client = open_store(store.uri, read_only=True)
    found = sample_sets(client, row_of(store.uri, "learned").id)
    evaluations = store.trained.evaluations
    assert [(each.step, each.tokens) for each in found] == [(each.step, each.tokens) for each in evaluations]
    assert [each.stories for each in found] == [each.samples for each in evaluations]
    assert len(found[0].stories) == 2


def test_a_run_with_more_evaluations_than_are_shown_keeps_its_first_and_its_last(store: Made, tmp_path: Path) -> None:
    shutil.copy(store.uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    client = open_store(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.create_run("0").info.run_id
    rows = [[number, number * 7, 1.0, 1.0, "A", f" story {number}"] for number in range(250)]
    columns = ["step", "tokens", "loss", "bits_per_byte", "prompt", "continuation"]
    client.log_text(run, json.dumps({"columns": columns, "data": rows}), STORIES)
    found = sample_sets(client, run)
    assert len(found) == MAX_SAMPLE_SETS
    assert (found[0].step, found[-1].step) == (0, 249)
    client.log_text(run, "{", STORIES)
    assert sample_sets(client, run) == [], "a damaged table costs the stories, not the page"


def test_what_crosses_the_pipe_comes_back_as_it_was(store: Made) -> None:
    client = open_store(store.uri, read_only=True)
    direct = DirectClient(store.uri)
    run = row_of(store.uri, "learned").id

    async def ask() -> None:
        assert list((await direct.overview()).runs) == run_rows(client)[0]
        assert await direct.curves([run], "training") == curves(client, [run], "training")
        assert await direct.samples(run) == sample_sets(client, run)

    asyncio.run(ask())


@pytest.mark.parametrize(("value", "expected"), [(1, 1.0), (0.5, 0.5), (float("nan"), None), (float("inf"), None)])
def test_a_figure_that_is_no_number_is_none(value: float, expected: float | None) -> None:
    assert finite(value) == expected


def test_each_version_has_its_aliases_and_the_newest_verdict_on_it(store: Made) -> None:
    rows = version_rows(open_store(store.uri, read_only=True), {})
    known = versions(store.uri)
    assert [(row.number, row.digest, row.aliases) for row in rows] == [
        (each.number, each.digest, each.aliases) for each in known
    ]
    assert [row.aliases for row in rows] == [("challenger",), ("champion",)]
    assert rows[0].decision is None, "the challenger was never judged"
    decision = rows[1].decision
    assert decision is not None
    assert (decision.verdict, decision.champion) == ("fail", store.decision.champion or "")


def test_every_check_is_shown_with_its_evidence(store: Made) -> None:
    (row,) = (row for row in version_rows(open_store(store.uri, read_only=True), {}) if row.number == 1)
    assert row.decision is not None
    for shown, check in zip(row.decision.checks, store.decision.checks, strict=True):
        assert (shown["metric"], shown["verdict"]) == (check.threshold.metric, check.verdict)
        assert shown["threshold"].startswith(str(check.threshold))
        assert shown["why"] == ("" if check.verdict == "pass" else check.why)
        if check.bounds is None:
            assert [shown[name] for name in ("value", "margin", "bounds")] == ["", "", ""]
        else:
            assert float(shown["value"]) == pytest.approx(check.bounds.value, rel=1e-3)
            assert float(shown["margin"]) == pytest.approx(check.margin, rel=1e-2)
    assert {check["verdict"] for check in row.decision.checks} == {"pass", "fail", "undecided"}


def test_a_decision_is_read_once_and_one_whose_file_is_gone_keeps_its_verdict(store: Made, tmp_path: Path) -> None:
    client = open_store(store.uri, read_only=True)
    known: dict[str, object] = {}
    before = version_rows(client, known)  # type: ignore[arg-type]
    assert len(known) == 1
    assert version_rows(client, known)[1].decision is before[1].decision  # type: ignore[arg-type]
    shutil.copy(store.uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    writing = open_store(f"sqlite:///{tmp_path}/mlflow.db")
    gate = writing.get_experiment_by_name("story-gate")
    assert gate is not None
    run = writing.create_run(
        gate.experiment_id, tags={"artifact.digest": before[1].digest, "gate": "undecided", "champion.digest": ""}
    )
    writing.set_terminated(run.info.run_id)
    decision = version_rows(writing, {})[1].decision
    assert decision is not None
    assert (decision.verdict, decision.checks) == ("undecided", ())
    assert decision.notes == ("the checks of this decision cannot be read",)


def test_a_benchmark_is_shown_with_the_figures_of_its_rows(store: Made) -> None:
    (row,) = benchmark_rows(open_store(store.uri, read_only=True))
    evidence = BenchmarkEvidence.newest(store.uri, row.digest)
    assert evidence is not None
    assert row.id == evidence.run_id
    assert row.target == "local"
    expected = {name: figure.value for name, figure in evidence.figures.items()}
    assert {name: row.figures[name] for name in expected} == pytest.approx(expected)
    assert {"tokens_per_second", "ttft_p50", "success_rate"} <= set(expected)


def test_nothing_shown_names_a_folder_an_address_or_a_person(store: Made) -> None:
    client = open_store(store.uri, read_only=True)
    seen = overview(client)
    text = seen.model_dump_json()
    assert Overview.model_validate_json(text) == seen
    for private in (str(Path.home()), str(Path(store.uri).parent), "sqlite:", "mlflow.db", "owner", "file:"):
        assert private not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot be read: No such file: '/srv/lily/mlruns/1/a.json'", "cannot be read: No such file: '…'"),
        ("see ~/stories/one and C:\\Users\\lily\\x", "see … and …"),
        ("sqlite:////srv/x.db (locked)", "… (locked)"),
        ("postgresql://lily:secret@db.example:5432/mlflow", "…"),
        ("2,000 tokens/s at 3/4 of the load, bits/byte", "2,000 tokens/s at 3/4 of the load, bits/byte"),
        ("either/or: pass", "either/or: pass"),
    ],
)
def test_places_are_left_out_and_units_stay(text: str, shown: str) -> None:
    assert without_places(text) == shown


@given(st.lists(NAME, min_size=2, max_size=5), st.sampled_from(["/", "file:///", "s3://", "~/"]))
def test_no_part_of_a_place_is_left(parts: list[str], root: str) -> None:
    assert without_places(f"at {root}{'/'.join(parts)} today") == "at … today"


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("local", "local"),
        ("local (mine)", "local (mine)"),
        ("models:/story-writer@champion", "story-writer@champion"),
        ("http://10.0.0.7:8000", "a server"),
        ("https://user:pw@host/x", "a server"),
    ],
)
def test_a_target_is_shown_without_its_address(target: str, shown: str) -> None:
    assert target_name(target) == shown
