"""The ages of a run: networks at log-spaced steps that MLflow keeps, of real trainings in a real store."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.engine.load import load_bare_engine
from model.generation import GenerationRequest, SamplingParams
from tests.training.runs import REGULARISED, Recorder, smallest
from tests.training.tracked import end, get_run, observer_on, start, step, text_of
from tests.training.tracking.test_tracking_outages import hide_metrics
from training.tracking.observer import AGE_TABLE, MlflowObserver
from training.tracking.runs import table_rows
from training.tracking.store import open_store
from training.trainer.loop import Trainer, ages_due
from training.trainer.observers import AgeReport
from training.trainer.recipe import Recipe


def aged_run(
    uri: str, shards: Path, out: Path, recipe: Recipe | None = None, then: Callable[[Trainer], None] = lambda made: None
) -> MlflowObserver:
    """A tiny training, logged to the store at `uri`; `then` gets the trainer after each step."""
    observer, recorder = observer_on(uri), Recorder()
    resume = (out / "last").is_dir()
    trainer = Trainer(recipe or smallest(), data=shards, out=out, observers=[recorder, observer], resume=resume)
    recorder.then = lambda step: then(trainer)
    trainer.run()
    return observer


def stored(uri: str, run: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of the run's table of ages, each as its own folder says it too."""
    client = open_store(uri)
    rows = table_rows(text_of(client, run, AGE_TABLE, folder))
    folders = sorted(entry.path for entry in client.list_artifacts(run, "ages") if entry.is_dir)
    assert folders == [f"ages/step-{row['step']:06d}" for row in rows]
    assert get_run(uri, run).data.tags["ages"] == str(len(rows))
    return rows


def weights_of(uri: str, run: str, step: int, folder: Path) -> dict[str, torch.Tensor]:
    path = open_store(uri).download_artifacts(run, f"ages/step-{step:06d}/model.safetensors", str(folder))
    return load_file(path)


@pytest.mark.parametrize("changes", [{}, REGULARISED], ids=["weights", "average"])
def test_the_ages_are_the_networks_of_their_steps_in_half_precision(
    tracking_uri: str, shards: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def copy(trainer: Trainer) -> None:
        if trainer.average is not None:
            names = [name for name, _ in trainer.network.named_parameters()]
            own = dict(zip(names, trainer.average.values, strict=True))
        else:
            own = dict(trainer.network.named_parameters())
        seen[trainer.step] = {name: value.detach().half().clone() for name, value in own.items()}

    out = tmp_path / "run"
    observer = aged_run(tracking_uri, shards, out, smallest(**changes), copy)
    rows = stored(tracking_uri, observer.run_id, tmp_path)
    # At least one step apart; behind the first evaluation, at step 4, each waits for the next one.
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 8, 12]
    assert [row["held_out"] for row in rows] == [row["step"] in (4, 8, 12) for row in rows]
    for row in rows[1:]:
        found = weights_of(tracking_uri, observer.run_id, row["step"], tmp_path)
        expected = seen[row["step"]]
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list((out / "ages").iterdir()), "what was sent is not kept twice"


