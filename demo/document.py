"""The HTML document around Gradio's page: its head, and what stands there before and without Gradio's scripts.

Gradio sends an almost empty document: the link preview is Gradio's own, with an image from another host; scripts add
style and title, after Gradio's logo. `DocumentMiddleware` completes it before it is sent: title, preview, style and
heading are there at the first paint, and the response is compressed.
"""

import gzip
import re
from dataclasses import dataclass
from functools import cache
from html import escape

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from demo import theme
from demo.experiments_page import PATH, TITLE

FOREIGN = re.compile(r'<(?:meta\s+(?:property|name)="(?:og|twitter):|link rel="manifest")[^>]*>\s*')
"""What of Gradio's head describes Gradio, not this page."""

THEME_HASH = re.compile(r'"theme_hash":"(\w+)"')


@dataclass(frozen=True, slots=True)
class Words:
    """What a page says of itself."""

    title: str
    heading: str
    line: str
    back: str = ""
    """Markup of a link back, where there is one."""


HOME = Words(
    title="Write me a story",
    heading="Write me a story",
    line="You begin. A small language model goes on, while you watch.",
)
EXPERIMENTS = Words(
    title=TITLE,
    heading="Experiments",
    line="How the model that writes here was made, measured and judged.",
    back='<p class="back"><a href="./">← Write me a story</a></p>',
)

_BODY = """
<script>{script}</script>
<header class="masthead">
  {back}
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
    """Completes and compresses the HTML documents of Gradio's page; anything else passes as it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

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
                    text = complete(body.decode(), EXPERIMENTS if scope["path"].endswith(f"/{PATH}") else HOME)
                    message["body"] = text.encode()
                    headers.add_vary_header("Accept-Encoding")
                    if "gzip" in Headers(scope=scope).get("accept-encoding", ""):
                        headers["content-encoding"] = "gzip"
                        message["body"] = gzip.compress(message["body"], 6)
                    headers["content-length"] = str(len(message["body"]))
                await send(start)
            await send(message)

        await self._app(scope, receive, send_completed)


def complete(html: str, words: Words) -> str:
    """The document `html` of Gradio's page with our head and first paint; other documents as they are."""
    head, mark, rest = html.partition("<script>window.gradio_config")
    if not mark:
        return html
    version = THEME_HASH.search(rest)
    styles = f'<link rel="stylesheet" href="./theme.css?v={version[1]}">\n' if version else ""
    rest = rest.replace('<link rel="manifest" href="/manifest.json" />', _head(words) + styles, 1)
    rest = rest.replace("</head>", f"<style>\n{_style()}</style>\n</head>", 1)
    return (
        FOREIGN.sub("", head) + mark + re.sub(r"<body[^>]*>", lambda body: body[0] + _first_paint(words), rest, count=1)
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
    return theme.asset("page.css") + theme.asset("experiments.css")


@cache
def _first_paint(words: Words) -> str:
    script = theme.asset("page.js") + theme.asset("experiments.js")
    return _BODY.format(script=script, back=words.back, heading=words.heading, line=words.line)
