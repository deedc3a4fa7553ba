"""The rules for trials: who is tried, counted, ended early, tried again, kept. Trainings are pretended (`pretend`)."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from experiments.sweep.plan import Prune
from experiments.sweep.study import MAX_RETRIES, OWNER, first_attempt, open_study, requeue_stale_trials, rows
from experiments.sweep.trial import MAX_FAILURES, KilledError, TrialObserver
from tests.experiments.sweep.sweeps import ended, evaluation, fake_plan, fake_work, pretend
from tests.training.runs import smallest
from training.tracking.store import owner_of


def test_the_recipe_as_it_stands_comes_first_and_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    study, _, lines = fake_work(tmp_path, trials=5)
    found = rows(study)
    assert [row["state"] for row in found] == ["complete"] * 5
    assert found[0]["base"]
    assert found[0]["params"] == {"dropout": smallest(dropout=0.5).dropout}
    best = min(found, key=lambda row: row["value"])
    assert best["value"] < found[0]["value"]
    assert [folder.name for folder in (tmp_path / "out").glob("trial-*")] == [f"trial-{best['number']:04d}"]
    assert lines[0] == "trial 0: 1.4000 bits/byte"


def test_a_sweep_that_is_continued_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    whole, _, _ = fake_work(tmp_path, trials=10, name="whole")
    for trials in (3, 9, 9, 10):
        parts, _, _ = fake_work(tmp_path, trials=trials, name="parts")
    drawn = [[trial.params for trial in study.trials] for study in (whole, parts)]
    assert drawn[0] == drawn[1]
    assert len({str(params) for params in drawn[0]}) == 10


@pytest.mark.parametrize("by", ["median", "hyperband"])
def test_a_trial_that_falls_behind_is_ended_early_but_not_before_its_share(by: str, tmp_path: Path) -> None:
    prune = Prune.model_validate({"by": by, "after_trials": 2, "after_eighths": 3})
    study, _, lines = fake_work(tmp_path, trials=8, plan=fake_plan(prune))
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
    def diverging(trial: TrialObserver) -> None:
        if trial.trial.number == 1:
            trial.ended(ended("failed", "step 3: loss nan", None, 3))
        else:
            pretend(trial)

    study, work, _ = fake_work(tmp_path, diverging, trials=3)
    assert [row["state"] for row in rows(study)] == ["complete", "pruned", "complete"]
    assert rows(study)[1]["reason"] == "step 3: loss nan"
    assert work.failures == []


def test_values_that_make_no_recipe_are_skipped_by_name(tmp_path: Path) -> None:
    plan = fake_plan()
    plan.space.search["micro_rows"] = {"choices": [3, 2]}
    study, _, _ = fake_work(tmp_path, trials=4, plan=plan)
    odd = [row for row in rows(study) if row["params"]["micro_rows"] == 3]
    assert odd
    assert all(row["state"] == "pruned" and "micro_rows must divide rows=4" in row["reason"] for row in odd)


def test_the_next_trial_follows_a_failure_until_several_fail_in_a_row(tmp_path: Path) -> None:
    def failing(trial: TrialObserver) -> None:
        if trial.trial.number != 1:
            raise OSError("no space left on device")
        pretend(trial)

    study, work, lines = fake_work(tmp_path, failing, trials=20)
    assert [row["state"] for row in rows(study)] == ["failed", "complete", *["failed"] * MAX_FAILURES]
    assert work.failures[0] == "trial 0: no space left on device"
    assert lines[0] == "trial 0: failed: no space left on device"


def test_a_trial_that_was_stopped_goes_on_with_its_values_in_the_same_folder(tmp_path: Path) -> None:
    trials: list[TrialObserver] = []

    def stopping(trial: TrialObserver) -> None:
        trials.append(trial)
        trial.evaluated(evaluation(1, 2.0))
        trial.ended(ended("stopped", "interrupted by hand", 2.0, 4))

    for _ in range(MAX_RETRIES + 1):
        study, work, lines = fake_work(tmp_path, stopping, trials=5)
        assert work.interrupted
    assert lines == [f"trial {MAX_RETRIES}: stopped; it is queued again"], "as often as it is stopped"

    def resuming(trial: TrialObserver) -> None:
        trials.append(trial)
        pretend(trial)

    study, _, _ = fake_work(tmp_path, resuming, trials=1)
    assert [row["state"] for row in rows(study)] == [*["failed"] * (MAX_RETRIES + 1), "complete"]
    assert rows(study)[-1]["retry_of"] == 0
    assert len({str(trial.recipe) for trial in trials}) == 1
    assert len({trial.folder for trial in trials}) == 1
    assert study.trials[-1].intermediate_values[1] == 2.0, "what was reported before is not lost"


def test_a_trial_whose_process_is_killed_is_tried_again_but_not_for_ever(tmp_path: Path) -> None:
    def killed(trial: TrialObserver) -> None:
        if trial.recipe.dropout == 0.5:
            raise KilledError("its process was killed by signal 9")
        pretend(trial)

    study, work, lines = fake_work(tmp_path, killed, trials=1)
    assert [row["state"] for row in rows(study)] == [*["failed"] * (MAX_RETRIES + 1), "complete"]
    assert lines[0] == "trial 0: its process was killed by signal 9; it is queued again"
    assert work.failures == [f"trial {MAX_RETRIES}: its process was killed by signal 9"]


def test_a_trial_whose_sweep_died_is_tried_again_but_not_for_ever(tmp_path: Path) -> None:
    import optuna

    study, _, _ = fake_work(tmp_path, trials=0)
    dead = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = owner_of(dead.pid).to_text()
    dead.communicate(b"\n")
    for number in range(MAX_RETRIES + 1):
        with pytest.warns(UserWarning, match="Heartbeat"):
            trial = study.ask()
        assert (trial.number, first_attempt(study.trials[number])) == (number, 0)
        assert trial.suggest_float("dropout", 0.0, 0.9) == 0.5
        trial.set_user_attr(OWNER, owner)
        assert requeue_stale_trials(study) == [number]
        assert study.trials[number].state == optuna.trial.TrialState.FAIL
    assert len(study.trials) == MAX_RETRIES + 1, "the last of its tries was the last"
    assert rows(study)[0]["reason"] == "its process ended without a result"


def test_a_trial_of_a_living_process_is_left_alone_and_counts(tmp_path: Path) -> None:
    study, _, _ = fake_work(tmp_path, trials=0)
    with pytest.warns(UserWarning, match="Heartbeat"):  # it beats for trials that Optuna runs itself
        study.ask().set_user_attr(OWNER, owner_of().to_text())
    assert requeue_stale_trials(study) == []
    study, _, _ = fake_work(tmp_path, trials=2)
    assert [row["state"] for row in rows(study)] == ["running", "complete"]


def test_parallel_trials_are_as_many_as_were_asked_for(tmp_path: Path) -> None:
    _, objective, _ = fake_work(tmp_path, trials=0)
    objective.minimise(6, at_once=3)
    found = rows(objective.study)
    assert [row["state"] for row in found] == ["complete"] * 6
    assert len({str(row["params"]) for row in found}) == 6
    best = min(found, key=lambda row: row["value"])
    assert [folder.name for folder in (tmp_path / "out").glob("trial-*")] == [f"trial-{best['number']:04d}"]


def test_two_sweeps_that_share_a_database_share_the_trials(tmp_path: Path) -> None:
    fake_work(tmp_path, trials=0)
    threads = [threading.Thread(target=fake_work, args=(tmp_path,), kwargs={"trials": 6}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = rows(open_study(f"sqlite:///{tmp_path}/sweeps.db", "p"))
    assert {row["state"] for row in found} == {"complete"}
    assert len(found) in (6, 7), "both may begin a last one at the same moment"
    assert len({str(row["params"]) for row in found}) == len(found)


def test_data_other_than_the_sweep_s_is_refused(tmp_path: Path) -> None:
    from tests.training.tracked import start

    def elsewhere(trial: TrialObserver) -> None:
        trial.started(start(tmp_path))
        pretend(trial)

    _, work, _ = fake_work(tmp_path, elsewhere, trials=1)
    assert "must be what the sweep was begun with (digest 000000000000), got 23e8e5daf148" in work.failures[0]
    unknown = fake_plan(place="modal").model_copy(update={"digest": None})
    study, _, _ = fake_work(tmp_path, elsewhere, trials=2, name="unknown", plan=unknown)
    assert study.user_attrs["plan"]["digest"].startswith("23e8e5daf148"), "the first trial says which data it is"
