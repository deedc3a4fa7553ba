"""What browsers are told, and which pages of other sites may ask, over a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from model.serving.http.middleware import SECURITY_HEADERS
from tests.model.serving.http.serving import Running, paced, serving

FRIEND, STRANGER = "https://friend.example", "https://stranger.example"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    backend, _ = paced()
    with serving(backend, origins=(FRIEND,)) as found:
        yield found


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
