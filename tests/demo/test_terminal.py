"""How the command line talks: stories as they come, errors in one line, JSON.

The model is scripted in most of these tests, because they need what a network cannot promise: a known text, a
fault in the middle, an interrupt at a known chunk. The last ones run the real command on the shipped model.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import story
from demo.terminal import in_one_line, print_rows
from model.errors import BusyError, DataError, ModelError
from model.generation import Chunk, Completion, GenerationRequest, SamplingParams, Usage
from model.serving.backend import LocalBackend
from model.settings import Settings

USAGE = Usage(prompt_tokens=3, completion_tokens=5, queued=0.0, ttft=0.012, duration=0.016)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(story.app, list(arguments))


class ScriptedBackend:
    """Streams `chunks` (an exception among them is raised); remembers the request and the settings."""

    def __init__(self, *chunks: str | BaseException, error: str | None = None) -> None:
        self.chunks = chunks
        self.error = error
        self.asked: list[GenerationRequest] = []
        self.settings = Settings()
        self.closed = False

    @property
    def engine(self) -> ScriptedBackend:
        return self

    def __enter__(self) -> ScriptedBackend:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def submit(self, request: GenerationRequest) -> ScriptedBackend:
        self.asked.append(request)
        return self

    def __iter__(self) -> Iterator[Chunk]:
        for number, chunk in enumerate(self.chunks):
            if isinstance(chunk, BaseException):
                raise chunk
            yield Chunk(text=chunk, tokens=(number + 1,))

    def wait(self) -> Completion:
        return self.completion

    @property
    def completion(self) -> Completion:
        text = "".join(chunk for chunk in self.chunks if isinstance(chunk, str))
        return Completion(text=text, finish_reason="error" if self.error else "stop", usage=USAGE, error=self.error)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> ScriptedBackend:
    backend = ScriptedBackend(" a fox", ". It", " slept.")

    def load(settings: Settings) -> ScriptedBackend:
        backend.settings = settings
        return backend

    monkeypatch.setattr(LocalBackend, "load", load)
    return backend


def test_a_story_goes_to_stdout_and_its_figures_to_stderr(scripted: ScriptedBackend) -> None:
    result = run("write", "There was", "--seed", "7")
    assert result.exit_code == 0
    assert result.stdout == "There was a fox. It slept.\n"
    assert result.stderr == "5 tokens · 1,000 tokens/s · first token in 12 ms · seed 7\n"
    assert scripted.closed


def test_every_piece_is_shown_at_once(scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(io.StringIO):
        def flush(self) -> None:
            seen.append(self.getvalue())

    seen: list[str] = []
    monkeypatch.setattr(sys, "stdout", Watched())
    with pytest.raises(SystemExit) as end:
        story.app(["write", "There was"])
    assert end.value.code == 0
    for text in ("There was a fox", "There was a fox. It", "There was a fox. It slept."):
        assert text in seen, "each chunk is flushed before the next one is written"


def test_the_prompt_is_dim_on_a_terminal_only(scripted: ScriptedBackend) -> None:
    plain = CliRunner().invoke(story.app, ["write", "There was"])
    colored = CliRunner().invoke(story.app, ["write", "There was"], color=True)
    assert "\x1b" not in plain.stdout
    assert colored.stdout.startswith("\x1b[2mThere was\x1b[0m a fox")


def test_all_controls_reach_the_engine(scripted: ScriptedBackend) -> None:
    result = run(
        *("write", "x", "--max-tokens", "9", "--temperature", "0.1", "--top-p", "0.2", "--top-k", "3"),
        *("--min-p", "0.4", "--seed", "5", "--model", "my/model"),
    )
    assert result.exit_code == 0, result.stderr
    sampling = SamplingParams(temperature=0.1, top_p=0.2, top_k=3, min_p=0.4, seed=5)
    assert scripted.asked == [GenerationRequest(prompt="x", max_tokens=9, sampling=sampling)]
    assert (scripted.settings.story_model, scripted.settings.story_slots) == ("my/model", 1)


def test_settings_reach_the_engine_and_the_option_wins(
    scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORY_MODEL", "from/environment")
    monkeypatch.setenv("STORY_PRECISION", "fp32")
    monkeypatch.setenv("STORY_THREADS", "2")
    assert run("write", "x").exit_code == 0
    made = scripted.settings
    assert (made.story_model, made.story_precision, made.story_threads) == ("from/environment", "fp32", 2)
    assert run("write", "x", "--model", "other").exit_code == 0
    assert scripted.settings.story_model == "other"


def test_a_seed_is_made_up_and_reported_if_none_is_given(scripted: ScriptedBackend) -> None:
    expected = [re.search(r"seed (\d+)$", run("write", "x").stderr.strip()) for _ in range(2)]
    seeds = [request.sampling.seed for request in scripted.asked]
    assert [int(match[1]) for match in expected if match] == seeds
    assert seeds[0] != seeds[1]


def test_json_holds_the_whole_completion(scripted: ScriptedBackend) -> None:
    result = run("write", "There was", "--seed", "7", "--json")
    assert json.loads(result.stdout) == {
        "prompt": "There was",
        "text": " a fox. It slept.",
        "finish_reason": "stop",
        "seed": 7,
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "queued": 0.0,
            "ttft": 0.012,
            "duration": 0.016,
            "tokens_per_second": pytest.approx(1000),
        },
    }
    assert result.stderr == ""


def test_a_fault_in_the_middle_is_reported_and_fails(scripted: ScriptedBackend) -> None:
    scripted.error = "the pen broke"
    result = run("write", "There was")
    assert result.exit_code == 1
    assert result.stderr == "story: the pen broke\n"


def test_an_interrupt_ends_the_line_quietly_and_closes_the_engine(scripted: ScriptedBackend) -> None:
    scripted.chunks = (" a fox", KeyboardInterrupt())
    result = run("write", "There was")
    assert result.exit_code == 130
    assert result.stdout == "There was a fox\n"
    assert result.stderr == ""
    assert scripted.closed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "7"], "temperature must be between 0 and 2, got 7.0"),
        (["--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["--max-tokens", "-1"], "max_tokens must be a whole number between 0 and 4096, got -1"),
        (["--seed", "-1"], "seed must be a whole number between 0 and"),
        (["--temperature", "nan"], "temperature must be between 0 and 2, got nan"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, scripted: ScriptedBackend
) -> None:
    result = run("write", "x", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"story: {message}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert scripted.asked == []


@pytest.mark.parametrize(
    ("error", "message", "exit_code"),
    [
        (DataError("a.jsonl:3: is not JSON"), "a.jsonl:3: is not JSON", 2),
        (ModelError("two\n  lines"), "two lines", 2),
        (BusyError("all 4 slots are taken", retry_after=1), "all 4 slots are taken", 1),
        (PermissionError(13, "Permission denied", "out/x"), "out/x: permission denied", 2),
        (ModuleNotFoundError("no", name="torch.nn"), "story train needs the 'train' packages: pip install", 2),
        (ModuleNotFoundError("no", name="modal"), "story train needs the 'modal' packages: pip install", 2),
        (ValueError("odd"), "ValueError: odd (a fault in story; `story --debug train …` shows where)", 1),
    ],
)
def test_each_kind_of_error_has_its_line_and_code(error: Exception, message: str, exit_code: int) -> None:
    line, code = in_one_line(error, "train")
    assert line.startswith(message)
    assert code == exit_code
    assert "\n" not in line


def test_an_unforeseen_fault_shows_its_traceback_only_with_debug(scripted: ScriptedBackend) -> None:
    scripted.chunks = (ValueError("odd"),)
    quiet = run("write", "x")
    assert quiet.exit_code == 1
    assert quiet.stderr == "story: ValueError: odd (a fault in story; `story --debug write …` shows where)\n"
    loud = run("--debug", "write", "x")
    assert isinstance(loud.exception, ValueError)


def test_rows_are_aligned_and_groups_joined(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows({"loss": 1.23456, "tokens": 7, "quality": {"loops": 0.5}, "graphs": ({"name": "int8"},)})
    expected = "loss           1.2346\ntokens         7\nquality.loops  0.5000\ngraphs.1.name  int8\n"
    assert capsys.readouterr().out == expected


def _real(tmp_path: Path, *arguments: str, encoding: str = "utf-8", **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "story", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": encoding}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, encoding=encoding, check=False, **options
    )


THRESHOLD = "thresholds:\n- {metric: ttft_p50, unit: s, at_most: 60, scope: benchmark, reason: ≤ 60 s}\n"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("write", "日本 → Once", "--max-tokens", "2"),
        ("write", "日本 → Once", "--max-tokens", "2", "--json"),
        ("doctor",),
        ("sweep", "--help"),
        (
            "benchmark",
            "--requests=2",
            "--phases=single",
            "--no-track",
            "--target=pretrained",
            "--thresholds=bounds.yaml",
        ),
    ],
    ids=" ".join,
)
def test_what_an_encoding_lacks_is_replaced(encoding: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "bounds.yaml").write_text(THRESHOLD, "utf-8")
    # Click writes UTF-8 where the encoding is ASCII, which it takes for a mistake.
    result = _real(tmp_path, *arguments, encoding=encoding, errors="replace")
    assert result.returncode == 0, result.stderr
    assert encoding == "ascii" or arguments[0] != "write" or "--json" in arguments or "??" in result.stdout


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_json_keeps_every_character_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    result = _real(tmp_path, "write", "日本 é Once", "--max-tokens", "2", "--json", encoding=encoding)
    assert json.loads(result.stdout)["prompt"] == "日本 é Once"


def test_the_shipped_model_writes_the_same_story_for_the_same_seed(tmp_path: Path) -> None:
    first, again, other = (
        _real(tmp_path, "write", "Once upon a time", "--max-tokens", "40", "--seed", seed) for seed in ("3", "3", "4")
    )
    assert (first.returncode, again.returncode, other.returncode) == (0, 0, 0), first.stderr
    assert first.stdout.startswith("Once upon a time")
    assert first.stdout == again.stdout != other.stdout
    assert re.fullmatch(r"\d+ tokens · [\d,]+ tokens/s · first token in \d+ ms · seed 3\n", first.stderr)


def test_a_model_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = _real(tmp_path, "write", "x", "--model", "nowhere")
    assert result.returncode == 2
    assert re.fullmatch(r"story: .*nowhere.*\n", result.stderr)


def test_a_closed_pipe_gets_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m story write 'Once upon a time' --max-tokens 400 --seed 1 | head -c 5"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout == "Once "
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr
