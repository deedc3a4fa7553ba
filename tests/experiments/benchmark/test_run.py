"""The whole way: from the command line over a real target to the report, the store and the exit code."""

from __future__ import annotations

import asyncio
import io
import json
import re
import threading
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import story
from experiments.benchmark.evidence import BenchmarkEvidence
from experiments.benchmark.load import Plan
from experiments.benchmark.measures import Phase, Sample
from experiments.benchmark.report import summarise
from experiments.benchmark.run import _progress, measure, phases_of, run_coroutine
from experiments.benchmark.targets import LocalTarget
from model.architecture.folder import ModelFolder
from model.serving.backend import LocalBackend
from model.settings import Settings
from tests import virtual_time
from tests.experiments.benchmark.broken_server import Answer, answering
from tests.experiments.benchmark.made import row
from tests.experiments.benchmark.paced import Paced
from tests.model.serving.http.serving import paced, serving
from tests.model.small_model import small_folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(story.app, ["benchmark", *arguments])


def test_it_also_runs_where_a_loop_runs_already_as_in_a_notebook() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return threading.get_ident()

    async def cell() -> int:
        return run_coroutine(work())

    here = threading.get_ident()
    assert run_coroutine(work()) == here
    assert asyncio.run(cell()) != here


QUICK = ("--requests", "3", "--concurrency", "2", "--max-tokens", "8", "--rate", "20")


def test_a_run_is_measured_judged_logged_and_read_back(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    page, bounds = tmp_path / "report.md", tmp_path / "bounds.yaml"
    bounds.write_text(
        "thresholds:\n- {metric: success_rate, unit: share, at_least: 0.80, scope: benchmark, reason: no speed}\n"
    )
    result = run(
        "--model",
        str(small_folder()),
        "--phases",
        "single,concurrent,stress,open",
        *QUICK,
        "--json",
        "--markdown",
        str(page),
        "--thresholds",
        str(bounds),
    )
    output = json.loads(result.stdout)
    assert result.exit_code == 0, result.stderr
    assert output["target"] == "local (model)"
    assert output["digest"] == ModelFolder.open(small_folder()).digest
    assert (output["requests"], output["success_rate"]) == (9, 1.0)
    assert 1 <= output["concurrent_handling"] <= 8
    assert output["memory_percent"] > 0
    assert "MLflow run: " + output["run_id"] in page.read_text("utf-8")
    evidence = BenchmarkEvidence.newest(tracking_uri, output["digest"])
    assert evidence is not None
    assert evidence.run_id == output["run_id"]
    assert {name: figure.value for name, figure in evidence.figures.items()} == {
        name: output[name] for name in output["n"]
    }
    phases = [sample.phase for sample in evidence.samples]
    assert {phase: phases.count(phase) for phase in dict.fromkeys(phases)} == {
        "warmup": 6,
        "single": 3,
        "concurrent": 3,
        "stress": 3 + 4 + 8 + 16,
        "open": 3,
    }
    assert all(row.tokens <= 8 for row in evidence.samples)


def test_a_failed_threshold_is_exit_code_1_and_named(tmp_path: Path) -> None:
    strict = tmp_path / "strict.yaml"
    strict.write_text("thresholds:\n- {metric: ttft_p50, unit: s, below: 0.000001, scope: benchmark, reason: never}\n")
    result = run(
        "--model", str(small_folder()), "--phases", "single", *QUICK, "--no-track", "--thresholds", str(strict)
    )
    assert result.exit_code == 1
    assert "Overall validation: FAILED (ttft_p50)" in result.stdout
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("how", ["--api-key", "OPENAI_API_KEY"])
def test_a_refused_key_is_counted_and_the_key_is_shown_nowhere(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    option = [how, "sk-hunter2"] if how == "--api-key" else []
    if not option:
        monkeypatch.setenv(how, "sk-hunter2")
    refusal = Answer(b'{"error":{"message":"sk-hunter2 is no key"}}', 401)
    with answering(refusal) as (address, seen):
        arguments = ("--target", address, "--phases", "single", *QUICK, "--no-track", *option)
        page, output = run(*arguments), run(*arguments, "--json")
    assert (page.exit_code, output.exit_code) == (1, 1)
    assert "rejected       9  HTTP 401 (… is no key)" in page.stdout
    assert json.loads(output.stdout)["reasons"] == {"rejected": {"HTTP 401 (… is no key)": 9}}
    assert "hunter2" not in page.output + output.output
    assert {asked["headers"]["Authorization"] for asked in seen} == {"Bearer sk-hunter2"}


def test_two_models_are_compared_over_two_kinds_of_target() -> None:
    backend = LocalBackend.load(Settings(story_model=str(small_folder())))
    with serving(backend) as running:
        result = run(
            "--target",
            running.url,
            "--against",
            str(small_folder()),
            "--phases",
            "compare",
            *QUICK,
            "--no-track",
            "--json",
        )
    output = json.loads(result.stdout)
    comparison = output["comparison"]
    assert comparison["against_digest"] == output["digest"] == ModelFolder.open(small_folder()).digest
    assert (comparison["pairs"], comparison["success_rate"]) == (3 + 2, 1.0)
    # The same model with HTTP between: its first token cannot come sooner.
    assert comparison["ratios"]["ttft_ratio"]["value"] > 1
    assert output["phases"] == []


def test_both_sides_are_warmed_up_and_compared() -> None:
    ours, theirs = Paced(0.02, name="ours"), Paced(0.01, name="theirs")
    plan = Plan(requests=5, concurrency=2, phases=("compare",))
    samples, _ = virtual_time.run(measure(ours, plan, against=theirs))
    warm = [row.target for row in samples if row.phase == "warmup"]
    assert warm == ["target"] * 6 + ["against"] * 6
    assert summarise(samples, theirs, seed=0).ratios["itl_ratio"].value == pytest.approx(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "nowhere"), "target must be local, an http(s) address, a model folder, pretrained, "),
        (("--target", "models:/other/1"), "model must be a folder, pretrained, models:/story-writer@ALIAS or "),
        (("--phases", "single,warm"), "phases must be among cold, single, "),
        (("--phases", "compare"), "phases compare and --against belong together: add --against TARGET"),
        (
            ("--phases", "single", "--against", "local"),
            "phases compare and --against belong together: add compare among --phases",
        ),
        (("--model", "a", "--target", "http://127.0.0.1"), "model goes with --target local only"),
        (("--concurrency", "0"), "concurrency must be greater than or equal to 1, got 0"),
        (("--thresholds", "none.yaml"), "none.yaml: no such file or directory"),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments, "--no-track")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"story: {message}"), result.stderr
    assert result.stderr.count("\n") == 1


