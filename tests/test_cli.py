"""The command line: verbs, options, exit codes, and what reaches the packages behind them."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

import story
from model.generation import GenerationRequest, SamplingParams
from training.trainer.observers import RunEnd
from training.trainer.recipe import Recipe, load_recipe


def run(*arguments: str) -> Result:
    return CliRunner().invoke(story.app, list(arguments))


def test_a_mistyped_setting_stops_every_verb_that_reads_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_THRAEDS", "2")
    for arguments in (["write", "x"], ["demo"], ["data"], ["train"], ["export", "x"], ["ui"]):
        result = run(*arguments)
        assert (result.exit_code, result.stderr) == (
            2,
            "story: STORY_THRAEDS is not a setting; the nearest is STORY_THREADS\n",
        ), arguments


def test_bad_use_is_exit_code_2_and_names_what_was_meant() -> None:
    assert run("wrte", "x").exit_code == 2
    assert "Did you mean 'write'?" in run("wrte", "x").stderr
    assert run("write").exit_code == 2
    assert run("write", "x", "--temprature", "1").exit_code == 2
    assert run("demo", "--backend", "cloud").exit_code == 2


def test_the_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert run("--version").stdout == f"story {version('write-me-a-story')}\n"


def test_every_option_has_help() -> None:
    commands = get_command(story.app).commands  # type: ignore[attr-defined]
    made = "demo write data train evaluate benchmark sweep export register models compare record gate promote rollback"
    assert list(commands) == [*made.split(), "ab", "arena", "ui", "doctor", "deploy"]
    below = commands["deploy"].commands
    assert list(below) == ["upload", "deploy", "url", "status", "switch", "rollback", "smoke", "stop"]
    silent = [
        f"{name} {parameter.name}"
        for name, command in (*commands.items(), *below.items())
        for parameter in command.params
        if not getattr(parameter, "help", "")
    ]
    assert silent == []


def test_help_holds_every_word_whole_at_80_columns() -> None:
    groups = {(): get_command(story.app).commands, ("deploy",): get_command(story.app).commands["deploy"].commands}  # type: ignore[attr-defined]
    env = {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}
    for group, commands in groups.items():
        for name in commands:
            shown = CliRunner().invoke(story.app, [*group, name, "--help"], env=env).stdout
            assert "Usage" in shown
            assert "…" not in shown, shown


def test_defaults_of_options_are_those_of_the_packages() -> None:
    """The options repeat some defaults, so that `--help` need import nothing; here the two are compared."""
    from training.data.prepare import PrepareOptions

    options = {name: parameter.default for name, parameter in inspect.signature(story.data).parameters.items()}
    own = {name: field.default for name, field in PrepareOptions.model_fields.items()}
    shared = options.keys() & own.keys()
    assert {"out", "vocab_size", "val_fraction", "skip_bad", "force", "download", "tokenizer"} <= shared
    assert {name: options[name] for name in shared} == {name: own[name] for name in shared}
    written = inspect.signature(story.write).parameters
    for name in ("temperature", "top_p", "top_k", "min_p"):
        assert written[name].default == getattr(SamplingParams(), name)
    assert written["max_tokens"].default == GenerationRequest(prompt="").max_tokens


def test_demo_passes_its_options_on_and_settings_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "demo.asgi.launch",
        lambda settings, **options: calls.append({"host": settings.host, "port": settings.port, **options}),
    )
    monkeypatch.setenv("PORT", "7001")
    assert run("demo").exit_code == 0
    assert run("demo", "--host", "0.0.0.0", "--port", "0", "--share", "--backend", "local").exit_code == 0
    assert calls == [
        {"host": "127.0.0.1", "port": 7001, "share": False, "backend": "auto"},
        {"host": "0.0.0.0", "port": 0, "share": True, "backend": "local"},
    ]


def test_training_with_several_processes_starts_this_command_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, list[str]]] = []
    trained: list[dict[str, Any]] = []

    def relaunch(processes: int, arguments: list[str]) -> int:
        started.append((processes, arguments))
        return 7

    def train(recipe: Recipe, **options: Any) -> RunEnd:
        trained.append({"steps": recipe.steps, **options})
        return RunEnd(outcome="finished", reason="", step=3, tokens=96, best_bits_per_byte=1.5, checkpoint=None)

    monkeypatch.setattr("training.run.relaunch", relaunch)
    monkeypatch.setattr("training.run.train", train)
    arguments = ["train", "--processes", "2", "steps=3", "--minutes", "2", "--init", "some/model"]
    arguments += ["--no-track", "--json", "--data", "data/tinystories"]
    monkeypatch.setattr(sys, "argv", ["story", *arguments])
    assert run(*arguments).exit_code == 7, "the launcher's exit code is ours"
    assert (started, trained) == ([(2, arguments)], [])

    monkeypatch.setenv("RANK", "0")
    first = run(*arguments)
    monkeypatch.setenv("RANK", "1")
    second = run(*arguments)
    assert len(started) == 1, "a started process trains itself"
    options = {"data": Path("data/tinystories"), "out": Path("runs/story"), "resume": False, "track": False}
    assert trained == [{"steps": 3, "minutes": 2.0, "init": Path("some/model"), **options}] * 2
    assert json.loads(first.stdout)["best_bits_per_byte"] == 1.5
    assert second.stdout == "", "one process speaks for all"


def test_a_resume_takes_the_recipe_of_its_run_unless_another_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained: list[Recipe] = []

    def train(recipe: Recipe, **_options: Any) -> RunEnd:
        trained.append(recipe)
        return RunEnd(outcome="finished", reason="", step=3, tokens=96, best_bits_per_byte=1.5, checkpoint=None)

    monkeypatch.setattr("training.run.train", train)
    mine = load_recipe("tiny", overrides=["seed=11"])
    (tmp_path / "mine" / "last").mkdir(parents=True)
    notes = {"format": 1, "model": {}, "recipe": mine.as_dict()}
    (tmp_path / "mine" / "last" / "config.json").write_text(json.dumps(notes))
    assert run("train", "--out", "mine", "--resume").exit_code == 0
    assert run("train", "--out", "mine", "--resume", "--preset", "small").exit_code == 0
    assert trained == [mine, load_recipe("small")]


def test_data_makes_shards_and_reports_as_json(tmp_path: Path, repository: Path) -> None:
    result = run(
        "data", "--source", str(repository / "training/stories"), "--vocab-size", "512", "--out", "d", "--json"
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["vocab_size"] == 512
    assert min(report["splits"][split]["stories"] for split in ("train", "val")) > 0
    assert (tmp_path / "d" / "train.bin").stat().st_size > 0


def test_data_that_is_broken_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "Once there was a hen."}\n{"text": \n', "utf-8")
    result = run("data", "--source", "bad.jsonl", "--out", "d")
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("story: ")
    assert "bad.jsonl" in last
    assert "2" in last
