"""Middleware: bounded bodies, request ids, error responses, security headers and CORS."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.serving.backend import LocalBackend
from model.serving.http.middleware import SECURITY_HEADERS
from tests.model.serving.http.serving import Running, paced, serving
from tests.model.serving.http.test_schemas import BODIES

FRIEND, STRANGER = "https://friend.example", "https://stranger.example"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    backend, _ = paced(slots=4, end_bias=0.0)
    with serving(backend, max_body=2048, origins=(FRIEND,)) as made:
        yield made


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"type", "message", "param", "code"}
    assert "\n" not in body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize("path", ["/v1/completions", "/api/generate"])
@pytest.mark.parametrize("with_length", [True, False])
def test_a_body_that_is_too_long_is_refused_whether_or_not_it_announces_its_length(
    path: str, with_length: bool, running: Running
) -> None:
    body = json.dumps({"prompt": "x" * 3000}).encode()
    content: Any = body if with_length else iter([body[:1000], body[1000:]])
    response = running.client.post(f"{path}", content=content)
    assert response.status_code == 413
    error = error_of(response)
    assert (error["code"], error["message"]) == ("body_too_large", "the body must have at most 2048 bytes")


def test_a_body_of_the_longest_length_is_read(running: Running) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode().ljust(2048)  # JSON may end in blanks
    assert len(body) == 2048
    assert running.client.post("/v1/completions", content=body).status_code == 200


def test_a_body_whose_announced_length_is_a_lie_is_stopped_before_it_has_come(running: Running) -> None:
    parts = urlsplit(running.url)
    assert parts.hostname is not None
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=5) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"prompt=x"])
def test_what_is_no_json_object_is_400(content: bytes, running: Running) -> None:
    for path in ("/v1/completions", "/api/generate"):
        response = running.client.post(f"{path}", content=content)
        assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")


def test_unknown_addresses_and_methods_are_reported_in_the_same_form(running: Running) -> None:
    for path in ("/", "/v1", "/v1/completions/", "/docs", "/v1/embeddings/x"):
        response = running.client.get(f"{path}")
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found"), path
    response = running.client.get("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert error_of(response)["message"] == "GET is not allowed at /v1/completions; use POST"
    assert running.client.delete("/api/health").status_code == 405


def test_a_request_keeps_the_name_it_came_with_if_it_is_one(running: Running) -> None:
    url = "/api/health"
    assert running.client.get(url, headers={"x-request-id": "a.B-9:_"}).headers["x-request-id"] == "a.B-9:_"
    made = [
        running.client.get(url, headers={"x-request-id": wrong}).headers["x-request-id"]
        for wrong in ("", "a b", "x" * 129, "<script>")
    ]
    assert all(len(name) == 32 for name in made)
    assert len(set(made)) == 4


def test_every_answer_says_who_writes(running: Running) -> None:
    for path in ("/api/health", "/nothing", "/metrics", "/v1/models"):
        assert running.client.get(f"{path}").headers["x-story-backend"] == "local"
    backend, _ = paced()
    with serving(backend, name="blue") as blue:
        response = blue.post("/v1/completions", prompt="x", max_tokens=2)
        assert response.headers["x-story-backend"] == "blue"
        assert response.json()["served_by"] == "local"
        assert blue.client.get("/api/health").json()["backend"] == "blue"


def test_a_bug_is_one_line_for_the_client_and_a_trace_for_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_self: LocalBackend, _request: object) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr(LocalBackend, "submit", broken)
    backend, _ = paced()
    with serving(backend) as running:
        for stream in (True, False):
            response = running.post("/v1/completions", prompt="x", stream=stream)
            assert response.status_code == 500
            assert error_of(response) == {
                "type": "internal_error",
                "message": "something went wrong on this side",
                "param": None,
                "code": "internal",
            }
    assert "secret" in caplog.text


@settings(max_examples=50)
@given(body=BODIES)
def test_no_body_is_answered_with_500(body: dict[str, Any], running: Running) -> None:
    # Short, where a story comes of it: what is looked for lies before the first token.
    body = {"max_tokens": 2, **body} if body.get("n") in (None, 1) else body
    for path in ("/v1/completions", "/api/generate"):
        response = running.client.post(path, content=json.dumps(body))
        assert response.status_code in (200, 413, 422, 404, 429), response.text
        if response.status_code == 422:
            assert error_of(response)["param"] is not None


@settings(max_examples=40)
@given(content=st.binary(max_size=200), path=st.text(st.characters(max_codepoint=127), max_size=20))
def test_no_bytes_at_any_address_are_answered_with_500(content: bytes, path: str, running: Running) -> None:
    for address in ("/v1/completions", "/" + quote(path, safe="/?#&").lstrip("/")):
        response = running.client.post(f"{address}", content=content, timeout=30)
        assert 400 <= response.status_code < 500, response.text


@pytest.mark.parametrize("path", ["/api/health", "/v1/models", "/nothing/here", "/metrics"])
def test_every_answer_carries_them_errors_too(running: Running, path: str) -> None:
    answer = running.get(path)
    assert {name: answer.headers.get(name) for name in SECURITY_HEADERS} == SECURITY_HEADERS
    assert "server" not in answer.headers


def test_a_stream_carries_them_and_still_streams(running: Running) -> None:
    with running.client.stream(
        "POST", "/v1/completions", json={"prompt": "Once", "max_tokens": 3, "stream": True}
    ) as answer:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "".join(answer.iter_text()).endswith("data: [DONE]\n\n")


def test_pages_of_a_named_site_may_ask_and_no_others(running: Running) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for origin, allowed in ((FRIEND, FRIEND), (STRANGER, None), ("null", None)):
        before = running.client.options("/v1/completions", headers={"origin": origin, **asks})
        answer = running.client.get("/api/health", headers={"origin": origin})
        for each in (before, answer):
            assert each.headers.get("access-control-allow-origin") == allowed
            assert "access-control-allow-credentials" not in each.headers


def test_without_the_setting_no_other_site_may(shipped: Running) -> None:
    answer = shipped.client.get("/api/health", headers={"origin": FRIEND})
    assert not [name for name in answer.headers if name.startswith("access-control")]
