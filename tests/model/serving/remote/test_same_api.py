"""The API over a remote service answers as over the engine in the process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.model.serving.http.serving import Running, serving
from tests.model.serving.remote.servers import modal

SCORED = {"prompt": "A fox", "max_tokens": 5, "temperature": 0, "seed": 1, "echo": True, "logprobs": 2}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [33, 1701], "max_tokens": 12, "seed": 4, "echo": True},
        {"prompt": ["A fox", "Mia"], "max_tokens": 12, "seed": 4, "n": 2, "best_of": 3},
        SCORED,
        SCORED | {"prompt": [[33, 1701, 300], [33]], "max_tokens": 0, "return_token_ids": True},
        SCORED | {"logit_bias": {"0": 100}, "return_token_ids": True},
        {"prompt": "A fox", "max_tokens": 12, "seed": 4, "presence_penalty": 1, "ignore_eos": True, "min_tokens": 3},
    ],
)
def test_completions_are_the_same_through_a_remote_service(body: dict[str, Any], shipped: Running) -> None:
    with serving(modal(shipped.url)) as remote:
        found, expected = (running.post("/v1/completions", **body).json() for running in (remote, shipped))
    assert found["choices"] == expected["choices"]
    assert found["usage"] == expected["usage"]