def test_what_was_measured_is_printed_even_if_it_cannot_be_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "tale:/runs")
    result = run("--model", str(small_folder()), "--phases", "single", *QUICK, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["success_rate"] == 1.0
    assert result.stderr.startswith("story: MLFLOW_TRACKING_URI tale:/runs cannot be used")


def test_the_phases_are_run_in_their_order_and_compared_where_there_is_a_second_side() -> None:
    assert phases_of(None, against=False) == ("cold", "single", "concurrent", "stress", "open")
    assert phases_of(None, against=True)[-1] == "compare"
    assert phases_of("open, single,,open", against=False) == ("single", "open")


def test_the_bar_estimates_no_time_left_by_the_pace_of_another_phase() -> None:
    backend, _ = paced()
    estimates = {}
    cold: tuple[Phase, ...] = ("cold", "cold", "cold")
    for phases in (cold, (*cold, "single"), (*cold, "single", "single", "single")):
        file = io.StringIO()
        console = Console(file=file, width=120, force_terminal=True, color_system=None)
        with _progress(Plan(), LocalTarget(backend, None), console) as done:
            for phase in phases:
                done(row(phase))
        shown = file.getvalue()
        assert f"{len(phases)}/" in shown
        estimates[phases[-1], len(phases)] = re.findall(r"\d:\d\d:\d\d", shown)
    assert estimates["cold", 3] == estimates["single", 4] == []
    assert estimates["single", 6] != []


def test_the_bar_knows_how_many_requests_there_will_be() -> None:
    backend, _ = paced(slots=4, queue=60)
    target = LocalTarget(backend, None)
    plan = Plan(requests=6, concurrency=2, max_tokens=2, rate=500.0, phases=("single", "concurrent", "stress", "open"))
    seen: list[Sample] = []

    async def go() -> None:
        async with target.running():
            await measure(target, plan, done=seen.append)

    asyncio.run(go())
    assert plan.expected_requests(target.cold_starts) == len(seen) == 6 + 6 + (6 + 6 + 8 + 16) + 6
    assert Plan(duration=1.0).expected_requests(3) is None
