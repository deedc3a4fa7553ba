"""What a run leaves in a real MLflow store."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.tracked import DIGEST, RECIPE, curve, end, evaluation, get_run, observer_on, start, step, text_of
from training.tracking.observer import EXPERIMENT, STORIES, samples_page, samples_rows
from training.tracking.runs import flat
from training.tracking.store import open_store
from training.trainer.observers import Outcome


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
        "init": "random weights",
    }
    assert run.data.tags["data.digest"] == DIGEST
    assert run.data.tags["outcome"] == "finished"
    assert run.data.tags["outcome.reason"] == "a reason"
    assert run.data.tags["package.mlflow"].startswith("3.")

    assert curve(client, observer.run_id, "train/loss") == [(1, 3.0), (2, 1.5), (3, 1.0), (4, 2.0)]
    assert curve(client, observer.run_id, "train/loss_by_tokens") == [(512, 3.0), (1024, 1.5), (1536, 1.0), (2048, 2.0)]
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


def test_sample_stories_are_pages_and_one_table_over_the_steps(tracking_uri: str, out: Path, tmp_path: Path) -> None:
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
    for name in ("config.json", "model.safetensors"):
        assert (stored / name).read_bytes() == (checkpoint / name).read_bytes()
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert model.tags["checkpoint.digest"] == hashlib.sha256(weights).hexdigest()
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


@pytest.mark.parametrize(("outcome", "status"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")])
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
    recipe = {"data": Path("/home/someone/data/tiny"), "files": ["/home/someone/a.jsonl", "b"], "x": "C:\\me\\y"}
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
