from __future__ import annotations

import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from training.logged_model import folder_digest
from training.mlflow_store import bury_dead_runs, database_file, open_experiment, open_store, without_password
from training.owner import owner_of
from training.report import EvaluationReport, Outcome, RunEnd, RunStart, StepReport
from training.shown import flat, samples_page, samples_rows
from training.tracked_run import RUN_FILE
from training.tracking import EXPERIMENT, STORIES, MlflowObserver, default_tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DIGEST = "23e8e5daf148a0ad1d60562b19672a3dc7c781b320c87b41ebe1dddb4460b6cb"
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 0,
    "minutes": None,
    "compile": True,
    "model": {"width": 64, "pattern": "RRA"},
    "optimizer": {"name": "muon", "matrix_lr": 0.02},
    "samples": ["Once upon a time"],
}


def start(out: Path, *, resumed_from: int = 0, recipe: dict[str, Any] = RECIPE) -> RunStart:
    return RunStart(
        recipe=recipe,
        parameters=5_200_000,
        data={"digest": DIGEST, "splits": {"train": {"tokens": 100, "bytes": 400}}, "sources": []},
        data_folder=Path("data/tinystories"),
        out=out,
        world_size=2,
        resumed_from=resumed_from,
    )


def step(number: int, *, loss: float = 2.0) -> StepReport:
    return StepReport(
        step=number,
        tokens=number * 512,
        loss=loss,
        learning_rate=0.01,
        grad_norm=0.5,
        tokens_per_second=7000.0,
        elapsed=number * 0.5,
        progress=number / 1000,
    )


def evaluation(number: int, bits: float, *, best: bool = True) -> EvaluationReport:
    return EvaluationReport(
        step=number,
        tokens=number * 512,
        loss=bits * 2.5,
        bits_per_byte=bits,
        best=best,
        samples=(("Once upon a time", f" there was a café at step {number}.\n\nThe end."),),
        elapsed=number * 0.5,
    )


def end(outcome: Outcome = "finished", checkpoint: Path | None = None) -> RunEnd:
    return RunEnd(
        outcome=outcome,
        reason="a reason",
        step=200,
        tokens=102_400,
        best_bits_per_byte=0.8,
        checkpoint=checkpoint,
    )


def observer_on(uri: str, **options: Any) -> MlflowObserver:
    """Without system metrics, whose thread has nothing to do with most tests."""
    return MlflowObserver(uri, **{"system_seconds": None, **options})


def get_run(uri: str, run_id: str) -> Run:
    return open_store(uri).get_run(run_id)


