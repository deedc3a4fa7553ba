"""Runs that are killed, resumed, or lose their store on the way."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from model.errors import InputError
from training.tracking import store
from training.tracking.observer import EXPERIMENT, STORIES
from training.tracking.runs import RUN_FILE
from training.tracking.store import (
    database_file,
    default_tracking_uri,
    mark_stale_runs,
    open_experiment,
    open_store,
    owner_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
from tests.training.tracked import RECIPE, curve, end, evaluation, get_run, observer_on, start, step, text_of

KILLED_HALF_WAY = """
    import sys, time
    sys.path.insert(0, {repository!r})
    from pathlib import Path
    from tests.training.tracking.test_tracking import observer_on, start, step
    observer = observer_on({uri!r}, outbox={{"period": 0.05}})
    observer.started(start(Path({out!r})))
    observer.stepped(step(1))
    time.sleep(0.5)
    print(observer.run_id, flush=True)
    time.sleep(600)
"""


def test_a_run_killed_half_way_is_marked_by_the_next_one(
    tracking_uri: str, out: Path, tmp_path: Path, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = textwrap.dedent(KILLED_HALF_WAY).format(repository=str(repository), uri=tracking_uri, out=str(out))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        killed = process.stdout.readline().strip()
        process.send_signal(signal.SIGKILL)
    died = time.time() * 1000
    run = get_run(tracking_uri, killed)
    assert run.info.status == "RUNNING"  # nobody was left to say otherwise
    assert run.data.metrics["train/loss"] == 2.0

    observer = observer_on(tracking_uri)
    observer.started(start(tmp_path / "runs" / "next"))
    observer.ended(end())
    run = get_run(tracking_uri, killed)
    assert (run.info.status, run.data.tags["outcome"]) == ("KILLED", "killed")
    assert run.info.start_time <= run.info.end_time <= died
    assert killed in caplog.text
    assert get_run(tracking_uri, observer.run_id).info.status == "FINISHED"


def test_only_the_dead_are_marked_as_killed(tracking_uri: str) -> None:
    client = open_store(tracking_uri)
    experiment = open_experiment(client, tracking_uri, EXPERIMENT)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        dying = client.create_run(experiment, tags={"owner": owner_of(process.pid).to_text()}).info.run_id
        process.kill()
    alive = client.create_run(experiment, tags={"owner": owner_of().to_text()}).info.run_id
    foreign = client.create_run(experiment).info.run_id
    assert mark_stale_runs(client, experiment) == [dying]
    statuses = {run: client.get_run(run).info.status for run in (dying, alive, foreign)}
    assert statuses == {dying: "KILLED", alive: "RUNNING", foreign: "RUNNING"}
    assert mark_stale_runs(client, experiment) == []


def test_a_resume_goes_on_in_the_same_run(tracking_uri: str, out: Path, tmp_path: Path) -> None:
    first = observer_on(tracking_uri)
    first.started(start(out))
    first.stepped(step(100))
    first.evaluated(evaluation(100, 1.0))
    first.ended(end("stopped"))

    second = observer_on(tracking_uri)
    second.started(start(out, resumed_from=100, recipe=RECIPE | {"minutes": 3.0}))
    assert second.run_id == first.run_id
    assert get_run(tracking_uri, second.run_id).info.status == "RUNNING"
    second.stepped(step(101))
    second.evaluated(evaluation(200, 0.5))
    second.ended(end())

    client = open_store(tracking_uri)
    run = client.get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert [at for at, _ in curve(client, second.run_id, "train/loss")] == [100, 101]
    assert run.data.params["minutes"] == "null"
    assert run.data.tags["resumed.minutes"] == "3.0"
    assert (run.data.tags["resumed.times"], run.data.tags["resumed.from_step"]) == ("1", "100")
    table = json.loads(text_of(client, second.run_id, STORIES, tmp_path))
    assert [row[0] for row in table["data"]] == [100, 200]
    assert run.inputs is not None
    assert len(run.inputs.dataset_inputs) == 1
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_the_same_checkpoint_is_not_stored_twice(tracking_uri: str, out: Path, checkpoint: Path) -> None:
    for resumed_from in (0, 100, 200):
        observer = observer_on(tracking_uri)
        observer.started(start(out, resumed_from=resumed_from))
        if resumed_from == 200:
            (checkpoint / "model.safetensors").write_bytes(b"better")
        observer.ended(end(checkpoint=checkpoint))
        outputs = get_run(tracking_uri, observer.run_id).outputs
        assert outputs is not None
        assert len(outputs.model_outputs) == (2 if resumed_from == 200 else 1)


def test_a_resume_that_the_store_does_not_know_begins_a_run_linked_to_the_first(
    tracking_uri: str, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unknown = "0123456789abcdef0123456789abcdef"
    (out / RUN_FILE).write_text(json.dumps({"run_id": unknown}))
    observer = observer_on(tracking_uri)
    observer.started(start(out, resumed_from=100))
    observer.ended(end())
    tags = get_run(tracking_uri, observer.run_id).data.tags
    assert (tags["resumed.from_run"], tags["resumed.from_step"]) == (unknown, "100")
    assert unknown in caplog.text
    assert json.loads((out / RUN_FILE).read_text())["run_id"] == observer.run_id


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": 1}', '{"run_id": "../../x"}'])
def test_a_damaged_run_file_costs_the_link_and_not_the_training(tracking_uri: str, out: Path, text: str) -> None:
    (out / RUN_FILE).write_text(text)
    observer = observer_on(tracking_uri)
    observer.started(start(out, resumed_from=100))
    observer.ended(end())
    assert get_run(tracking_uri, observer.run_id).info.status == "FINISHED"


def hide_metrics(database: Path, *, back: bool = False) -> None:
    """Break the store as a failed migration would, at once and until it is undone."""
    names = ("hidden", "metrics") if back else ("metrics", "hidden")
    with sqlite3.connect(database) as connection:
        connection.execute("ALTER TABLE {} RENAME TO {}".format(*names))
    connection.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it did not happen within 30 seconds")
        time.sleep(0.01)


def test_a_store_that_fails_and_comes_back_has_every_point(
    tracking_uri: str, out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observer = observer_on(tracking_uri, outbox={"period": 0.02, "first_pause": 0.05, "longest_pause": 0.05})
    observer.started(start(out))
    hide_metrics(tmp_path / "mlflow.db")
    observer.stepped(step(1))
    wait_until(lambda: "MLflow does not answer" in caplog.text)
    observer.stepped(step(2))
    hide_metrics(tmp_path / "mlflow.db", back=True)
    observer.stepped(step(3))
    observer.ended(end())
    assert [at for at, _ in curve(open_store(tracking_uri), observer.run_id, "train/loss")] == [1, 2, 3]
    assert get_run(tracking_uri, observer.run_id).info.status == "FINISHED"
    assert caplog.text.count("MLflow does not answer") == 1
    assert list(out.glob("mlflow-unsent-*")) == []


def test_a_run_whose_database_is_locked_for_long_says_so_once_and_keeps_every_point(
    tracking_uri: str,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(store, "LOCK_SECONDS", 0)
    observer = observer_on(tracking_uri, outbox={"period": 0.02, "first_pause": 0.02, "longest_pause": 0.02})
    observer.started(start(out))
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for number in range(1, 4):
            observer.stepped(step(number))
        wait_until(lambda: "MLflow does not answer" in caplog.text)
        other.execute("ROLLBACK")
    observer.ended(end())
    assert [at for at, _ in curve(open_store(tracking_uri), observer.run_id, "train/loss")] == [1, 2, 3]
    assert len(caplog.messages) == 1
    assert "database is locked" in caplog.text
    assert capfd.readouterr() == ("", ""), "MLflow's own traces"


def test_what_a_broken_store_did_not_take_is_sent_by_a_resume(
    tracking_uri: str, out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = observer_on(tracking_uri)
    first.started(start(out))
    hide_metrics(tmp_path / "mlflow.db")
    first.stepped(step(100))
    first.evaluated(evaluation(100, 1.0))
    first.ended(end("stopped"))
    (unsent,) = out.glob("mlflow-unsent-*.jsonl")
    assert unsent.name in caplog.text
    assert "could not be closed as stopped" in caplog.text
    hide_metrics(tmp_path / "mlflow.db", back=True)

    second = observer_on(tracking_uri)
    second.started(start(out, resumed_from=100))
    second.stepped(step(101))
    second.evaluated(evaluation(200, 0.5))
    second.ended(end())
    client = open_store(tracking_uri)
    assert second.run_id == first.run_id
    assert [at for at, _ in curve(client, second.run_id, "train/loss")] == [100, 101]
    table = json.loads(text_of(client, second.run_id, STORIES, tmp_path))
    assert [row[0] for row in table["data"]] == [100, 200]
    assert not unsent.exists()


def test_a_full_buffer_is_reported_with_its_count(
    tracking_uri: str, out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observer = observer_on(tracking_uri, outbox={"limit": 5})
    observer.started(start(out))
    hide_metrics(tmp_path / "mlflow.db")
    observer.stepped(step(1))  # ten points: four curves on two axes, tokens, seconds
    observer.ended(end())
    assert "lacks 5 points" in caplog.text


def has_more_than(client: MlflowClient, run_id: str, key: str, count: int) -> bool:
    return len(curve(client, run_id, key)) > count


def test_system_metrics_are_logged_and_a_resume_goes_on_with_them(tracking_uri: str, out: Path) -> None:
    client = open_store(tracking_uri)
    seen = 0
    for resumed_from in (0, 100):
        observer = observer_on(tracking_uri, system_seconds=0.05)
        observer.started(start(out, resumed_from=resumed_from))
        cpu = "system/cpu_utilization_percentage"
        run_id = observer.run_id
        wait_until(partial(has_more_than, client, run_id, cpu, seen))
        observer.ended(end())
        steps = [at for at, _ in curve(client, run_id, cpu)]
        seen = len(steps)
        assert steps == list(range(seen))


def test_a_store_that_cannot_be_opened_is_said_before_the_first_step(out: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_bytes(b"this is no database, and it is longer than a header" * 40)
    observer = observer_on(f"sqlite:///{tmp_path}/broken.db")
    with pytest.raises(InputError, match=r"^MLFLOW_TRACKING_URI sqlite:.*cannot be used") as caught:
        observer.started(start(out))
    assert "\n" not in str(caught.value)
    observer.stepped(step(1))  # the loop may still report to it
    observer.ended(end("failed"))


def test_a_password_in_the_address_is_not_shown() -> None:
    with pytest.raises(InputError) as caught:
        open_store("nonsense://user:secret@host/db")
    assert "secret" not in str(caught.value)


def test_a_deleted_experiment_is_an_error_that_says_how_to_bring_it_back(tracking_uri: str, out: Path) -> None:
    client = open_store(tracking_uri)
    client.delete_experiment(open_experiment(client, tracking_uri, EXPERIMENT))
    with pytest.raises(InputError, match="mlflow experiments restore --experiment-id"):
        observer_on(tracking_uri).started(start(out))


def test_the_default_store_is_a_database_in_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert default_tracking_uri() == "sqlite:///mlflow.db"
    assert database_file(default_tracking_uri()) == tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert default_tracking_uri() == "http://127.0.0.1:5000"
    assert database_file(default_tracking_uri()) is None


def test_mlflow_is_imported_by_the_first_start_and_not_by_the_module(repository: Path) -> None:
    check = "import sys, training.tracking.observer, training.run; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=repository, check=False).returncode == 0
