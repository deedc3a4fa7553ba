"""The database of a study, made by several processes at once.

And what is shown of a sweep: importance, the best recipe, pictures.
"""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from experiments.sweep.study import best_of, draw, importance, print_sweep, rows
from model.settings import load_settings
from tests.experiments.sweep.sweeps import fake_plan, fake_work
from training.trainer.recipe import load_recipe

OPENED = """
import sys, optuna.storages, sqlalchemy
from experiments.sweep.study import open_storage
optuna.storages.RDBStorage  # imported when named
print("ready", flush=True)
sys.stdin.readline()
open_storage("sqlite:///" + sys.argv[1])
"""


def test_processes_that_begin_at_once_all_open_the_new_database(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "-c", OPENED, str(tmp_path / "sweeps" / "sweeps.db")]
    start = partial(
        subprocess.Popen,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=repository,
        text=True,
    )
    processes = [start(command) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors


def test_the_most_important_field_and_the_best_recipe_are_shown(tmp_path: Path) -> None:
    plan = fake_plan()
    plan.space.search["optimizer.matrix_lr"] = {"low": 0.001, "high": 0.1, "log": True}
    study, _, _ = fake_work(tmp_path, trials=7, plan=plan)
    shares = importance(study)
    assert list(shares) == ["dropout", "optimizer.matrix_lr"], "the value follows from dropout alone"
    assert sum(shares.values()) == pytest.approx(1)
    best = best_of(study)
    assert best is not None
    assert best["value"] == min(row["value"] for row in rows(study))
    command = shlex.split(best["command"])
    assert load_recipe("tiny", overrides=command[4:]).dropout == best["params"]["dropout"]
    console = Console(width=120, record=True, file=io.StringIO())
    print_sweep(study, console)
    shown = console.export_text()
    change = best["value"] / 1.4 - 1
    assert (
        f"best: trial {best['number']}, {best['value']:.4f} bits/byte, {change:+.2%} against the base recipe" in shown
    )
    assert best["command"] in shown
    assert f"share in the differences: dropout {shares['dropout']:.0%}" in shown
    draw(study, tmp_path)
    for name in ("history.png", "importance.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_storage_is_the_given_one_or_postgresql_or_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.sweep.study import storage_url

    assert storage_url(None, load_settings()) == "sqlite:///sweeps.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/below/mlflow.db")
    assert storage_url(None, load_settings()) == "sqlite:///below/sweeps.db"
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:p@host/db")
    assert storage_url(None, load_settings()) == "postgresql://u:p@host/db"
    assert storage_url("sqlite:///mine.db", load_settings()) == "sqlite:///mine.db"
