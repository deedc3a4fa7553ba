"""The rules for trials: who is tried, counted, ended early, tried again, kept. Trainings are pretended (`pretend`)."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from experiments.sweep.plan import Prune
from experiments.sweep.render import rows
from experiments.sweep.study import FIRST, MAX_TRIES, OWNER, open_study
from experiments.sweep.trial import MAX_FAILURES, TrialEnd, TrialJob
from tests.experiments.sweep.sweeps import fake_plan, fake_work, pretend
from tests.training.runs import smallest
from training.tracking.store import owner_of


def test_the_recipe_as_it_stands_comes_first_and_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    study, work, lines = fake_work(tmp_path, trials=5)
    work.run()
    found = rows(study)
    assert [row["state"] for row in found] == ["complete"] * 5
    assert found[0]["base"]
    assert found[0]["params"] == {"dropout": smallest(dropout=0.5).dropout}
    best = min(found, key=lambda row: row["value"])
    assert best["value"] < found[0]["value"]
    assert [folder.name for folder in (tmp_path / "out").glob("trial-*")] == [f"trial-{best['number']:04d}"]
    assert lines[0] == "trial 0: 1.4000 bits/byte"


def test_a_sweep_that_is_continued_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    whole, work, _ = fake_work(tmp_path, trials=10, name="whole")
    work.run()
    for trials in (3, 9, 9, 10):
        parts, work, _ = fake_work(tmp_path, trials=trials, name="parts")
        work.run()
    drawn = [[trial.params for trial in study.trials] for study in (whole, parts)]
    assert drawn[0] == drawn[1]
    assert len({str(params) for params in drawn[0]}) == 10


@pytest.mark.parametrize("by", ["median", "hyperband"])
def test_a_trial_that_falls_behind_is_ended_early_but_not_before_its_share(by: str, tmp_path: Path) -> None:
    prune = Prune.model_validate({"by": by, "after_trials": 2, "after_eighths": 3})
    study, work, lines = fake_work(tmp_path, trials=8, plan=fake_plan(prune))
    work.run()
    found = rows(study)
    pruned = [row for row in found if row["state"] == "pruned"]
    assert pruned
    assert {row["state"] for row in found} == {"complete", "pruned"}
    assert all(3 <= int(row["pruned_at"][0]) < 8 for row in pruned)
    assert any("pruned, behind the others at 3/8" in line for line in lines)
    if by == "median":
        complete = [row["value"] for row in found if row["state"] == "complete"]
        assert min(complete) < min(row["value"] for row in pruned)


def test_a_loss_that_is_not_finite_counts_as_a_bad_trial_and_is_not_a_failure(tmp_path: Path) -> None:
    def diverging(job: TrialJob) -> TrialEnd:
        if job.number == 1:
            return TrialEnd("diverged", "step 3: loss nan", None, 3, 300)
        return pretend(job)

    study, work, _ = fake_work(tmp_path, diverging, trials=3)
    work.run()
    assert [row["state"] for row in rows(study)] == ["complete", "pruned", "complete"]
    assert rows(study)[1]["reason"] == "step 3: loss nan"
    assert work.failures == []


def test_values_that_make_no_recipe_are_skipped_by_name(tmp_path: Path) -> None:
    plan = fake_plan()
    plan.space.search["micro_rows"] = plan.space.search["dropout"].model_copy(
        update={"low": None, "high": None, "choices": (3, 2)}
    )
    study, work, _ = fake_work(tmp_path, trials=4, plan=plan)
    work.run()
    odd = [row for row in rows(study) if row["params"]["micro_rows"] == 3]
    assert odd
    assert all(row["state"] == "pruned" and "micro_rows must divide rows=4" in row["reason"] for row in odd)


def test_the_next_trial_follows_a_failure_until_several_fail_in_a_row(tmp_path: Path) -> None:
    def failing(job: TrialJob) -> TrialEnd:
        if job.number != 1:
            raise OSError("no space left on device")
        return pretend(job)

    study, work, lines = fake_work(tmp_path, failing, trials=20)
    work.run()
    assert [row["state"] for row in rows(study)] == ["failed", "complete", *["failed"] * MAX_FAILURES]
    assert work.failures[0] == "trial 0: no space left on device"
    assert lines[0] == "trial 0: failed: no space left on device"


def test_a_trial_that_was_stopped_goes_on_with_its_values_in_the_same_folder(tmp_path: Path) -> None:
    jobs: list[TrialJob] = []

    def stopping(job: TrialJob) -> TrialEnd:
        jobs.append(job)
        job.prune_check(1, 2.0)
        return TrialEnd("stopped", "interrupted by hand", 2.0, 4, 400)

    study, work, lines = fake_work(tmp_path, stopping, trials=5)
    work.run()
    assert work.interrupted
    assert lines == ["trial 0: stopped at step 4; it is queued again"]

    def resuming(job: TrialJob) -> TrialEnd:
        jobs.append(job)
        return pretend(job)

    study, work, _ = fake_work(tmp_path, resuming, trials=1)
    work.run()
    assert [row["state"] for row in rows(study)] == ["failed", "complete"]
    assert rows(study)[1]["retry_of"] == 0
    assert jobs[0].recipe == jobs[1].recipe
    assert jobs[0].folder == jobs[1].folder
    assert study.trials[1].intermediate_values[1] == 2.0, "what was reported before is not lost"


def test_a_trial_whose_worker_died_is_tried_again_but_not_for_ever(tmp_path: Path) -> None:
    import optuna

    study, work, lines = fake_work(tmp_path, trials=1)
    dead = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = owner_of(dead.pid).to_text()
    dead.communicate(b"\n")
    for number in range(MAX_TRIES):
        with pytest.warns(UserWarning, match="Heartbeat"):
            trial = study.ask()
        assert (trial.number, trial.user_attrs.get(FIRST, 0)) == (number, 0)
        assert trial.suggest_float("dropout", 0.0, 0.9) == 0.5
        trial.set_user_attr(OWNER, owner)
        fresh, work, lines = fake_work(tmp_path, trials=0)
        work.run()
        assert lines == [f"trial {number}: its worker died; it is queued again"]
        assert fresh.trials[number].state == optuna.trial.TrialState.FAIL
    assert len(study.trials) == MAX_TRIES, "the last of its tries was the last"
    assert rows(study)[0]["reason"] == "its worker ended without a result"


def test_a_trial_of_a_living_process_is_left_alone_and_counts(tmp_path: Path) -> None:
    study, work, _ = fake_work(tmp_path, trials=2)
    with pytest.warns(UserWarning, match="Heartbeat"):  # it beats for trials that Optuna runs itself
        study.ask().set_user_attr(OWNER, owner_of().to_text())
    work.run()
    assert [row["state"] for row in rows(study)] == ["running", "complete"]


def test_workers_that_share_a_database_run_as_many_trials_as_were_asked_for(tmp_path: Path) -> None:
    _, first, _ = fake_work(tmp_path, trials=6)
    _, second, _ = fake_work(tmp_path, trials=6)
    threads = [threading.Thread(target=work.run) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = rows(open_study(f"sqlite:///{tmp_path}/sweeps.db", "p"))
    assert [row["state"] for row in found] == ["complete"] * 6
    assert len({str(row["params"]) for row in found}) == 6


def test_data_other_than_the_sweep_s_is_refused(tmp_path: Path) -> None:
    from tests.training.tracked import start

    def elsewhere(job: TrialJob) -> TrialEnd:
        job.on_start(start(tmp_path))
        return pretend(job)

    study, work, _ = fake_work(tmp_path, elsewhere, trials=1)
    work.run()
    assert "must be what the sweep was begun with (digest 000000000000), got 23e8e5daf148" in work.failures[0]
    unknown = fake_plan(place="modal").model_copy(update={"digest": None})
    study, work, _ = fake_work(tmp_path, elsewhere, trials=2, name="unknown", plan=unknown)
    work.run()
    assert study.user_attrs["plan"]["digest"].startswith("23e8e5daf148"), "the first trial says which data it is"
