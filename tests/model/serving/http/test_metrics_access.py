"""Whom `/metrics` answers: this machine, holders of the token, and nobody through a proxy or a share link."""

from __future__ import annotations

import pytest

from tests.model.serving.http.serving import paced, serving

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
        assert answer.text == running.get("/nothing").text.replace(
            "/nothing", "/metrics"
        )  # as if there were none
