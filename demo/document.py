"""The HTML document around Gradio's page: its head, and what stands there before and without Gradio's scripts.

Gradio sends an almost empty document: the link preview is Gradio's own, with an image from another host; scripts add
style and title, after Gradio's logo. `DocumentMiddleware` completes it before it is sent: title, preview, style and
heading are there at the first paint, and the response is compressed.
"""

import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from demo import arena_page, experiments_page, inside_page, status_page, theme

FOREIGN = re.compile(r'<(?:meta\s+(?:property|name)="(?:og|twitter):|link rel="manifest")[^>]*>\s*')
"""What of Gradio's head describes Gradio, not this page."""

THEME_HASH = re.compile(r'"theme_hash":"(\w+)"')


@dataclass(frozen=True, slots=True)
class Words:
    """What a page says of itself."""

    name: str
    """In the navigation."""
    title: str
    heading: str
    line: str


HOME = Words(
    name="Write",
    title="Write me a story",
    heading="Write me a story",
    line="You begin. A small language model goes on, while you watch.",
)
EXPERIMENTS = Words(
    name="Experiments",
    title=experiments_page.TITLE,
    heading="Experiments",
    line="How the model that writes here was made, measured and judged.",
)
INSIDE = Words(
    name="Inside",
    title=inside_page.TITLE,
    heading="Inside",
    line="What surprises the model, what it expected, and what it still remembers.",
)
ARENA = Words(
    name="Arena",
    title=arena_page.TITLE,
    heading="Arena",
    line="Two stories from one beginning. You say which is better, and then learn who wrote it.",
)
STATUS = Words(
    name="Status",
    title=status_page.TITLE,
    heading="Status",
    line="Who writes here now, how quickly, and what went wrong.",
)
PAGES = {
    "": HOME,
    inside_page.PATH: INSIDE,
    arena_page.PATH: ARENA,
    experiments_page.PATH: EXPERIMENTS,
    status_page.PATH: STATUS,
}
"""By path, in the order of the navigation."""

_BODY = """
<script>{script}</script>
<header class="masthead{wide}">
  {navigation}
  <h1>{heading}</h1>
  <p>{line}</p>
  <button type="button" id="paper" aria-label="Dark paper" title="Light or dark paper"></button>
</header>
<p class="opening" role="status">The page is being opened …</p>
<noscript>
  <style>.opening, #paper {{ display: none; }}</style>
  <p class="scriptless">Stories are written as you watch, which needs JavaScript: please allow it for this page.</p>
</noscript>
"""


class DocumentMiddleware:
    """Completes and compresses the HTML documents of Gradio's pages; anything else passes as it is."""

    def __init__(self, app: ASGIApp, paths: Sequence[str]) -> None:
        """`paths`: of the `PAGES` that are there."""
        self._app = app
        self._paths = tuple(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def send_completed(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                if Headers(raw=message["headers"]).get("content-type", "").startswith("text/html"):
                    start = message
                    return
            elif start is not None and message["type"] == "http.response.body":
                body += message.get("body", b"")
                if message.get("more_body"):
                    return
                headers, message = MutableHeaders(scope=start), {"type": "http.response.body", "body": body}
                if body and "content-encoding" not in headers:
                    text = complete(body.decode(), scope["path"].rpartition("/")[2], self._paths)
                    message["body"] = text.encode()
                    headers.add_vary_header("Accept-Encoding")
                    if "gzip" in Headers(scope=scope).get("accept-encoding", ""):
                        headers["content-encoding"] = "gzip"
                        message["body"] = gzip.compress(message["body"], 6)
                    headers["content-length"] = str(len(message["body"]))
                await send(start)
            await send(message)

        await self._app(scope, receive, send_completed)


def complete(html: str, path: str, paths: tuple[str, ...]) -> str:
    """The document `html` of Gradio's page at `path` with our head and first paint; other documents as they are.

    `paths` are those of all pages.
    """
    path = path if path in paths else ""
    words = PAGES[path]
    head, mark, rest = html.partition("<script>window.gradio_config")
    if not mark:
        return html
    version = THEME_HASH.search(rest)
    styles = f'<link rel="stylesheet" href="./theme.css?v={version[1]}">\n' if version else ""
    rest = rest.replace('<link rel="manifest" href="/manifest.json" />', _head(words) + styles, 1)
    rest = rest.replace("</head>", f"<style>\n{_style()}</style>\n</head>", 1)
    return (
        FOREIGN.sub("", head)
        + mark
        + re.sub(r"<body[^>]*>", lambda body: body[0] + _first_paint(path, paths), rest, count=1)
    )


def routes() -> list[Route]:
    """The page's own icon and manifest, in place of Gradio's."""

    def icon(_request: Request) -> FileResponse:
        return FileResponse(theme.ASSETS / "favicon.svg", headers={"cache-control": "public, max-age=86400"})

    def manifest(_request: Request) -> FileResponse:
        return FileResponse(theme.ASSETS / "manifest.json", media_type="application/manifest+json")

    return [Route("/favicon.svg", icon), Route("/favicon.ico", icon), Route("/manifest.json", manifest)]


def _head(words: Words) -> str:
    title, line = escape(words.title), escape(words.line)
    return (
        f"<title>{title}</title>\n"
        f'<meta name="description" content="{line}">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta property="og:type" content="website">\n'
        f'<meta property="og:title" content="{title}">\n'
        f'<meta property="og:description" content="{line}">\n'
        '<meta name="twitter:card" content="summary">\n'
        '<link rel="icon" type="image/svg+xml" href="./favicon.svg">\n'
        '<link rel="manifest" href="./manifest.json">\n'
    )


@cache
def _style() -> str:
    return "".join(theme.asset(f"{name}.css") for name in ("page", "experiments", "inside", "arena", "status"))


@cache
def _first_paint(path: str, paths: tuple[str, ...]) -> str:
    words, script = PAGES[path], theme.asset("page.js") + theme.asset("experiments.js")
    wide = " wide" if path else ""
    navigation = _navigation(path, paths) if len(paths) > 1 else ""
    return _BODY.format(script=script, wide=wide, navigation=navigation, heading=words.heading, line=words.line)


def _navigation(path: str, paths: tuple[str, ...]) -> str:
    """Links to the pages, relative, so that they hold under any address."""
    here = {path: ' aria-current="page"'}
    links = [f'<a href="./{each}"{here.get(each, "")}>{PAGES[each].name}</a>' for each in paths]
    return f'<nav class="pages" aria-label="Pages">{" ".join(links)}</nav>'
