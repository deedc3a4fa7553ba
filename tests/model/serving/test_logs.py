"""The log of a real service process: JSON lines with the client's own request id, and nothing private."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import httpx
import pytest

from model.serving.logs import configure_logs, request_id

REPOSITORY = Path(__file__).resolve().parents[3]
SECRET = "a-prompt-that-is-nobody's-business"


@pytest.fixture(scope="module")
def lines() -> list[dict[str, object]]:
    """What `python -m model.serving.http` logs while it is asked for two stories, one of them wrongly."""
    env = {**os.environ, "STORY_LOG": "json", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-m", "model.serving.http", "--port", "0"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with httpx.Client(base_url=url, timeout=30) as client:
            named = {"x-request-id": "client-7"}
            body = {"prompt": SECRET, "max_tokens": 5, "seed": 1}
            assert client.post("/v1/completions", json=body, headers=named).headers["x-request-id"] == "client-7"
            assert client.post("/v1/completions", json={"prompt": 5}).status_code == 422
            assert client.get("/api/health").status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert SECRET not in errors
    return [json.loads(line) for line in errors.splitlines()]


def test_a_story_has_a_line_of_figures_under_the_clients_request_id(lines: list[dict[str, object]]) -> None:
    records = [line for line in lines if line["logger"] == "story.stream"]
    assert len(records) == 1
    assert (records[0]["request_id"], records[0]["outcome"], records[0]["tokens"]) == ("client-7", "length", 5)
    assert records[0]["level"] == "INFO"
    assert isinstance(records[0]["seconds"], float)


def test_requests_have_a_line_each_but_for_good_health_checks(lines: list[dict[str, object]]) -> None:
    answered = [(line["route"], line["status"]) for line in lines if line["logger"] == "story.request"]
    # In either order: a line is written behind its answer, and the next request may overtake it.
    assert sorted(answered) == [("/v1/completions", 200), ("/v1/completions", 422)]


def test_a_failure_keeps_its_traceback_in_one_line_and_libraries_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    to = StringIO()
    configure_logs("json", to)
    token = request_id.set("r-1")
    try:
        logging.getLogger("some.library").info("chatter")
        try:
            raise ValueError("inner")
        except ValueError:
            logging.getLogger("model.engine.engine").exception("a story failed")
    finally:
        request_id.reset(token)
        logging.getLogger("story").setLevel(logging.NOTSET)
    (line,) = [json.loads(text) for text in to.getvalue().splitlines()]
    assert (line["message"], line["request_id"], line["level"]) == ("a story failed", "r-1", "ERROR")
    assert "ValueError: inner" in line["exc_info"]


def test_as_text_pythons_own_way_stays() -> None:
    before = logging.getLogger().handlers[:]
    assert configure_logs("text") is None
    assert logging.getLogger().handlers == before
