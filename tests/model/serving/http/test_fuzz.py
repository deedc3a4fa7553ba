"""Whatever the API's description allows, and what it does not, gets an answer of the usual form, and never a 500."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.model.serving.http.serving import Running, paced, serving

EXAMPLES = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """Stories end at once, so that thousands can be asked for."""
    backend, _ = paced(slots=4, queue=16, end_bias=1000.0)
    with serving(backend) as found:
        yield found


AS_DESCRIBED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
"""A valid body may be refused all the same: some fields go together only with certain others."""


def held(status: int, text: str) -> None:
    """No 500; an error is one JSON object of the usual form, without a trace of what lies inside."""
    assert status < 500, text
    assert "Traceback" not in text
    assert "site-packages" not in text
    if status >= 400 and text and status != 405:
        error = json.loads(text)["error"]
        assert set(error) == {"type", "message", "param", "code"}
        assert "\n" not in error["message"]


def every_case_of(operation: Any, tried: Counter[str]) -> None:
    """Ask what the description of one operation allows, over and over."""

    @EXAMPLES
    @given(case=operation.as_strategy())
    def hold(case: Any) -> None:
        tried[operation.label] += 1
        answer = case.call_and_validate(timeout=20, checks=AS_DESCRIBED)
        held(answer.status_code, answer.text)

    hold()


def test_every_route_as_described(running: Running) -> None:
    """Cases come from the description; what `pytest` would make of them is left out, for it is behind pytest 9."""
    schema: Any = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    tried: Counter[str] = Counter()
    for found in schema.get_all_operations():
        every_case_of(found.ok(), tried)
    assert set(tried) == {
        "POST /v1/completions",
        "POST /v1/chat/completions",
        "GET /v1/models",
        "GET /v1/models/{name}",
        "POST /api/generate",
        "GET /api/generate",
        "GET /api/health",
        "GET /metrics",
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KNOWN = "prompt max_tokens temperature top_p top_k min_p seed stop n stream logprobs model user stream_options echo"
FIELDS = st.sampled_from([*KNOWN.split(), "\ud800"])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/api/generate"])
@settings(EXAMPLES, max_examples=150)
@given(body=st.dictionaries(FIELDS, JSON, max_size=6), prompt=st.text(st.characters(), max_size=30) | st.none())
def test_bodies_that_nobody_described(path: str, body: dict[str, Any], prompt: str | None, running: Running) -> None:
    if prompt is not None:
        body = {**body, "prompt": prompt, "max_tokens": 2}
    sent = json.dumps(body).encode("utf-8", "surrogatepass")
    answer = running.client.post(path, content=sent, headers={"content-type": "application/json"})
    held(answer.status_code, answer.text)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/api/generate"])
@settings(EXAMPLES, max_examples=80)
@given(body=st.binary(max_size=200))
def test_bytes_that_are_no_body(path: str, body: bytes, running: Running) -> None:
    answer = running.client.post(path, content=body)
    assert 400 <= answer.status_code < 500
    held(answer.status_code, answer.text)


@pytest.mark.parametrize(
    "text", ["\x00", "a\x1b[31mb", "\u202egnp", "e" + "\u0301" * 200, "👩‍👩‍👧", "\ufeff", "\u2028\u2029"]
)
def test_odd_characters_in_a_prompt_are_text_or_a_named_error(text: str, running: Running) -> None:
    answer = running.post("/v1/completions", prompt=f"Once {text}", max_tokens=2)
    held(answer.status_code, answer.text)
    assert answer.status_code in (200, 422)
    assert running.get("/api/health").status_code == 200
