"""Sweeps of real trainings: what they leave in the study, in MLflow and on disk, and how they are stopped."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import story
from experiments.dashboard.rows import run_rows
from experiments.sweep.run import STOPPED, TRIALS, UNDECIDED, SweepOptions, run_sweep
from experiments.sweep.study import EXPERIMENT, OWNER, RECIPE, best_of, open_study, rows, summary
from model.errors import InputError
from tests.experiments.sweep.conftest import Swept
from tests.experiments.sweep.sweeps import STEPS, ended, small_space
from tests.postgres_server import postgres_server
from tests.training.runs import train, weights
from training.tracking.store import Owner, open_store
from training.trainer.recipe import Recipe, load_recipe


def asked(swept: Swept, **changes: Any) -> SweepOptions:
    """A call for the finished sweep's own plan."""
    given: dict[str, Any] = {"name": "first", "storage": swept.storage, "trials": 3, "threads": 1}
    return SweepOptions(**given | changes)


def new(tmp_path: Path, data: Path, **changes: Any) -> SweepOptions:
    """A call for a new sweep of the same small space, not logged."""
    given: dict[str, Any] = {
        "name": "new",
        "storage": f"sqlite:///{tmp_path}/sweeps.db",
        "steps": STEPS,
        "data": str(data),
        "threads": 1,
        "space": small_space(tmp_path),
        "out": tmp_path / "out",
    }
    return SweepOptions(**given | changes)


