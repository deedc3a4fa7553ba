"""Where a server listens, and that what it writes leaves at once."""

from __future__ import annotations

import asyncio
import socket

import pytest

from model.errors import InputError
from model.serving.http.address import bound


async def test_a_connection_sends_small_messages_at_once() -> None:
    told: list[int] = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted = writer.get_extra_info("socket")
        told.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listening = bound("127.0.0.1", 0)
    server = await asyncio.start_server(greet, sock=listening)
    async with server:
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        await reader.read()
        writer.close()
    assert told
    assert all(told), "a token does not wait for the acknowledgement of the one before"


def test_a_port_that_is_taken_and_an_address_elsewhere_are_told_in_one_line() -> None:
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(InputError, match=r"port .* cannot be used"):
            bound("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="host must be an address of this machine"):
        bound("no-such-host.invalid", 0)
