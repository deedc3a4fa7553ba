"""The address that a server listens on, bound before anything slow is loaded."""

import socket

from model.errors import InputError


def bound(host: str, port: int) -> socket.socket:
    """Return a socket bound to `host` and `port`, 0 for any free one; it refuses connections until it is served.

    Raises `InputError` when the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, asyncio sends small messages at once (TCP_NODELAY); without, the end of a response waited
    # for the client's acknowledgement, and first tokens on kept connections came after 56 ms instead of 25.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host.strip("[]"), port))
    except socket.gaierror:
        made.close()
        raise InputError("host", f"must be an address of this machine, got {host!r}") from None
    except (OSError, OverflowError) as error:
        made.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError("port", f"{port} on {host} cannot be used: {reason}") from None
    made.setblocking(False)
    return made


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port of `host` that nothing listens on now. Raises `InputError` for another machine's address."""
    with bound(host, 0) as probe:
        port: int = probe.getsockname()[1]
        return port


def url_of(listener: socket.socket, host: str) -> str:
    """Return the URL of `listener`."""
    name = f"[{host.strip('[]')}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"
