"""What announcements, bus names and warnings may look like; no sockets."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqbus.errors import SetupError
from zmqbus.net import clock, discovery
from zmqbus.net.discovery import Discovery, Found, check_bus
from zmqbus.net.interfaces import Address
from zmqbus.net.mdns import SERVICE_TYPE, Announcement


def announcement(**changes: Any) -> Announcement:
    fields: dict[bytes, bytes | None] = {
        b"txtvers": b"1",
        b"id": b"0123456789abcdef",
        b"pub": b"65535",
        b"pv": b"255",
        b"bus": b"b",
        b"epoch": b"18446744073709551615",
    }
    good = Announcement("i." + SERVICE_TYPE, 1, ("10.0.0.9", "10.0.0.10"), fields, 100)
    if "txt" in changes:
        changes["txt"] = fields | changes["txt"]
    return good._replace(**changes)


def test_a_sound_announcement_is_read() -> None:
    assert discovery._validated(announcement()) == Found(
        0x0123456789ABCDEF, ("10.0.0.9", "10.0.0.10"), 1, 65535, 2**64 - 1, 255
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"port": 0}, "it has no port"),
        ({"addresses": ()}, "it has no usable IPv4 address"),
        ({"addresses": ("0.0.0.0", "224.0.0.251", "255.255.255.255")}, "it has no usable IPv4 address"),
        ({"txt_size": 1025}, "its TXT record is 1025 bytes long"),
        ({"txt": {b"txtvers": b"2"}}, "its txtvers is not 1"),
        ({"txt": {b"txtvers": None}}, "its txtvers is not 1"),
        ({"txt": {b"bus": None}}, "it names no bus"),
        *(
            ({"txt": {b"id": value}}, "its id is not 16 hexadecimal digits")
            for value in (
                None, b"", b"0123456789abcde", b"0123456789abcdef0", b"0123456789ABCDEF", b"0x23456789abcdef",
                b"0123456789abcdef\n",
            )
        ),
        *(
            ({"txt": {b"pub": value}}, "its pub is not a number from 1 to 65535")
            for value in (
                None, b"", b"0", b"65536", b"-1", b"+1", b"01", b" 1", b"1\n", b"1_0", b"\xd9\xa1", b"9" * 5000
            )
        ),
        ({"txt": {b"pv": b"0"}}, "its pv is not a number from 1 to 255"),
        ({"txt": {b"pv": b"256"}}, "its pv is not a number from 1 to 255"),
        ({"txt": {b"epoch": b"18446744073709551616"}}, "its epoch is not a number from 0 to 18446744073709551615"),
        ({"txt": {b"epoch": b""}}, "its epoch is not a number from 0 to 18446744073709551615"),
    ],
)  # fmt: skip
def test_each_field_is_checked(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        discovery._validated(announcement(**changes))


def test_the_addresses_of_one_peer_are_limited_and_in_order() -> None:
    many = tuple(f"10.0.0.{number}" for number in range(200, 0, -1))
    found = discovery._validated(announcement(addresses=many))
    assert found.host_addresses == tuple(f"10.0.0.{number}" for number in range(1, 17))


KEYS = st.sampled_from([b"txtvers", b"id", b"pub", b"pv", b"bus", b"epoch", b"other"])
VALUES = st.none() | st.binary(max_size=30) | st.text("0123456789abcdef", max_size=21).map(str.encode)


@given(st.dictionaries(KEYS, VALUES), st.integers(0, 0xFFFF), st.lists(st.ip_addresses(v=4).map(str), max_size=40))
def test_nothing_from_the_network_gets_past_its_limits(
    fields: dict[bytes, bytes | None], port: int, addresses: list[str]
) -> None:
    try:
        found = discovery._validated(announcement(txt=fields, port=port, addresses=tuple(addresses)))
    except ValueError:
        return
    assert 0 <= found.origin < 2**64
    assert 1 <= found.inbox_port <= 65535
    assert 1 <= found.pub_port <= 65535
    assert 0 <= found.epoch < 2**64
    assert 1 <= found.version <= 255
    assert 1 <= len(found.host_addresses) <= 16


# --- names and warnings --------------------------------------------------------------------------


@pytest.mark.parametrize("bus", ["default", "b", "Köln Süd", "a" * 63, "é" * 31])
def test_names_a_bus_may_have(bus: str) -> None:
    assert check_bus(bus) == bus


@pytest.mark.parametrize(
    ("bus", "reason"),
    [
        ("", "is 0 bytes long"),
        ("a" * 64, "is 64 bytes long"),
        ("é" * 32, "is 64 bytes long"),
        ("a\nb", "control character"),
        ("a\x7f", "control character"),
        ("a\x85", "control character"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_names_a_bus_may_not_have(bus: str, reason: str) -> None:
    with pytest.raises(SetupError, match=reason):
        check_bus(bus)
    with pytest.raises(SetupError, match=reason):
        Discovery(
            bus=bus,
            origin=1,
            inbox_port=1,
            pub_port=2,
            epoch=0,
            addresses=[],
            on_found=lambda _: None,
            on_gone=lambda _: None,
            on_warning=lambda _: None,
        )


def test_warnings_cannot_be_made_into_a_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(clock, "now", lambda: now)
    told: list[str] = []
    warnings = discovery.Warnings(told.append, "mDNS: ")

    warnings.say("one", "first")
    warnings.say("one", "again")
    assert told == ["mDNS: first"]
    for number in range(10_000):
        warnings.say(f"source {number}", "flood")
    assert len(told) == discovery.WARNINGS_PER_MINUTE

    now = 61.0
    warnings.say("one", "too soon")
    warnings.say("two", "a minute later")
    assert told[-1] == "mDNS: a minute later"
    now = 601.0
    warnings.say("one", "ten minutes later")
    assert told[-1] == "mDNS: ten minutes later"

    while now < 10_000:
        now += 60.0
        for number in range(discovery.WARNINGS_PER_MINUTE):
            warnings.say(f"{now} {number}", "steady")
    assert len(warnings._told_at) <= discovery.WARNED_MAX


def test_a_warning_is_one_printable_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    discovery.Warnings(told.append, "mDNS: ").say("x", "\x1b[31mred\nline" + "é" * 1000)
    assert told[0].startswith("mDNS: ?[31mred?lineéé")
    assert len(told[0]) == len("mDNS: ") + discovery.WARNING_CHARACTERS_MAX


# --- what a peer says of itself in HELLO ---------------------------------------------------------

NETWORK = [Address("10.0.0.1", 24, "eth0")]
LOOPBACK = [Address("127.0.0.1", 8, "lo")]


@pytest.mark.parametrize(
    ("said", "local", "expected"),
    [
        (["tcp://10.9.0.2:5", "tcp://10.0.0.2:5"], NETWORK, ["tcp://10.0.0.2:5", "tcp://10.9.0.2:5"]),
        (["tcp://127.0.0.1:5", "tcp://10.0.0.2:5"], NETWORK, ["tcp://10.0.0.2:5"]),
        (["tcp://127.0.0.1:5"], NETWORK, []),
        (["tcp://127.0.0.1:5", "tcp://10.0.0.2:5"], LOOPBACK, ["tcp://127.0.0.1:5"]),
        (["junk", "tcp://[::1]:5", "tcp://10.0.0.2:99999", "tcp://10.0.0.3:5"], NETWORK, ["tcp://10.0.0.3:5"]),
        (["tcp://somewhere.example:5"], NETWORK, []),
        ([], NETWORK, []),
    ],
)
def test_of_a_peers_endpoints_only_those_that_can_be_its_own_are_dialled(
    said: list[str], local: list[Address], expected: list[str]
) -> None:
    assert discovery.to_dial(said, local) == expected