def wait_for(condition: Any, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come about in time")


def run(swept: Swept, *arguments: str) -> Result:
    return CliRunner().invoke(story.app, ["sweep", *arguments, "--storage", swept.storage])


def test_each_trial_is_complete_or_was_ended_early_for_a_reason(swept: Swept) -> None:
    study = open_study(swept.storage, "first")
    found = rows(study)
    assert swept.code == 0
    assert [row["state"] for row in found][:1] == ["complete"], swept.lines
    assert "pruned" in [row["state"] for row in found], swept.lines
    for row in found:
        if row["state"] == "pruned":
            assert "behind the others" in row["reason"]
            assert row["step"] < STEPS
        else:
            assert (row["state"], row["step"]) == ("complete", STEPS)
    kept = [folder.name for folder in swept.out.glob("trial-*")]
    best = best_of(study)
    assert best is not None
    assert kept == [f"trial-{best['number']:04d}"]


def test_mlflow_shows_the_trials_below_the_sweep(swept: Swept, tmp_path: Path) -> None:
    client = open_store(swept.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.data.tags["sweep.trial"]: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    found = rows(open_study(swept.storage, "first"))
    assert sorted(children) == [str(row["number"]) for row in found]
    for row in found:
        child = children[str(row["number"])]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status == ("FINISHED" if row["state"] == "complete" else "KILLED")
        assert child.data.params["seed"] == "0"
        assert float(child.data.params["optimizer.matrix_lr"]) == row["params"]["optimizer.matrix_lr"]
        curve = [point.value for point in client.get_metric_history(child.info.run_id, "val/bits_per_byte")]
        assert min(curve) == pytest.approx(row["value"]) or row["state"] == "pruned"
        outputs = client.get_run(child.info.run_id).outputs
        assert outputs is None or outputs.model_outputs == [], "checkpoints stay out of the store"
    digests = {child.data.tags["data.digest"] for child in children.values()}
    assert digests == {parent.data.tags["data.digest"]}
    shown, _ = run_rows(client)  # of the page Experiments, which groups them
    assert {(run.id, run.sweep) for run in shown} == {(child.info.run_id, "first") for child in children.values()}
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best_bits_per_byte"] == min(row["value"] for row in found if row["state"] == "complete")
    assert parent.data.params["budget"] == f"{STEPS} steps"
    assert json.loads(parent.data.params["search.optimizer.matrix_lr"]) == {"choices": [0.02, 0.0]}
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"plan.json", TRIALS, "history.png", "best.txt", "best-recipe.json"} <= names
    table = json.loads(Path(client.download_artifacts(parent.info.run_id, TRIALS, str(tmp_path))).read_text())
    assert [row[0] for row in table["data"]] == [row["number"] for row in found]


def test_the_best_trial_can_be_trained_again_from_what_was_recorded(swept: Swept, tmp_path: Path) -> None:
    study = open_study(swept.storage, "first")
    best = best_of(study)
    assert best is not None
    program, verb, *words = shlex.split(best["exact_command"])
    assert (program, verb, words[:2]) == ("story", "train", ["--preset", "tiny"])
    recipe = load_recipe("tiny", overrides=words[2:])
    assert recipe == Recipe.from_dict(study.trials[best["number"]].user_attrs[RECIPE])
    recorder = train(recipe, swept.data, tmp_path / "again")
    assert recorder.ends[0].best_bits_per_byte == pytest.approx(best["value"], rel=1e-6)
    ours = weights(swept.out / f"trial-{best['number']:04d}" / "best")
    assert all((ours[name] - value).abs().max() < 1e-5 for name, value in weights(tmp_path / "again" / "best").items())


def test_a_sweep_that_has_its_trials_is_only_shown(swept: Swept) -> None:
    lines: list[str] = []
    study, code = run_sweep(asked(swept), lines.append)
    assert (len(study.trials), code, lines) == (3, 0, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": STEPS + 1}, r"budget must stay what sweep first was begun with \(8 steps, got 9 steps\)"),
        ({"seed": 5}, r"seed must stay what sweep first was begun with \(3, got 5\)"),
        ({"place": "modal"}, r"on must stay"),
        ({"trials": 0}, "trials must be greater than or equal to 1, got 0"),
        ({"name": "../up"}, "name must be a plain name"),
    ],
)
def test_trials_that_could_not_be_compared_are_refused(swept: Swept, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_sweep(asked(swept, **changes))


def test_another_space_under_the_same_name_is_refused(swept: Swept, tmp_path: Path) -> None:
    other = tmp_path / "space.yaml"
    other.write_text("preset: tiny\nsearch:\n  dropout: {low: 0.0, high: 0.1}\n")
    with pytest.raises(InputError, match="space must stay what sweep first was begun with; another name"):
        run_sweep(asked(swept, space=other))


def test_a_new_sweep_needs_a_budget_and_fitting_data(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--minutes or --steps"):
        run_sweep(new(tmp_path, shards, steps=None))
    with pytest.raises(InputError, match=r"512 tokens where the space's recipe has model\.vocab_size 4096"):
        run_sweep(new(tmp_path, shards, space=None))


def test_the_command_shows_a_sweep_as_a_table_and_as_json(swept: Swept) -> None:
    shown = run(swept, "first", "--show")
    assert shown.exit_code == 0, shown.stderr
    assert "best: trial 0" in shown.stdout
    assert "story train --preset tiny model.pattern=RA" in shown.stdout
    assert "optimizer.matrix_lr=0.02 optimizer.table_lr=0.008\n" in shown.stdout
    shown_json = json.loads(run(swept, "first", "--show", "--json").stdout)
    assert shown_json == json.loads(json.dumps(summary(open_study(swept.storage, "first"))))
    assert shown_json["best"]["value"] == shown_json["rows"][shown_json["best"]["number"]]["value"]
    assert run(swept).stdout == "first\n"
    assert json.loads(run(swept, "--json").stdout) == {"sweeps": ["first"]}
    missing = run(swept, "second", "--show")
    assert (missing.exit_code, missing.stderr) == (
        2,
        "story: name second is no sweep of this storage; there are: first\n",
    )


def test_a_sweep_of_which_no_trial_came_to_its_end_is_undecided(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is pretended: no recipe is known that surely diverges within eight steps."""
    diverged = ended("failed", "step 3: loss nan", None, 3)
    monkeypatch.setattr("experiments.sweep.run.run_trial", lambda *_, observers, **__: observers[0].ended(diverged))
    study, code = run_sweep(new(tmp_path, shards, trials=2), lambda line: None)
    assert [row["state"] for row in rows(study)] == ["pruned", "pruned"]
    assert code == UNDECIDED
    assert best_of(study) is None


def test_ctrl_c_saves_the_trial_and_the_next_call_goes_on_with_it(
    shards: Path, tmp_path: Path, tracking_uri: str
) -> None:
    call = new(tmp_path, shards, trials=1, tracking_uri=tracking_uri)
    log = tmp_path / "out" / "trial-0000" / "best" / "config.json"

    def interrupt() -> None:
        wait_for(log.exists)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    lines: list[str] = []
    study, code = run_sweep(call, lines.append)
    thread.join()
    assert code == STOPPED
    first, waiting = rows(study)
    assert (first["state"], first["reason"], waiting["state"]) == ("failed", "interrupted by hand", "waiting")
    assert 0 < first["step"] < STEPS
    study, code = run_sweep(call, lines.append)
    assert code == 0
    assert [row["state"] for row in rows(study)] == ["failed", "complete"]
    assert rows(study)[1]["step"] == STEPS
    client = open_store(tracking_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (child,) = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert child.data.tags["resumed.times"] == "1"
    assert child.data.tags["sweep.trial"] == "1"
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert (parent.info.status, parent.data.tags["outcome"]) == ("FINISHED", "finished")


def test_ctrl_c_lets_parallel_trials_save(shards: Path, tmp_path: Path) -> None:
    call = new(tmp_path, shards, trials=2, workers=2)
    lines: list[str] = []

    def interrupt() -> None:
        wait_for((tmp_path / "out" / "trial-0000" / "best" / "config.json").exists)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    study, code = run_sweep(call, lines.append)
    thread.join()
    assert code == STOPPED, lines
    states = [row["state"] for row in rows(study)]
    assert states[0] == "failed", lines
    assert rows(study)[0]["reason"] == "interrupted by hand"
    assert states.count("waiting") == states.count("failed")
    assert (tmp_path / "out" / "trial-0000" / "last" / "trainer.pt").exists()


def test_two_workers_finish_a_sweep_though_one_of_them_is_killed(shards: Path, tmp_path: Path) -> None:
    call = new(tmp_path, shards, trials=3, workers=2)
    lines: list[str] = []
    results: list[Any] = []
    sweep = threading.Thread(target=lambda: results.append(run_sweep(call, lines.append)))
    sweep.start()

    def at_work() -> list[tuple[int, int]]:
        """(trial, process) of trials that have left something to go on from."""
        return [
            (trial.number, owner.pid)
            for trial in open_study(call.storage, "new").trials
            if trial.state.name == "RUNNING"
            and (owner := Owner.from_text(trial.user_attrs.get(OWNER, ""))) is not None
            and trial.intermediate_values
        ]

    try:
        wait_for(lambda: any("starting" in line for line in lines))
        number, pid = wait_for(at_work)[0]
        assert pid != os.getpid()
        os.kill(pid, signal.SIGKILL)
    finally:
        sweep.join(180)
    assert not sweep.is_alive()
    study, code = results[0]
    found = rows(study)
    assert code == 0, lines
    assert f"trial {number}: its process was killed by signal 9; it is queued again" in lines
    assert found[number]["state"] == "failed"
    (again,) = [row for row in found if row["retry_of"] == number]
    assert again["params"] == found[number]["params"]
    assert again["state"] in ("complete", "pruned")
    assert sum(row["state"] in ("complete", "pruned") for row in found) == 3
    assert len({trial.user_attrs[OWNER] for trial in study.trials}) == len(found), "each has a process of its own"


@pytest.mark.slow
def test_a_study_lives_in_postgresql_beside_whatever_else_is_there(shards: Path, tmp_path: Path) -> None:
    """A real server, which takes seconds to make."""
    with postgres_server() as server:
        url = server.url
        _, code = run_sweep(new(tmp_path, shards, trials=1, storage=url), lambda line: None)
        assert code == 0
        assert rows(open_study(url, "new"))[0]["state"] == "complete"
        import psycopg

        with psycopg.connect(url) as connection:
            found = connection.execute("select schemaname from pg_tables where tablename = 'trials'").fetchall()
        assert found == [("story_sweep",)]
        wrong = url.replace("story:hunter2@", "nobody:secret@")
        with pytest.raises(InputError, match="cannot be used") as caught:
            open_study(wrong, "new")
        assert "secret" not in str(caught.value)
