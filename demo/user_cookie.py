"""A first-party cookie with a random user id, so that a returning browser gets the same model version.

Gradio's session lasts for one tab, an address is shared by a household, and some browsers delete what scripts store
after seven days. The id is 128 random bits that scripts and other sites cannot read; only its hash is stored. A
browser without cookies is a new user in each tab.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    import gradio as gr

COOKIE = "story-user"
KEPT = 400 * 24 * 3600
"""Seconds: as long as browsers keep any cookie."""
_ID = re.compile(r"[0-9a-f]{32}")


def user_of(request: gr.Request) -> str:
    """The id of whoever sent an event: from the cookie, else of the tab."""
    return _known(request.cookies) or request.session_hash or ""


def _known(cookies: Mapping[str, str]) -> str:
    found = cookies.get(COOKIE, "")
    return found if _ID.fullmatch(found) else ""


class UserCookieMiddleware:
    """ASGI middleware that gives new users of the page an id."""

    def __init__(self, app: ASGIApp, *, root_path: str = "") -> None:
        """`root_path`: under which the page is published."""
        self._app = app
        self._attributes = f"Max-Age={KEPT}; Path={root_path}/; HttpOnly; SameSite=Lax"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; the page itself gets the cookie where the browser has none."""
        if scope["type"] != "http" or scope["path"] != "/" or _known(HTTPConnection(scope).cookies):
            await self._app(scope, receive, send)
            return

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                secure = "; Secure" if scope.get("scheme") == "https" else ""
                value = f"{COOKIE}={secrets.token_hex(16)}; {self._attributes}{secure}"
                MutableHeaders(scope=message).append("set-cookie", value)
            await send(message)

        await self._app(scope, receive, send_with_cookie)
