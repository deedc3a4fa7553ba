"""Health and metrics routes, and draining."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from importlib.metadata import version

import pytest
from prometheus_client.parser import text_string_to_metric_families

from model.errors import InputError
from model.generation import GenerationRequest
from model.serving.http import health as health_route
from model.settings import ServiceOptions
from tests.model.serving.http.serving import Running, paced, serving, streaming, until


def test_a_service_that_can_write_says_so_and_who_it_is(shipped: Running) -> None:
    response = shipped.get("/api/health")
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    for path in ("/health", "/ping"):
        assert shipped.get(path).json().keys() == response.json().keys()
    body = response.json()
    assert body["status"] == "healthy"
    age = datetime.now(UTC) - datetime.fromisoformat(body["timestamp"])
    assert timedelta(0) <= age < timedelta(seconds=10)
    assert body["version"] == version("write-me-a-story")
    assert body["model"]["id"] == "story-writer"
    assert len(body["model"]["version"]) == 64
    assert (body["backend"], body["served_by"]) == ("local", "local")
    assert body["engine"] == {"slots": 16, "active": 0, "waiting": 0}
    assert body["capacity"] == 16 + 64


def test_a_full_queue_is_not_ready_and_a_place_makes_it_ready_again() -> None:
    backend, network = paced(slots=1, queue=1)
    with serving(backend) as running:
        network.gate.clear()
        held = [backend.engine.submit(GenerationRequest(prompt="Once", max_tokens=9)) for _ in range(2)]
        response = running.get("/api/health")
        assert (response.status_code, response.json()["status"]) == (503, "unhealthy")
        assert response.json()["detail"] == "the queue is full"
        assert int(response.headers["retry-after"]) >= 1
        network.gate.set()
        for stream in held:
            stream.cancel()
        until(lambda: running.get("/api/health").status_code == 200)


def test_a_model_that_failed_is_not_ready_and_says_nothing_of_its_inside() -> None:
    backend, network = paced()
    with serving(backend) as running:
        network.fail_next = RuntimeError("first line\nsecond line")
        response = running.post("/v1/completions", prompt="x", max_tokens=3)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_failed")
        assert int(response.headers["retry-after"]) >= 1
        health = running.get("/api/health")
        assert health.status_code == 503
        assert "Traceback" not in health.text
        assert running.post("/v1/completions", prompt="x", max_tokens=3).status_code == 200
        assert running.get("/api/health").status_code == 200


def test_a_draining_service_says_so_refuses_the_new_and_ends_the_old() -> None:
    backend, _ = paced(step_seconds=0.01)
    with serving(backend, drain=20) as running:
        with streaming(running, prompt="Once", max_tokens=60) as flow:
            next(flow)
            threading.Thread(target=lambda: running.server.handle_exit(15, None)).start()
            until(lambda: running.get("/api/health").status_code == 503)
            assert running.get("/api/health").json()["status"] == "draining"
            for path in ("/v1/completions", "/api/generate"):
                refused = running.post(path, prompt="x")
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
                assert int(refused.headers["retry-after"]) >= 1
            figures = running.figures()
            chunks = [data for _, data in flow]
        until(lambda: not running.server.started or running.server.should_exit)
    assert figures['story_streams_total{outcome="draining"}'] == 2
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_what_does_not_end_in_time_is_aborted_with_an_error_and_no_done() -> None:
    backend, _ = paced(step_seconds=0.01)
    with serving(backend, drain=0.2) as running, streaming(running, prompt="Once", max_tokens=4000) as flow:
        next(flow)
        running.server.handle_exit(15, None)
        received = list(flow)
    name, error = received[-1]
    assert (name, error["error"]["code"]) == ("error", "draining")
    assert "[DONE]" not in [data for _, data in received]


def answered(figures: dict[str, float]) -> float:
    """Requests that were counted, those for the metrics left out."""
    requests = {name: value for name, value in figures.items() if name.startswith("story_http_requests_total")}
    return sum(value for name, value in requests.items() if "/metrics" not in name)


def test_the_figures_are_prometheus_and_count_what_happened() -> None:
    backend, _ = paced(slots=3, queue=5, step_seconds=0.005)
    with serving(backend) as running:
        answer = running.post("/v1/completions", prompt="Once", max_tokens=7, n=2).json()
        with streaming(running, "/api/generate", prompt="Once", max_tokens=5) as flow:
            list(flow)
        running.post("/v1/completions", prompt=5)
        running.get("/a/path/nobody/knows")
        running.get("/v1/models/x")
        # A request is counted behind its answer, so the next one may overtake it.
        until(lambda: running.figures()["story_streams_open"] == 0 and answered(running.figures()) == 5)
        text = running.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    value = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert value["story_streams_total", "", "length", "local", "0123456789ab"] == 3
    assert value["story_info", "", "local", "0123456789ab"] == 1
    assert value["story_queue_wait_seconds_count",] == 3
    assert 0 < value["story_memory_bytes",] < value["story_memory_limit_bytes",]
    assert value["story_tokens_total", "completion"] == 7 + 7 + 5
    assert value["story_tokens_total", "prompt"] == 3 * answer["usage"]["prompt_tokens"]
    assert value["story_ttft_seconds_count",] == 3
    assert 0 < value["story_itl_seconds_count",] <= 6 + 6 + 4  # fewer where the first tokens came together
    assert value["story_generation_time_seconds_count",] == 3
    assert (value["story_slots",], value["story_slots_active",], value["story_waiting",]) == (3, 0, 0)
    read = answer["usage"]["prompt_tokens"] + 1  # with the start of the story
    assert value["story_prefill_tokens_total", "computed"] == read
    assert value["story_prefill_tokens_total", "cached"] == 2 * read
    assert (value["story_ready",], value["story_capacity",]) == (1, 8)
    assert value["story_http_requests_total", "/v1/completions", "200"] == 1
    assert value["story_http_requests_total", "/v1/completions", "422"] == 1
    assert value["story_http_requests_total", "/v1/models/{id}", "404"] == 1
    assert value["story_http_requests_total", "other", "404"] == 1
    assert not any(family.name.startswith(("python_", "process_")) for family in families.values())
    assert all(family.documentation for family in families.values() if not family.name.endswith("_created"))


def test_where_only_the_files_are_the_version_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    assert health_route.version() == "source"


@pytest.mark.parametrize("name", ["blue\r\nx: y", "blau 1", "ü", "x" * 41])
def test_a_name_that_is_no_header_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^name must be at most 40 letters"):
        ServiceOptions(name=name)


TOKEN = {"authorization": "Bearer open-sesame"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:7860"}, 200),
        ({"host": "[::1]"}, 200),
        ({"host": "abc.gradio.live"}, 404),
        ({"x-forwarded-for": "203.0.113.9"}, 404),
        ({"x-forwarded-host": "stories.example"}, 404),
        ({"forwarded": "for=203.0.113.9"}, 404),
        (TOKEN, 200),
    ],
)
def test_without_a_token_it_is_for_this_machine_alone(headers: dict[str, str], status: int) -> None:
    with serving(paced()[0]) as running:
        assert running.client.get("/metrics", headers=headers).status_code == status


@pytest.mark.parametrize("public", [False, True])
def test_with_a_token_it_is_for_whoever_has_it(public: bool) -> None:
    with serving(paced()[0], metrics_token="open-sesame", public=public) as running:
        assert running.get("/metrics").status_code == 404
        assert running.client.get("/metrics", headers={"authorization": "Bearer shut"}).status_code == 404
        through = {**TOKEN, "x-forwarded-for": "203.0.113.9", "host": "stories.example"}
        assert running.client.get("/metrics", headers=through).status_code == 200


def test_on_a_share_link_it_is_for_nobody_without_one() -> None:
    with serving(paced()[0], public=True) as running:
        answer = running.get("/metrics")
        assert answer.status_code == 404
        assert answer.text == running.get("/nothing").text.replace("/nothing", "/metrics")  # as if there were none


@pytest.mark.parametrize(
    "path", ["/api/health", "/health", "/ping", "/metrics", "/openapi.json", "/v1/models", "/v1/models/story-writer"]
)
def test_head_answers_as_get_does_without_a_body(path: str, shipped: Running) -> None:
    expected, found = shipped.get(path), shipped.client.head(path)
    assert (found.status_code, found.content) == (200, b"")
    assert found.headers["content-type"] == expected.headers["content-type"]