def curve(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((one.step, one.value) for one in client.get_metric_history(run_id, key))


def text_of(client: MlflowClient, run_id: str, path: str, folder: Path) -> str:
    return Path(client.download_artifacts(run_id, path, str(folder))).read_text(encoding="utf-8")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def checkpoint(out: Path) -> Path:
    folder = out / "best"
    folder.mkdir()
    (folder / "config.json").write_text('{"width": 64}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    return folder


def test_a_whole_run_can_be_read_back_from_the_store(
    tracking_uri: str, out: Path, checkpoint: Path, tmp_path: Path
) -> None:
    observer = observer_on(tracking_uri)
    observer.started(start(out))
    for number in range(1, 4):
        observer.stepped(step(number, loss=3.0 / number))
    observer.evaluated(evaluation(3, 1.2))
    observer.stepped(step(4))
    observer.evaluated(evaluation(4, 1.3, best=False))
    observer.ended(end(checkpoint=checkpoint))

    client = open_store(tracking_uri)
    run = client.get_run(observer.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "tiny"
    assert client.get_experiment(run.info.experiment_id).name == EXPERIMENT

    assert run.data.params == flat(RECIPE) | {
        "parameters": "5200000",
        "world_size": "2",
        "data": "tinystories",
    }
    assert run.data.tags["data.digest"] == DIGEST
    assert run.data.tags["outcome"] == "finished"
    assert run.data.tags["outcome.reason"] == "a reason"
    assert run.data.tags["package.mlflow"].startswith("3.")

    assert curve(client, observer.run_id, "train/loss") == [(1, 3.0), (2, 1.5), (3, 1.0), (4, 2.0)]
    assert curve(client, observer.run_id, "train/loss_by_tokens") == [
        (512, 3.0),
        (1024, 1.5),
        (1536, 1.0),
        (2048, 2.0),
    ]
    both_ways = [f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second")]
    both_ways += ["val/loss", "val/bits_per_byte"]
    for key in both_ways:
        over_steps = curve(client, observer.run_id, key)
        assert curve(client, observer.run_id, f"{key}_by_tokens") == [(at * 512, y) for at, y in over_steps]
    assert curve(client, observer.run_id, "tokens") == [(n, n * 512.0) for n in range(1, 5)]
    assert curve(client, observer.run_id, "val/bits_per_byte") == [(3, 1.2), (4, 1.3)]
    assert run.data.metrics["val/best_bits_per_byte"] == 1.2

    assert json.loads(text_of(client, observer.run_id, "recipe.json", tmp_path)) == RECIPE
    assert json.loads(text_of(client, observer.run_id, "data.json", tmp_path))["digest"] == DIGEST
    assert "packages" in json.loads(text_of(client, observer.run_id, "environment.json", tmp_path))


def test_the_data_set_is_an_input_with_its_digest(tracking_uri: str, out: Path) -> None:
    observer = observer_on(tracking_uri)
    observer.started(start(out))
    observer.ended(end())
    inputs = get_run(tracking_uri, observer.run_id).inputs
    assert inputs is not None
    (given_data,) = inputs.dataset_inputs
    assert given_data.dataset.name == "tinystories"
    assert DIGEST.startswith(given_data.dataset.digest)
    assert json.loads(given_data.dataset.source)["digest"] == DIGEST
    assert [(tag.key, tag.value) for tag in given_data.tags] == [("mlflow.data.context", "training")]


def test_sample_stories_are_pages_and_one_table_over_the_steps(
    tracking_uri: str, out: Path, tmp_path: Path
) -> None:
    observer = observer_on(tracking_uri)
    observer.started(start(out))
    for number in (100, 200):
        observer.evaluated(evaluation(number, 100 / number))
    observer.ended(end())
    client = open_store(tracking_uri)
    names = {file.path for file in client.list_artifacts(observer.run_id, "samples")}
    assert names == {"samples/step-000100.md", "samples/step-000200.md", STORIES}
    page = text_of(client, observer.run_id, "samples/step-000100.md", tmp_path)
    assert page == samples_page(evaluation(100, 1.0))
    assert "> Once upon a time there was a café at step 100.\n>\n> The end.\n" in page

    from mlflow.artifacts import load_dict

    table = load_dict(f"{client.get_run(observer.run_id).info.artifact_uri}/{STORIES}")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["step"], row["bits_per_byte"]) for row in rows] == [(100, 1.0), (200, 0.5)]
    assert rows[1]["prompt"] + rows[1]["continuation"] == "".join(evaluation(200, 0.5).samples[0])
    shown = client.get_run(observer.run_id).data.tags["mlflow.loggedArtifacts"]
    assert json.loads(shown) == [{"path": STORIES, "type": "table"}]


def test_the_best_checkpoint_is_a_logged_model_with_its_files_and_figures(
    tracking_uri: str, out: Path, checkpoint: Path, tmp_path: Path
) -> None:
    observer = observer_on(tracking_uri)
    observer.started(start(out))
    for number, bits in ((100, 0.9), (200, 0.8), (300, 0.85)):
        observer.evaluated(evaluation(number, bits, best=bits != 0.85))
    observer.ended(end(checkpoint=checkpoint))

    client = open_store(tracking_uri)
    run = client.get_run(observer.run_id)
    assert run.outputs is not None
    (output,) = run.outputs.model_outputs
    assert output.step == 200
    model = client.get_logged_model(output.model_id)
    assert (model.name, str(model.status), model.source_run_id) == ("story-writer", "READY", observer.run_id)
    assert {file.path for file in client.list_logged_model_artifacts(model.model_id)} == {
        "config.json",
        "model.safetensors",
    }
    stored = Path(model.artifact_location)
    assert folder_digest(stored) == folder_digest(checkpoint) == model.tags["checkpoint.digest"]
    assert model.tags["data.digest"] == DIGEST
    figures = {metric.key: (metric.step, metric.value) for metric in model.metrics or []}
    assert figures == {"val/bits_per_byte": (200, 0.8), "val/loss": (200, 2.0)}
    # The model's figures are the run's own points: its curve has not grown.
    assert curve(client, observer.run_id, "val/bits_per_byte") == [(100, 0.9), (200, 0.8), (300, 0.85)]


def test_artifacts_lie_beside_the_database(tracking_uri: str, out: Path, tmp_path: Path) -> None:
    observer = observer_on(tracking_uri)
    observer.started(start(out))
    observer.ended(end())
    where = Path(get_run(tracking_uri, observer.run_id).info.artifact_uri)
    assert where.is_relative_to(tmp_path / "mlartifacts" / EXPERIMENT)
    assert (where / "recipe.json").is_file()


@pytest.mark.parametrize(
    ("outcome", "status"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")]
)
def test_the_store_shows_how_a_run_ended(tracking_uri: str, out: Path, outcome: Outcome, status: str) -> None:
    observer = observer_on(tracking_uri)
    observer.started(start(out))
    assert get_run(tracking_uri, observer.run_id).info.status == "RUNNING"
    observer.ended(end(outcome))
    run = get_run(tracking_uri, observer.run_id)
    assert (run.info.status, run.data.tags["outcome"]) == (status, outcome)


def test_a_loss_that_is_not_finite_reaches_the_store(tracking_uri: str, out: Path) -> None:
    observer = observer_on(tracking_uri)
    observer.started(start(out))
    observer.stepped(step(1, loss=math.nan))
    observer.stepped(step(2, loss=math.inf))
    observer.ended(end("failed"))
    first, second = curve(open_store(tracking_uri), observer.run_id, "train/loss")
    assert math.isnan(first[1])
    assert second[1] == sys.float_info.max  # MLflow's own way to write infinity


KILLED_HALF_WAY = """
    import sys, time
    sys.path.insert(0, {repository!r})
    from pathlib import Path
    from tests.training.test_tracking import observer_on, start, step
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
    script = textwrap.dedent(KILLED_HALF_WAY).format(
        repository=str(repository), uri=tracking_uri, out=str(out)
    )
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
    assert bury_dead_runs(client, experiment) == [dying]
    statuses = {run: client.get_run(run).info.status for run in (dying, alive, foreign)}
    assert statuses == {dying: "KILLED", alive: "RUNNING", foreign: "RUNNING"}
    assert bury_dead_runs(client, experiment) == []


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
def test_a_damaged_run_file_costs_the_link_and_not_the_training(
    tracking_uri: str, out: Path, text: str
) -> None:
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
    observer.stepped(step(1))  # the loop may still tell it things
    observer.ended(end("failed"))


def test_a_password_in_the_address_is_not_shown() -> None:
    with pytest.raises(InputError) as caught:
        open_store("nonsense://reader:secret@host/db")
    assert "secret" not in str(caught.value)
    assert without_password("postgresql://reader:se@cret@host:5432/db") == "postgresql://host:5432/db"


def test_a_deleted_experiment_is_an_error_that_says_how_to_bring_it_back(
    tracking_uri: str, out: Path
) -> None:
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
    check = "import sys, training.tracking, training.run; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=repository, check=False).returncode == 0


def test_flat_parameters_are_the_recipe_s_leaves() -> None:
    assert flat(RECIPE) == {
        "name": "tiny",
        "seed": "0",
        "minutes": "null",
        "compile": "true",
        "model.width": "64",
        "model.pattern": "RRA",
        "optimizer.name": "muon",
        "optimizer.matrix_lr": "0.02",
        "samples": '["Once upon a time"]',
    }


def test_folders_do_not_leave_the_machine() -> None:
    recipe = {
        "data": Path("/home/someone/data/tiny"),
        "files": ["/home/someone/a.jsonl", "b"],
        "x": "C:\\me\\y",
    }
    assert flat(recipe) == {"data": "tiny", "files": '["a.jsonl", "b"]', "x": "y"}


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.lists(st.integers())
names = st.text("abc_", min_size=1, max_size=3)
tables = st.dictionaries(names, leaves, max_size=3)


@given(st.dictionaries(names, leaves | tables | st.dictionaries(names, tables, max_size=2), max_size=4))
def test_a_recipe_can_be_rebuilt_from_its_flat_parameters(recipe: dict[str, Any]) -> None:
    rebuilt: dict[str, Any] = {}
    for key, text in flat(recipe).items():
        *folders, name = key.split(".")
        place = rebuilt
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = json.loads(text)
    assert rebuilt == recipe


def test_the_table_of_samples_is_json_that_a_browser_reads() -> None:
    rows = samples_rows(evaluation(1, math.nan))
    assert json.loads(json.dumps(rows, allow_nan=False))[0][:4] == [1, 512, None, None]


def test_the_digest_of_a_folder_follows_names_and_contents(tmp_path: Path) -> None:
    digests = set()
    for number, (name, content) in enumerate([("a", "x"), ("a", "y"), ("b", "x")]):
        folder = tmp_path / str(number) / "deep"
        folder.mkdir(parents=True)
        (folder / name).write_text(content)
        digests.add(folder_digest(folder.parent))
        assert folder_digest(folder.parent) == folder_digest(folder.parent)
    assert len(digests) == 3


def test_training_output_stays_free_of_mlflow_s_own_messages(
    tracking_uri: str, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    observer = observer_on(tracking_uri, system_seconds=10.0)
    observer.started(start(out))
    observer.ended(end())
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert logging.getLogger("mlflow.store.db.utils").level == logging.WARNING
