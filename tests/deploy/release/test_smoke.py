"""The check of a deployment, against real services that generate, and real servers that do not."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.release import release
from deploy.release.release import check, judge
from experiments.benchmark.measures import Sample
from model.errors import AccountError, DeployError
from model.serving.http.server import free_port
from model.serving.remote.readiness import wait_until_ready
from model.settings import Settings, load_settings
from tests.demo.engines import local_backend
from tests.json_server import Text, json_server
from tests.model.serving.http.serving import serving


@pytest.fixture
def settings() -> Settings:
    return load_settings()


def test_a_service_that_generates_passes(settings: Settings) -> None:
    with serving(local_backend(slots=4, queue=4, step_seconds=0.002, end_bias=-50)) as service:
        assert wait_until_ready(service.url, settings, version="0123456789abcdef" * 4, timeout=10) < 10
        report = check(service.url, settings, requests=6)
    assert (report.verdict, report.requests, report.success_rate) == ("passed", 6, 1.0)
    assert report.concurrent_handling == 3
    assert 0 < report.ttft_max <= report.max_generation_time
    assert 0 < report.avg_generation_time <= report.max_generation_time
    # 6 stories of 64 tokens, three at a time, at 500 steps a second at most.
    assert 0 < report.total_tokens_per_second < 3 * 500 * 1.01


def test_a_service_that_is_full_leaves_it_undecided(settings: Settings) -> None:
    with serving(local_backend(slots=1, queue=0, step_seconds=0.005, end_bias=-50)) as service:
        report = check(service.url, settings, requests=3)
    assert report.verdict == "undecided"
    assert "were refused: it is busy" in report.reason
    assert report.success_rate < 1


def test_nothing_there_is_a_failure(settings: Settings) -> None:
    with pytest.raises(DeployError, match=r"^http://127\.0\.0\.1:1 does not answer: "):
        check("http://127.0.0.1:1", settings, requests=2)


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (500, Text("oh"), "HTTP 500 (oh)"),
        (200, Text("<html>", "text/html"), "text/event-stream"),
        (200, Text('data: {"error": {"message": "broken"}}\n\n', "text/event-stream"), "broken"),
    ],
)
def test_an_answer_without_a_story_is_a_failure(status: int, body: Text, reason: str, settings: Settings) -> None:
    with json_server(lambda asked: (status, body)) as (url, _):
        report = check(url, settings, requests=2)
    assert (report.verdict, report.success_rate, report.total_tokens_per_second) == ("failed", 0.0, 0.0)
    assert report.reason.startswith("2 of 2 stories failed: ")
    assert reason in report.reason


def test_the_proxy_token_goes_with_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODAL_KEY", "wk-1")
    monkeypatch.setenv("MODAL_SECRET", "ws-1")
    with json_server(lambda asked: (200, {"status": "healthy"})) as (url, seen):
        wait_until_ready(url, load_settings(), version=None, timeout=5)
        check(url, load_settings(), requests=1)
    tokens = [(asked.headers["modal-key"], asked.headers["modal-secret"]) for asked in seen]
    assert [asked.path for asked in seen] == ["/api/health", "/v1/models", "/v1/completions"]
    assert set(tokens) == {("wk-1", "ws-1")}


@pytest.mark.parametrize("status", [401, 403])
def test_a_missing_token_is_reported_at_once(status: int, settings: Settings) -> None:
    with (
        json_server(lambda asked: (status, Text("modal-http: invalid credentials"))) as (url, _),
        pytest.raises(AccountError, match="set MODAL_KEY and MODAL_SECRET"),
    ):
        wait_until_ready(url, settings, version=None, timeout=60)


def test_a_deployment_that_starts_late_is_waited_for(settings: Settings) -> None:
    port, done = free_port(), threading.Event()

    def start_late() -> None:
        time.sleep(0.6)
        with json_server(lambda asked: (200, {"status": "healthy", "model": {"version": "v2"}}), port):
            done.wait(20)

    began = time.monotonic()
    starting = threading.Thread(target=start_late)
    starting.start()
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", settings, version="v2", timeout=15)
    finally:
        done.set()
        starting.join()
    assert time.monotonic() - began >= 0.6


def test_a_deployment_that_serves_another_version_is_not_ready(settings: Settings) -> None:
    with (
        json_server(lambda asked: (200, {"status": "healthy", "model": {"version": "a" * 64}})) as (url, _),
        pytest.raises(DeployError, match="it serves aaaaaaaaaaaa, not bbbbbbbbbbbb"),
    ):
        wait_until_ready(url, settings, version="b" * 64, timeout=0.2)


def test_waiting_ends_at_the_timeout(settings: Settings) -> None:
    with pytest.raises(DeployError, match=r"^http://127.0.0.1:1 was not ready after \d+ s: "):
        wait_until_ready("http://127.0.0.1:1", settings, version=None, timeout=0.2)


_samples = st.builds(
    Sample,
    phase=st.just("concurrent"),
    level=st.just(3),
    number=st.integers(0, 11),
    seed=st.just(0),
    scheduled=st.just(0.0),
    started=st.just(0.0),
    ended=st.floats(0.01, 30),
    tokens=st.integers(1, 64),
    error=st.sampled_from([None, "http_5xx", "busy"]),
)


@given(st.lists(_samples, max_size=12))
def test_the_verdict_follows_from_the_requests(samples: list[Sample]) -> None:
    report = judge(samples, 3)
    good = [sample for sample in samples if sample.ok]
    late = any(sample.generation_time > release.LONGEST_GENERATION for sample in good)
    errors = {sample.error for sample in samples}
    expected = "failed" if late or "http_5xx" in errors else "undecided" if "busy" in errors else "passed"
    assert report.verdict == expected
    assert report.success_rate == (len(good) / len(samples) if samples else 0)
