"""What is said of a sweep: importance, the best recipe, pictures."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from experiments.sweep.figures import draw_history, draw_importance
from experiments.sweep.shown import best_of, importance, print_sweep, rows
from experiments.sweep.space import Dimension
from model.settings import load_settings
from tests.experiments.sweep.sweeps import pretended_plan, pretended_work
from training.trainer.recipe import load_recipe


def test_the_field_that_makes_the_difference_is_told_with_the_best_recipe(tmp_path: Path) -> None:
    plan = pretended_plan()
    plan.space.dimensions["optimizer.matrix_lr"] = Dimension(low=0.001, high=0.1, log=True)
    study, work, _ = pretended_work(tmp_path, trials=7, plan=plan)
    work.run()
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
    told = console.export_text()
    change = best["value"] / 1.4 - 1
    assert (
        f"best: trial {best['number']}, {best['value']:.4f} bits/byte, {change:+.2%} against the recipe"
        in told
    )
    assert best["command"] in told
    assert f"share in the differences: dropout {shares['dropout']:.0%}" in told
    draw_history(rows(study), tmp_path / "history.png")
    draw_importance(shares, tmp_path / "importance.png")
    for name in ("history.png", "importance.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_database_is_the_one_given_or_a_shared_one_or_lies_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.sweep.storage import storage_url

    assert storage_url(None, load_settings()) == "sqlite:///sweeps.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/below/mlflow.db")
    assert storage_url(None, load_settings()) == "sqlite:///below/sweeps.db"
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:p@host/db")
    assert storage_url(None, load_settings()) == "postgresql://u:p@host/db"
    assert storage_url("sqlite:///mine.db", load_settings()) == "sqlite:///mine.db"
