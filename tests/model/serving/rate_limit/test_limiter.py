"""Who is let in, for how much, and what is given back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError, LimitError
from model.generation import GenerationRequest
from model.serving.rate_limit.limiter import Limiter
from model.serving.rate_limit.quotas import Quota, read_quotas
from model.serving.redis import RedisLink
from model.settings import load_settings
from tests.redis_server import redis_server


def quotas(**texts: str) -> list[Quota]:
    return [
        quota
        for name, text in texts.items()
        for quota in read_quotas(name, text, "all" if "all" in name else "client", name.split("_")[-1])  # type: ignore[arg-type]
    ]


def stories(count: int = 1, max_tokens: int = 100) -> list[GenerationRequest]:
    return [GenerationRequest(prompt="Once", max_tokens=max_tokens)] * count


async def test_a_client_gets_its_share_and_hears_when_there_is_more() -> None:
    limiter = Limiter(quotas(client_stories="3/minute"))
    for _ in range(3):
        (await limiter.admit("a", stories())).commit(stories=1)
    with pytest.raises(LimitError, match="one client is reached: 3 stories per minute") as refused:
        await limiter.admit("a", stories())
    assert 59 < refused.value.retry_after <= 60
    assert refused.value.scope == "client"
    await limiter.admit("b", stories(3))
    assert limiter.refusals == {("client", "stories"): 1}


async def test_all_together_get_theirs() -> None:
    limiter = Limiter(quotas(all_stories="2/minute", client_stories="2/minute"))
    await limiter.admit("a", stories())
    await limiter.admit("b", stories())
    with pytest.raises(LimitError, match="all clients together is reached"):
        await limiter.admit("c", stories())
    # Who asks too much is refused by its own limit and takes nothing from what all have.
    assert limiter.refusals == {("all", "stories"): 1}


async def test_a_story_reserves_all_it_may_have_and_pays_for_what_it_got() -> None:
    limiter = Limiter(quotas(client_tokens="1000/minute"))
    first = await limiter.admit("a", stories(max_tokens=600))
    with pytest.raises(LimitError):
        await limiter.admit("a", stories(max_tokens=600))
    first.commit(stories=1)
    first.commit(tokens=150)
    first.release()
    first.release()
    await limiter.admit("a", stories(max_tokens=850))
    with pytest.raises(LimitError):
        await limiter.admit("a", stories(max_tokens=1))


async def test_a_story_that_never_began_costs_nothing() -> None:
    limiter = Limiter(quotas(client_stories="1/minute", client_tokens="100/minute"))
    (await limiter.admit("a", stories())).release()
    await limiter.admit("a", stories())


async def test_a_refusal_takes_nothing_from_the_limits_that_had_room() -> None:
    limiter = Limiter(quotas(client_stories="9/minute", client_tokens="100/minute"))
    reservation = await limiter.admit("a", stories())
    for _ in range(20):
        with pytest.raises(LimitError):
            await limiter.admit("a", stories())
    reservation.release()
    for _ in range(9):
        await limiter.admit("a", stories(max_tokens=1))


async def test_what_can_never_be_allowed_is_a_wrong_request_and_no_matter_of_waiting() -> None:
    limiter = Limiter(quotas(client_stories="2/minute", client_tokens="100/minute"))
    with pytest.raises(
        InputError, match="max_tokens asks for more than the limit here allows at all: 100 tokens"
    ):
        await limiter.admit("a", stories(max_tokens=101))
    with pytest.raises(InputError, match="n asks for more than the limit here allows at all: 2 stories"):
        await limiter.admit("a", stories(3, max_tokens=1))
    await limiter.admit("a", stories(max_tokens=100))


@given(st.lists(st.tuples(st.integers(1, 400), st.floats(0, 1), st.booleans()), max_size=30))
async def test_never_more_tokens_are_written_and_reserved_than_the_limit_allows(steps: Any) -> None:
    limiter, written, running = Limiter(quotas(client_tokens="1000/minute")), 0, list[Any]()
    for asked, share, ends in steps:
        try:
            reservation = await limiter.admit("a", stories(max_tokens=asked))
        except LimitError:
            assert written + sum(most for _, most, _ in running) + asked > 1000
            continue
        reservation.commit(stories=1)
        running.append((reservation, asked, int(asked * share)))
        assert written + sum(most for _, most, _ in running) <= 1000
        if ends:
            done, _, tokens = running.pop(0)
            done.commit(tokens=tokens)
            done.release()
            written += tokens


async def test_replicas_share_their_limits_in_redis() -> None:
    with redis_server() as server:
        links = [RedisLink(server.url) for _ in range(2)]
        first, second = (
            Limiter(quotas(client_stories="2/minute", all_tokens="900/minute"), link=link) for link in links
        )
        reservation = await first.admit("a", stories(max_tokens=800))
        with pytest.raises(LimitError, match="all clients together"):
            await second.admit("b", stories(max_tokens=800))
        reservation.commit(stories=1)
        reservation.commit(tokens=20)
        reservation.release()
        await asyncio.sleep(0.1)
        await second.admit("a", stories(max_tokens=800))
        with pytest.raises(LimitError, match="one client"):
            await second.admit("a", stories(max_tokens=1))
        assert second.refusals == {("all", "tokens"): 1, ("client", "stories"): 1}
        server.stop()
        # Redis is gone: each goes on with what it has let in itself.
        await second.admit("a", stories(max_tokens=1))
        with pytest.raises(LimitError):
            await second.admit("a", stories(max_tokens=1))
        for link in links:
            await link.aclose()


def test_in_production_there_are_limits_unless_they_are_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Limiter.from_settings(load_settings()).quotas == []
    monkeypatch.setenv("STAGE", "PROD")
    monkeypatch.setenv("STORY_LIMIT_TOKENS", "off")
    monkeypatch.setenv("STORY_LIMIT_STORIES", "2/second;9/hour")
    assert [str(quota) for quota in Limiter.from_settings(load_settings()).quotas] == [
        "2 stories per second",
        "9 stories per hour",
        "600 stories per minute",
        "200000 tokens per minute",
    ]


@pytest.mark.parametrize(
    ("name", "value"), [("STORY_LIMIT_STORIES", "many"), ("STORY_TRUSTED_PROXIES", "the usual ones")]
)
def test_a_setting_that_means_nothing_is_refused_as_it_is_read(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name} must be") as refused:
        load_settings()
    assert refused.value.param == name
