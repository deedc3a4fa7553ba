"""One policy for pages of other sites, on the real app: page, API and Socket.IO, whatever the host is called."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
import socketio

from model.settings import ServiceOptions, Settings
from tests.demo.engines import local_backend
from tests.demo.served import Served, serve

FRIEND, STRANGER = "https://a.example", "https://evil.example"
EVERYWHERE = ("config", "theme.css", "gradio_api/info", "v1/models", "api/health", "openapi.json")
POSTS = {
    "v1/completions": {"prompt": "One day", "max_tokens": 2},
    "api/generate": {"prompt": "One day", "max_tokens": 2},
    "gradio_api/queue/join": {"data": [], "fn_index": 0, "session_hash": "x"},
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(local_backend(), options=ServiceOptions(settings=Settings(story_origins=(FRIEND,)))) as made:
        yield made


@pytest.fixture(scope="module")
def strict() -> Iterator[Served]:
    with serve(local_backend()) as made:
        yield made


@pytest.mark.parametrize("host", [None, "stories.example", "localhost"])
def test_another_site_may_read_what_the_setting_lets_it_read_and_never_with_cookies(
    host: str | None, served: Served, strict: Served
) -> None:
    named = {} if host is None else {"host": host}
    with httpx.Client(timeout=None) as client:
        for app, origin, allowed in ((served, FRIEND, FRIEND), (served, STRANGER, None), (strict, FRIEND, None)):
            for path in EVERYWHERE:
                answer = client.get(app.url + path, headers={"origin": origin, **named})
                assert answer.status_code == 200, path
                assert answer.headers.get("access-control-allow-origin") == allowed, (path, origin)
                assert "access-control-allow-credentials" not in answer.headers
            asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
            for path in POSTS:
                answer = client.options(app.url + path, headers={"origin": origin, **asks, **named})
                assert (answer.status_code == 200) == (allowed is not None), path
                assert answer.headers.get("access-control-allow-origin") == allowed
                assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("path", POSTS)
def test_another_site_cannot_make_a_request_that_has_an_effect(path: str, served: Served) -> None:
    own = urlsplit(served.url)
    refused = [
        {"origin": STRANGER},
        {"origin": STRANGER, "host": "stories.example"},
        {"origin": "null"},
        {"origin": "http://stories.example", "sec-fetch-site": "cross-site", "host": "stories.example"},
        {"origin": f"http://{own.hostname}:1"},
    ]
    allowed = [
        {},
        {"origin": FRIEND, "sec-fetch-site": "cross-site"},
        {"origin": f"http://{own.netloc}"},
        {"origin": "http://stories.example", "host": "stories.example"},
        # Through a proxy with TLS that hides the host's name.
        {"origin": "https://stories.example", "sec-fetch-site": "same-origin"},
    ]
    with httpx.Client(timeout=None) as client:
        for headers in refused:
            answer = client.post(served.url + path, json=POSTS[path], headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin"), headers
        for headers in allowed:
            assert client.post(served.url + path, json=POSTS[path], headers=headers).status_code != 403, headers


def test_a_picture_on_another_site_starts_no_story(served: Served) -> None:
    address = f"{served.url}api/generate?prompt=One+day&max_tokens=2"
    assert httpx.get(address, headers={"sec-fetch-site": "cross-site"}, timeout=None).status_code == 403
    assert httpx.get(address, headers={"sec-fetch-site": "same-origin"}, timeout=None).status_code == 200
    assert httpx.get(served.url, headers={"sec-fetch-site": "cross-site"}, timeout=None).status_code == 200, (
        "a link to the page"
    )


@pytest.mark.parametrize("transport", ["polling", "websocket"])
@pytest.mark.parametrize(
    ("origin", "connects"), [(None, True), (FRIEND, True), (STRANGER, False), ("http://stories.example", True)]
)
async def test_socket_io_follows_the_same_policy(
    origin: str | None, connects: bool, transport: str, served: Served
) -> None:
    headers = {} if origin is None else {"Origin": origin, "Host": "stories.example"}
    if transport == "polling":  # its handshake; the client itself takes half a minute to leave
        async with httpx.AsyncClient(base_url=served.url, timeout=None) as asking:
            answer = await asking.get("/socket.io/?EIO=4&transport=polling", headers=headers)
        assert (answer.status_code == 200) == connects, answer.text
        return
    client = socketio.AsyncClient(reconnection=False)
    try:
        if connects:
            await client.connect(served.url, headers=headers, transports=[transport])
            assert client.connected
        else:
            with pytest.raises(socketio.exceptions.ConnectionError):
                await client.connect(served.url, headers=headers, transports=[transport])
    finally:
        await client.disconnect()
