"""The simple form: one story, as one object or as events."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.demo.tabs import chromium
from tests.model.serving.http.serving import Running, paced, serving, streaming

ASKED: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0.5, "seed": 4}


def test_a_whole_story_comes_with_all_that_is_known_of_it(shipped: Running) -> None:
    answer = shipped.post("/api/generate", **ASKED).json()
    assert answer["story"] == answer["prompt"] + answer["text"]
    assert answer["prompt"] == "Once upon a time"
    assert (answer["finish_reason"], answer["seed"], answer["served_by"]) == ("length", 4, "local")
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["times"]["duration"] >= answer["times"]["ttft"] > 0
    assert answer["version"] == shipped.get("/api/health").json()["model"]["version"]


def test_it_is_the_story_of_completions(shipped: Running) -> None:
    one = shipped.post("/api/generate", **ASKED).json()
    other = shipped.post("/v1/completions", **ASKED).json()
    assert one["text"] == other["choices"][0]["text"]
    assert one["usage"] == other["usage"]


def test_its_events_are_tokens_and_then_the_whole(shipped: Running) -> None:
    whole = shipped.post("/api/generate", **ASKED).json()
    with streaming(shipped, "/api/generate", **ASKED) as flow:
        received = list(flow)
    assert [name for name, _ in received] == ["token"] * (len(received) - 1) + ["complete"]
    complete = received.pop()[1]
    assert "".join(data["text"] for _, data in received) == complete["text"] == whole["text"]
    assert received  # how many depends on the machine: tokens that are ready at once share an event
    assert {k: v for k, v in complete.items() if k not in ("id", "times")} == {
        k: v for k, v in whole.items() if k not in ("id", "times")
    }


def test_without_a_seed_the_response_has_the_one_that_was_used(shipped: Running) -> None:
    first = shipped.post("/api/generate", prompt="Mia", max_tokens=15).json()
    again = shipped.post("/api/generate", prompt="Mia", max_tokens=15, seed=first["seed"]).json()
    assert again["text"] == first["text"]


def test_a_failure_in_mid_story_is_an_event_of_its_own() -> None:
    backend, network = paced(step_seconds=0.01)
    with serving(backend) as running, streaming(running, "/api/generate", prompt="Once", max_tokens=4000) as flow:
        assert next(flow)[0] == "token"
        network.fail_next = RuntimeError("inner words")
        received = list(flow)
    name, data = received[-1]
    assert name == "error"
    assert data["error"].keys() == {"type", "message", "param", "code"}
    assert data["error"]["code"] == "model_failed"
    assert {name for name, _ in received[:-1]} <= {"token"}


def test_curl_needs_no_more_than_a_prompt(shipped: Running) -> None:
    command = ["curl", "-s", "--fail", f"{shipped.url}/api/generate", "-d", '{"prompt": "A fox"}']
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert json.loads(run.stdout)["story"].startswith("A fox")


def get_events(running: Running, headers: dict[str, str] | None = None, **query: Any) -> list[tuple[str, str, Any]]:
    """(id, name, data) of each event of a GET."""
    response = running.client.get("/api/generate", params=query, headers=headers)
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        if "data" in fields:
            found.append((fields["id"], fields["event"], json.loads(fields["data"])))
    return found


def test_get_streams_the_story_of_its_query(shipped: Running) -> None:
    whole = shipped.post("/api/generate", **ASKED, stop=["dog", "cat"]).json()
    *tokens, (last_id, name, complete) = get_events(shipped, **ASKED, stop=["dog", "cat"])
    assert (last_id, name) == ("complete", "complete")
    assert "".join(data["text"] for _, _, data in tokens) == complete["text"] == whole["text"]
    assert shipped.client.get("/api/generate", params=ASKED | {"stream": "false"}).json()["text"] == whole["text"]
    for query, param in [({}, "prompt"), ({"prompt": "x", "seed": "a"}, "seed"), ({"prompt": "x", "n": "2"}, "n")]:
        refused = shipped.client.get("/api/generate", params=query)
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, param)


def test_a_client_that_lost_its_connection_gets_the_rest_of_the_story(shipped: Running) -> None:
    asked: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 20}
    *tokens, (_, _, complete) = get_events(shipped, **asked)
    texts = [data["text"] for _, _, data in tokens]
    for lost in range(len(tokens)):
        last_id = tokens[lost][0]
        *rest, (_, _, again) = get_events(shipped, {"last-event-id": last_id}, **asked)
        assert "".join([*texts[: lost + 1], *(data["text"] for _, _, data in rest)]) == complete["text"]
        assert again["text"] == complete["text"], "with the seed that was drawn the first time"
    ended = shipped.client.get("/api/generate", params=asked, headers={"last-event-id": "complete"})
    assert (ended.status_code, ended.content) == (204, b"")


EVENT_SOURCE = """async () => {
    const source = new EventSource("/api/generate?prompt=A%20fox&max_tokens=15");
    const seen = {texts: [], complete: [], errors: 0};
    source.addEventListener("token", event => seen.texts.push(JSON.parse(event.data).text));
    source.addEventListener("complete", event => seen.complete.push(JSON.parse(event.data).text));
    await new Promise(resolve => {
        source.onerror = () => { seen.errors += 1; if (source.readyState === EventSource.CLOSED) resolve(); };
    });
    return seen;
}"""


@pytest.mark.browser
def test_an_event_source_does_not_start_again_at_the_end(shipped: Running) -> None:
    with chromium() as browser:
        page = browser.new_page()
        page.goto(f"{shipped.url}/ping")
        seen = page.evaluate(EVENT_SOURCE)
    assert seen["complete"] == ["".join(seen["texts"])], "the story came once"
    assert seen["errors"] == 2, "the end of its connection, and the answer that it is over"
