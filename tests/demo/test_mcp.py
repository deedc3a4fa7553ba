"""The page's public endpoints as tools of the Model Context Protocol, met by the protocol's own client."""

from __future__ import annotations

import ast
import asyncio
from importlib.util import find_spec
from typing import Any

import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from demo import asgi
from model.errors import MissingExtraError
from model.generation import GenerationRequest, SamplingParams
from model.settings import ServiceOptions, Settings
from tests.demo.engines import local_backend
from tests.demo.served import serve

pytestmark = pytest.mark.filterwarnings(
    # Gradio 6.31 on pandas 3, at the end of each event: as errors they would break the server's queue.
    "ignore:'future.no_silent_downcasting' is deprecated",
    "ignore:The copy keyword is deprecated",
)


def test_a_story_comes_from_a_tool_with_described_parameters() -> None:
    async def talk(url: str) -> tuple[list[Any], Any, Any]:
        async with (
            streamable_http_client(f"{url}gradio_api/mcp/") as (receive, send, _),
            ClientSession(receive, send) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            arguments = {"prompt": "One day", "max_tokens": 12, "seed": 5}
            written = await session.call_tool(tools[0].name, arguments)
            refused = await session.call_tool(tools[0].name, {"prompt": "One day", "max_tokens": 0})
            return tools, written, refused

    backend = local_backend(end_bias=-50)
    with serve(backend, options=ServiceOptions(settings=Settings(story_mcp=True))) as served:
        tools, written, refused = asyncio.run(talk(served.url))
        request = GenerationRequest(prompt="One day", max_tokens=12, sampling=SamplingParams(seed=5))
        expected = backend.engine.submit(request).wait(30).text
    names = [tool.name.split("_")[-1] for tool in tools]
    assert names[:4] == ["write", "continue", "alternatives", "futures"]
    assert {"surprise", "distribution", "memory", "evidence", "layers", "status"} <= set(names)
    assert {"prompt", "max_tokens", "seed"} <= set(tools[0].inputSchema["properties"])
    assert not written.isError
    assert ast.literal_eval(written.content[0].text)["story"] == "One day" + expected
    assert refused.isError


def test_without_its_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "find_spec", lambda name: None if name == "mcp" else find_spec(name))
    with pytest.raises(MissingExtraError, match=r"STORY_MCP needs the 'mcp' packages"):
        asgi.compose(local_backend(), ServiceOptions(settings=Settings(story_mcp=True)))
