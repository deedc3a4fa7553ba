"""The local backend over a real engine, and the handlers over it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from demo import handlers
from demo.form import Form
from model.engine.engine import EngineStats
from model.errors import BusyError, InputError, ModelError
from model.generation import GenerationRequest, SamplingParams
from model.serving.remote import open_backend
from model.settings import Settings
from tests.demo.engines import local_backend
from tests.demo.scripted import state_of


async def test_the_page_shows_the_story_that_the_engine_alone_would_write() -> None:
    form = Form(prompt="One sunny day", max_tokens=60, seed=5)
    backend = local_backend(end_bias=-50)
    async with backend.running():
        views = [view async for view in handlers.write(state_of(backend), "me", form)]
    with local_backend(end_bias=-50).engine as engine:
        request = GenerationRequest(prompt="One sunny day", max_tokens=60, sampling=SamplingParams(seed=5))
        alone = engine.submit(request).wait(10)
    assert views[-1].generated == alone.text
    assert f"{alone.usage.completion_tokens} tokens" in views[-1].figures
    assert views[-1].phase == "open"  # it met the length


async def test_closing_the_page_frees_the_slot() -> None:
    backend = local_backend(step_seconds=0.005, end_bias=-50)
    async with backend.running():
        async with contextlib.aclosing(handlers.write(state_of(backend), "me", Form())) as views:
            async for view in views:
                if view.generated:
                    assert backend.engine.stats().active == 1
                    break
        await slot_free(backend.engine.stats)
        assert backend.engine.stats().finished["cancelled"] == 1


async def test_a_story_too_many_meets_a_full_queue_and_a_place_frees_up_again() -> None:
    backend = local_backend(slots=1, queue=1, step_seconds=0.005, end_bias=-50)
    state = state_of(backend)
    async with backend.running():
        streams = [await backend.submit(GenerationRequest(prompt="", max_tokens=500)) for _ in range(2)]
        with pytest.raises(BusyError):
            await backend.submit(GenerationRequest(prompt=""))
        refused = [view async for view in handlers.write(state, "me", Form())]
        assert [view.phase for view in refused] == ["failed"]
        assert "try again" in refused[0].status
        for stream in streams:
            stream.cancel()
        await slot_free(backend.engine.stats)
        received = [view async for view in handlers.write(state, "me", Form(max_tokens=5))]
        assert received[-1].phase == "open"


async def test_leaving_it_ends_what_is_still_being_written() -> None:
    backend = local_backend(step_seconds=0.005, end_bias=-50)
    async with backend.running():
        stream = await backend.submit(GenerationRequest(prompt="", max_tokens=1000))
    assert stream.completion.finish_reason == "cancelled"


def test_an_unknown_backend_is_an_error_that_names_what_there_is() -> None:
    with pytest.raises(InputError, match=r"backend must be one of auto, local, modal, got 'cloud'"):
        open_backend("cloud", Settings())


def test_a_model_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match="nowhere"):
        open_backend("local", Settings(story_model="nowhere"))


async def slot_free(stats: Callable[[], EngineStats]) -> None:
    """Wait until nothing is written any more; a stop takes effect at the next step."""
    async with asyncio.timeout(5):
        while stats().active or stats().waiting:
            await asyncio.sleep(0.005)
