"""Whose request it is, with proxies that are trusted and headers that anyone can write."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from model.serving.rate_limit.clients import HOPS, UNKNOWN, Clients, grouped

INSIDE = st.ip_addresses(v=4, network="10.0.0.0/8").map(str)
OUTSIDE = (st.ip_addresses(v=4, network="192.0.2.0/24") | st.ip_addresses(v=6, network="2001:db8::/32")).map(
    str
)
RUBBISH = st.text(st.characters(codec="latin-1", exclude_characters=",[]:"), max_size=12) | INSIDE | OUTSIDE


def written(address: str, port: bool) -> str:
    """An entry as some proxies write it."""
    if not port:
        return address
    return f"[{address}]:4711" if ":" in address else f"{address}:4711"


def name(address: str) -> str:
    return grouped(ipaddress.ip_address(address))


@given(peer=OUTSIDE, headers=st.lists(RUBBISH, max_size=6), trusted=st.sampled_from([None, "10.0.0.0/8"]))
def test_what_a_stranger_says_of_itself_counts_nothing(
    peer: str, headers: list[str], trusted: str | None
) -> None:
    assert Clients.read(trusted).client(peer, headers) == name(peer)


@given(
    client=OUTSIDE,
    invented=st.lists(RUBBISH, max_size=8),
    proxies=st.lists(INSIDE, min_size=1, max_size=5),
    port=st.booleans(),
    split=st.integers(0, 10),
)
def test_behind_trusted_proxies_it_is_the_rightmost_address_that_is_none_of_them(
    client: str, invented: list[str], proxies: list[str], port: bool, split: int
) -> None:
    *between, peer = proxies
    entries = [*invented, written(client, port), *between]
    headers = [", ".join(entries[:split]), ",".join(entries[split:])]
    assert Clients.read("10.0.0.0/8").client(peer, headers) == name(client)


@given(
    client=OUTSIDE, invented=st.lists(RUBBISH, max_size=8), proxies=st.lists(OUTSIDE, min_size=1, max_size=5)
)
def test_where_proxies_are_counted_it_is_the_address_that_the_first_of_them_was_asked_from(
    client: str, invented: list[str], proxies: list[str]
) -> None:
    *between, peer = proxies
    entries = [entry for entry in [*invented, client, *between] if entry.strip()]
    assert Clients.read(str(len(proxies))).client(peer, [", ".join(entries)]) == name(client)


@given(
    peer=RUBBISH | st.none(),
    headers=st.lists(RUBBISH, max_size=3),
    trusted=st.sampled_from(["10.0.0.0/8", "2", None]),
)
def test_nothing_that_is_sent_makes_it_fail(
    peer: str | None, headers: list[str], trusted: str | None
) -> None:
    found = Clients.read(trusted).client(peer, headers)
    assert found == UNKNOWN or ipaddress.ip_network(found).num_addresses >= 1


def test_a_header_as_long_as_a_server_takes_is_read_from_its_end_only() -> None:
    entries = ["192.0.2.1", *["10.0.0.1"] * 8_000]
    assert Clients.read("10.0.0.0/8").client("10.0.0.2", [",".join(entries)]) == "10.0.0.1"
    short = ["192.0.2.1", *["10.0.0.1"] * (HOPS - 1)]
    assert Clients.read("10.0.0.0/8").client("10.0.0.2", [",".join(short)]) == "192.0.2.1"


def test_a_proxy_that_hides_its_client_is_the_client() -> None:
    assert Clients.read("10.0.0.0/8").client("10.0.0.2", ["192.0.2.1, unknown"]) == "10.0.0.2"
    assert Clients.read("10.0.0.0/8").client("10.0.0.2", []) == "10.0.0.2"


@given(st.ip_addresses(v=6, network="2001:db8:1:2::/64"))
def test_addresses_of_one_ipv6_network_are_one_client(address: ipaddress.IPv6Address) -> None:
    assert Clients().client(str(address), []) == "2001:db8:1:2::/64"


def test_an_ipv4_address_is_the_same_in_ipv6_form_and_a_zone_is_no_part_of_it() -> None:
    assert Clients().client("::ffff:192.0.2.7", []) == Clients().client("192.0.2.7", []) == "192.0.2.7"
    assert Clients().client("fe80::1%eth0", []) == "fe80::/64"
    assert Clients.read("10.0.0.0/8").client("::ffff:10.0.0.1", ["192.0.2.7"]) == "192.0.2.7"


def test_a_connection_without_an_address_has_a_name_too() -> None:
    assert Clients().of({"client": None, "headers": []}) == UNKNOWN
    assert Clients.read("1").of({"headers": [(b"x-forwarded-for", b"192.0.2.7")]}) == "192.0.2.7"


@pytest.mark.parametrize("text", ["10.0.0.0/99", "proxy.example", "10.0.0.1,", "99", "-1", "10.0.0.1/8"])
def test_what_names_no_proxies_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError, match="STORY_TRUSTED_PROXIES must be") as raised:
        Clients.read(text)
    assert "\n" not in str(raised.value)
