"""The document that browsers, link previews and browsers without scripts get."""

from __future__ import annotations

import gzip
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from demo.asgi import compose
from demo.document import HOME, complete
from demo.experiments_page import PATH
from tests.demo.scripted import ScriptedBackend


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(compose(ScriptedBackend("A story.")))
    async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:
        yield client


async def test_title_and_link_preview_are_the_pages_own_and_nothing_is_foreign(client: httpx.AsyncClient) -> None:
    html = (await client.get("/")).text
    described = dict(re.findall(r'<meta (?:property|name)="([^"]+)" content="([^"]*)"', html))
    assert re.findall(r"<title>(.*?)</title>", html) == ["Write me a story"]
    assert described["og:title"] == "Write me a story"
    assert described["og:description"] == described["description"] == HOME.line
    assert not [name for name in described if name.endswith(("image", "creator", "url"))]
    assert "Gradio" not in "".join(described.values())
    assert {httpx.URL(url).host for url in re.findall(r"https?://[^\"'\\ <)]+", html)} <= {"page", "www.w3.org"}


async def test_a_page_without_scripts_says_what_it_needs(client: httpx.AsyncClient) -> None:
    html = (await client.get("/")).text
    body = html[html.index("<body") :]
    assert "<h1>Write me a story</h1>" in body
    assert "please allow it" in re.findall(r"<noscript>(.*?)</noscript>", body, re.DOTALL)[0]


async def test_the_theme_is_chosen_before_anything_of_the_page_is_parsed(client: httpx.AsyncClient) -> None:
    html = (await client.get("/")).text
    body = html[html.index("<body") :]
    assert body.index('setting("paper")') < body.index("</script>") < body.index("<header")
    head = html[: html.index("</head>")]
    assert "body.dark {" in head[head.rindex("<style>") :]
    assert re.search(r'<link rel="stylesheet" href="./theme.css\?v=\w+">', head)


async def test_manifest_and_icon_are_there(client: httpx.AsyncClient) -> None:
    manifest = await client.get("/manifest.json")
    assert (manifest.status_code, manifest.json()["name"]) == (200, "Write me a story")
    for icon in (manifest.json()["icons"][0]["src"], "/favicon.ico"):
        answer = await client.get(icon)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")
    assert (await client.get("/pwa_icon/192")).status_code == 404


async def test_documents_are_compressed_for_those_who_take_it_and_events_never(client: httpx.AsyncClient) -> None:
    plain = await client.get("/", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    async with client.stream("GET", "/", headers={"accept-encoding": "gzip"}) as answer:
        raw = b"".join([part async for part in answer.aiter_raw()])
    assert answer.headers["content-encoding"] == "gzip"
    assert "Accept-Encoding" in answer.headers["vary"]
    assert int(answer.headers["content-length"]) == len(raw) < len(plain.content) / 3
    same = re.compile(rb'"(app_id|session_hash)":[^,]+')
    assert same.sub(b"", gzip.decompress(raw)) == same.sub(b"", plain.content)
    assert (await client.head("/")).status_code == 200
    body = {"prompt": "One day", "stream": True}
    events = await client.post("/v1/completions", json=body, headers={"accept-encoding": "gzip"})
    assert events.headers["content-type"].startswith("text/event-stream")
    assert "content-encoding" not in events.headers


def test_documents_of_others_stay_as_they_are() -> None:
    docs = "<html><head></head><body>Docs</body></html>"
    assert complete(docs, "", ("", PATH)) == docs


def test_each_page_has_its_own_words_and_links_to_those_that_are_there() -> None:
    gradio = '<head><script>window.gradio_config = {"theme_hash":"ab1"}</script></head><body style="x">'
    html = complete(gradio, PATH, ("", PATH))
    assert "<h1>Experiments</h1>" in html
    assert '<a href="./">Write</a> <a href="./experiments" aria-current="page">Experiments</a>' in html
    alone = complete(gradio, PATH, ("",))
    assert "<h1>Write me a story</h1>" in alone
    assert "Experiments" not in alone[alone.index("<header") :]