def test_an_age_has_the_figures_of_its_step(tracking_uri: str, shards: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    observer = observer_on(tracking_uri)
    Trainer(smallest(), data=shards, out=tmp_path / "run", observers=[recorder, observer]).run()
    rows = stored(tracking_uri, observer.run_id, tmp_path)
    measured = {report.step: report.bits_per_byte for report in recorder.evaluations}
    split = recorder.starts[0].data["splits"]["train"]
    nat = split["tokens"] / split["bytes"] * 1.4426950408889634
    by_step = {report.step: report for report in recorder.steps}
    assert rows[0] == {"step": 0, "tokens": 0, "bits_per_byte": None, "held_out": False}
    for row in rows[1:]:
        report = by_step[row["step"]]
        assert row["tokens"] == report.tokens
        assert row["bits_per_byte"] == pytest.approx(measured.get(row["step"], report.loss * nat))


def test_the_last_age_writes_what_the_checkpoint_writes_that_is_exported(
    tracking_uri: str, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    observer = aged_run(tracking_uri, shards, out)
    age = Path(open_store(tracking_uri).download_artifacts(observer.run_id, "ages/step-000012", str(tmp_path)))
    request = GenerationRequest(prompt="One day", max_tokens=60, sampling=SamplingParams(seed=3, keep_names=False))
    with load_bare_engine(age) as engine:
        written = engine.submit(request).wait(60)
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (half / name).write_bytes((out / "last" / name).read_bytes())
    weights = load_file(out / "last" / "model.safetensors")
    save_file({name: value.half() for name, value in weights.items()}, half / "model.safetensors")
    with load_bare_engine(half) as engine:
        assert engine.submit(request).wait(60).text == written.text
    assert written.text


def test_a_run_that_breaks_and_goes_on_keeps_no_age_twice(tracking_uri: str, shards: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "run", smallest(eval_every=6, save_every=2)
    whole = aged_run(tracking_uri, shards, tmp_path / "whole", recipe)
    expected = stored(tracking_uri, whole.run_id, tmp_path / "whole")

    def broken(trainer: Trainer) -> None:
        if trainer.step == 4:
            raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="the power is gone"):
        aged_run(tracking_uri, shards, out, recipe, broken)
    first = json.loads((out / "mlflow-run.json").read_text())["run_id"]
    before = stored(tracking_uri, first, tmp_path)
    assert [row["step"] for row in before] == [0, 1, 2, 3]
    made = stamps(tracking_uri, first)
    again = aged_run(tracking_uri, shards, out, recipe)  # from step 2, so that step 3 comes a second time
    assert again.run_id == first
    assert stored(tracking_uri, first, tmp_path) == expected
    assert {name: made[name] for name in made} == {name: stamps(tracking_uri, first)[name] for name in made}


def stamps(uri: str, run: str) -> dict[str, int]:
    """When the weights of each age were written, by step."""
    root = Path(get_run(uri, run).info.artifact_uri.removeprefix("file://")) / "ages"
    return {path.parent.name: path.stat().st_mtime_ns for path in root.glob("*/model.safetensors")}


def test_ages_that_come_again_by_the_clock_at_other_steps_are_left_out(tracking_uri: str, out: Path) -> None:
    first = observer_on(tracking_uri)
    first.started(start(out))
    for number in (0, 20, 35):
        first.aged(age(number))
    first.ended(end("failed"))
    second = observer_on(tracking_uri)
    second.started(start(out, resumed_from=10))
    for number in (19, 36, 61, 62):
        second.aged(age(number, last=number == 62))
    second.ended(end())
    rows = table_rows(text_of(open_store(tracking_uri), second.run_id, AGE_TABLE, out))
    assert [row["step"] for row in rows] == [0, 20, 35, 61, 62]


def age(number: int, *, last: bool = False) -> AgeReport:
    def write(folder: Path, notes: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(notes))
        (folder / "model.safetensors").write_bytes(b"weights")

    return AgeReport(step=number, tokens=512 * number, bits_per_byte=1.0, last=last, write=write)


def test_what_a_broken_store_did_not_take_waits_in_the_run_s_folder_for_a_resume(
    tracking_uri: str, shards: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "run", smallest()

    def broken(trainer: Trainer) -> None:
        if trainer.step == 1:
            hide_metrics(tmp_path / "mlflow.db")

    observer = aged_run(tracking_uri, shards, out, recipe, broken)  # to its end: the store is not needed for that
    waiting = {path.name for path in (out / "ages").iterdir()}
    assert {"step-000003", "step-000012"} <= waiting
    hide_metrics(tmp_path / "mlflow.db", back=True)
    again = aged_run(tracking_uri, shards, out, recipe)
    assert again.run_id == observer.run_id
    assert [row["step"] for row in stored(tracking_uri, again.run_id, tmp_path)] == [0, 1, 2, 3, 4, 8, 12]
    assert not list((out / "ages").iterdir())


def test_a_kill_leaves_whole_ages_to_the_resume_and_nothing_of_half_ones(tracking_uri: str, out: Path) -> None:
    first = observer_on(tracking_uri, outbox={"period": 1e6})
    first.started(start(out))
    age(5).write(out / "ages" / "step-000005", {"step": 5, "tokens": 1, "bits_per_byte": None, "held_out": False})
    (out / "ages" / "step-000008.new").mkdir()
    (out / "ages" / "step-000008.new" / "config.json").write_text("{")
    second = observer_on(tracking_uri)
    second.started(start(out, resumed_from=5))
    second.ended(end())
    first.ended(end())
    rows = table_rows(text_of(open_store(tracking_uri), second.run_id, AGE_TABLE, out))
    assert [row["step"] for row in rows] == [5]
    assert not list((out / "ages").iterdir())


def test_an_age_that_cannot_be_written_or_is_taken_away_costs_no_run(
    tracking_uri: str, out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(folder: Path, notes: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        raise OSError(28, "No space left on device")

    observer = observer_on(tracking_uri)
    observer.started(start(out))
    observer.aged(AgeReport(step=1, tokens=1, bits_per_byte=None, last=False, write=full))
    assert "the age of step 1 is not kept" in caplog.text
    assert not list((out / "ages").iterdir())
    hide_metrics(tmp_path / "mlflow.db")  # so that it has to wait
    observer.stepped(step(2))
    observer.aged(age(2))
    shutil.rmtree(out / "ages" / "step-000002")
    hide_metrics(tmp_path / "mlflow.db", back=True)
    observer.ended(end())
    assert "ages/step-000002 is not there any more" in caplog.text
    assert get_run(tracking_uri, observer.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("options", [{"recipe": smallest(ages=0)}, {"keep_model": False}], ids=["ages=0", "a sweep"])
def test_who_wants_none_has_none(tracking_uri: str, shards: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    recipe = options.pop("recipe", smallest())
    observer = observer_on(tracking_uri, **options)
    Trainer(recipe, data=shards, out=tmp_path / "run", observers=[observer]).run()
    assert open_store(tracking_uri).list_artifacts(observer.run_id, "ages") == []
    assert "ages" not in get_run(tracking_uri, observer.run_id).data.tags
    assert not (tmp_path / "run" / "ages").exists()


@given(count=st.integers(0, 40), steps=st.integers(1, 3000))
def test_ages_are_due_one_after_the_other_and_all_at_the_end(count: int, steps: int) -> None:
    due = [ages_due(step / steps, count) for step in range(steps + 1)]
    assert due == sorted(due)
    assert due[-1] == count
    assert due[0] == min(count, 1)


def test_twelve_ages_of_two_thousand_steps_are_spaced_by_one_factor() -> None:
    due = [ages_due(step / 2000, 12) for step in range(2001)]
    steps = [due.index(number) for number in range(1, 13)]
    assert steps == [0, *(math.ceil(2000 * 256 ** (number / 10 - 1)) for number in range(11))]
