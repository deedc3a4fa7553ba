"""The id of a user: given once, kept, shown to nobody, and never trusted."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from demo.routing import COOKIE, UserCookieMiddleware, user_of


def client(base: str = "http://here") -> httpx.AsyncClient:
    page = lambda request: PlainTextResponse("page")  # noqa: E731
    missing = lambda request: PlainTextResponse("gone", 404)  # noqa: E731
    app = Starlette(
        routes=[Route("/", page), Route("/other", page), Route("/gone", missing)],
        middleware=[Middleware(UserCookieMiddleware)],
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base)


async def test_the_page_gives_an_id_once_and_it_is_kept() -> None:
    async with client() as browser:
        first = await browser.get("/")
        set_to = first.headers["set-cookie"]
        assert re.fullmatch(rf"{COOKIE}=[0-9a-f]{{32}}; Max-Age=34560000; Path=/; HttpOnly; SameSite=Lax", set_to)
        assert "set-cookie" not in (await browser.get("/")).headers


async def test_nothing_but_the_page_gives_one() -> None:
    async with client() as browser:
        assert "set-cookie" not in (await browser.get("/other")).headers
        assert "set-cookie" not in (await browser.get("/gone")).headers


async def test_over_https_it_travels_over_https_only() -> None:
    async with client("https://here") as browser:
        assert (await browser.get("/")).headers["set-cookie"].endswith("; Secure")


@pytest.mark.parametrize("value", ["", "lily", "A" * 32, "0" * 33, "0" * 31 + ";", '"' + "0" * 30])
async def test_what_is_no_id_of_ours_is_replaced(value: str) -> None:
    async with client() as browser:
        answer = await browser.get("/", headers={"cookie": f"x=1; {COOKIE}={value}"})
    assert "set-cookie" in answer.headers


def test_without_a_cookie_the_tab_is_the_user() -> None:
    def request(**cookies: str) -> Any:
        return SimpleNamespace(cookies=cookies, session_hash="tab")

    assert user_of(request(**{COOKIE: "0" * 32})) == "0" * 32
    assert user_of(request(**{COOKIE: "<script>"})) == "tab"
    assert user_of(request()) == "tab"
