"""Where a server listens: what can be said of an address before anything is loaded behind it."""

from __future__ import annotations

import socket

import pytest

from model.errors import InputError
from model.service.address import bound, url_of


def test_port_0_takes_a_free_one_that_refuses_until_it_is_served() -> None:
    with bound("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener, "127.0.0.1") == f"http://127.0.0.1:{port}"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        listener.listen()
        socket.create_connection(("127.0.0.1", port)).close()


def test_an_address_of_six_groups_is_written_in_brackets() -> None:
    with bound("::1", 0) as listener:
        assert url_of(listener, "::1") == f"http://[::1]:{listener.getsockname()[1]}"


def test_a_port_that_is_taken_is_told_in_one_line() -> None:
    with bound("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(InputError, match=rf"^port {port} on 127.0.0.1 cannot be used: \w+") as caught:
            bound("127.0.0.1", port)
    assert caught.value.param == "port"


def test_a_host_that_is_none_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^host must be an address of this machine, got '256\.1\.1\.1:x'"):
        bound("256.1.1.1:x", 0)
