"""Training runs as the page shows them, held against what the loop reported and what MLflow itself says."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.dashboard.records import RunRow
from experiments.dashboard.runs import MOST_MOMENTS, curves, finite, moments, run_rows, thinned
from tests.experiments.dashboard.direct import DirectReader
from tests.experiments.dashboard.made import Made, made
from tests.training.tracked import observer_on, start, step
from training.tracking.observer import STORIES
from training.tracking.store import OWNER, open_store


@pytest.fixture(scope="module")
def store() -> Made:
    return made()


def row_of(uri: str, name: str) -> RunRow:
    rows, _ = run_rows(open_store(uri, read_only=True))
    return next(row for row in rows if row.name == name)


def test_each_training_run_has_a_row_and_nothing_else_has(store: Made) -> None:
    rows, more = run_rows(open_store(store.uri, read_only=True))
    assert {row.name for row in rows} == {"learned", "stopped"}, (
        "no evaluation, benchmark or verdict is among them"
    )
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
    looks = store.trained.evaluations
    assert [point[0] for point in held_out.points] == [look.tokens for look in looks]
    assert [point[1] for point in held_out.points] == pytest.approx([look.elapsed / 60 for look in looks])
    assert [point[2] for point in held_out.points] == pytest.approx([look.bits_per_byte for look in looks])
    (training,) = curves(client, [run], "training")
    steps = store.trained.steps
    assert [point[0] for point in training.points] == [each.tokens for each in steps]
    assert [point[2] for point in training.points] == pytest.approx([each.loss for each in steps])
    over_tokens = client.get_metric_history(run, "val/bits_per_byte_by_tokens")
    assert sorted((each.step, each.value) for each in over_tokens) == [
        (tokens, value) for tokens, _, value in held_out.points
    ]


def test_stories_come_by_step_as_they_were_written(store: Made) -> None:
    client = open_store(store.uri, read_only=True)
    found = moments(client, row_of(store.uri, "learned").id)
    looks = store.trained.evaluations
    assert [(each.step, each.tokens) for each in found] == [(look.step, look.tokens) for look in looks]
    assert [each.stories for each in found] == [look.samples for look in looks]
    assert len(found[0].stories) == 2


def test_a_run_with_more_looks_than_are_shown_keeps_its_first_and_its_last(
    store: Made, tmp_path: Path
) -> None:
    shutil.copy(store.uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    client = open_store(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.create_run("0").info.run_id
    rows = [[number, number * 7, 1.0, 1.0, "A", f" story {number}"] for number in range(250)]
    columns = ["step", "tokens", "loss", "bits_per_byte", "prompt", "continuation"]
    client.log_text(run, json.dumps({"columns": columns, "data": rows}), STORIES)
    found = moments(client, run)
    assert len(found) == MOST_MOMENTS
    assert (found[0].step, found[-1].step) == (0, 249)
    client.log_text(run, "{", STORIES)
    assert moments(client, run) == [], "a damaged table costs the stories, not the page"


def test_what_crosses_the_pipe_comes_back_as_it_was(store: Made) -> None:
    client = open_store(store.uri, read_only=True)
    reader = DirectReader(store.uri)
    run = row_of(store.uri, "learned").id

    async def ask() -> None:
        assert list((await reader.overview()).runs) == run_rows(client)[0]
        assert await reader.curves([run], "training") == curves(client, [run], "training")
        assert await reader.moments(run) == moments(client, run)

    asyncio.run(ask())


@given(
    st.lists(
        st.tuples(st.integers(0, 10**9), st.floats(0, 1e5), st.floats(-100, 100)), max_size=80, unique=True
    ),
    st.integers(1, 30),
)
def test_thinning_keeps_order_mean_and_bound(points: list[tuple[int, float, float]], most: int) -> None:
    points.sort()
    made = thinned(points, most)
    assert len(made) == min(most, len(points))
    assert [point[0] for point in made] == sorted(point[0] for point in made)
    if points and len(points) % len(made) == 0:  # then each new point stands for equally many
        means = [sum(point[2] for point in each) / len(each) for each in (points, made)]
        assert means[0] == pytest.approx(means[1], abs=1e-6)


@pytest.mark.parametrize(
    ("value", "told"), [(1, 1.0), (0.5, 0.5), (float("nan"), None), (float("inf"), None)]
)
def test_a_figure_that_is_no_number_is_none(value: float, told: float | None) -> None:
    assert finite(value) == told
