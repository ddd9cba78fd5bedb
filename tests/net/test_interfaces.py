"""Addresses: the choosing on made-up machines, the reading on this one and, in namespaces, on one that changes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import ifaddr
import pytest

from tests.netns import Host, Lan
from zmqbus.errors import SetupError
from zmqbus.net import interfaces
from zmqbus.net.interfaces import (
    Address,
    AddressWatch,
    advertisable,
    best_candidate,
    is_loopback,
    local_addresses,
    loopback_is_up,
    resolve_interface,
)

LO = Address("127.0.0.1", 8, "lo")
WIRE = Address("192.168.1.10", 24, "eth0")
RADIO = Address("192.168.7.20", 24, "wlan0")
BRIDGE = Address("172.17.0.1", 16, "docker0")


class Machine:
    """Stands in for the kernel: what `interfaces` sees is what these lists say."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self.addresses = list(addresses)
        self.down: set[str] = set()

    def get_adapters(self) -> list[ifaddr.Adapter]:
        v6 = ifaddr.IP(("fe80::1", 0, 2), 64, "eth0")
        return [
            ifaddr.Adapter(a.interface, a.interface, [v6, ifaddr.IP(a.ip, a.prefix_length, "")]) for a in self.addresses
        ]

    def up(self, names: Sequence[str]) -> set[str]:
        return set(names) - self.down


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine([LO, WIRE, RADIO])
    monkeypatch.setattr(ifaddr, "get_adapters", machine.get_adapters)
    monkeypatch.setattr(interfaces, "_up", machine.up)
    return machine


def test_this_machine_has_a_loopback_that_is_up() -> None:
    assert LO.ip in [address.ip for address in local_addresses()]
    assert AddressWatch("127.0.0.1").addresses == ["127.0.0.1"]
    assert all(not is_loopback(ip) for ip in advertisable(None))


@pytest.mark.parametrize(
    ("ip", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("128.0.0.1", False),
        ("0.0.0.0", False),
        ("localhost", False),
        ("", False),
    ],
)
def test_is_loopback(ip: str, loopback: bool) -> None:
    assert is_loopback(ip) is loopback


def test_an_interface_is_given_by_address_or_by_name(machine: Machine) -> None:
    assert resolve_interface("192.168.7.20") == "192.168.7.20"
    assert resolve_interface("eth0") == "192.168.1.10"
    assert advertisable("eth0") == ["192.168.1.10"]
    assert advertisable("127.0.0.1") == ["127.0.0.1"]


@pytest.mark.parametrize("spec", ["eth7", "192.168.1.11", "192.168.1.010", "example.org", ""])
def test_an_unknown_interface_is_refused_with_what_there_is(machine: Machine, spec: str) -> None:
    with pytest.raises(SetupError) as caught:
        resolve_interface(spec)
    assert str(caught.value) == (
        f"no IPv4 address or interface {spec!r} on this machine; "
        "there are: lo 127.0.0.1, eth0 192.168.1.10, wlan0 192.168.7.20"
    )


def test_everything_but_loopback_that_is_up_is_announced(machine: Machine) -> None:
    assert advertisable(None) == ["192.168.1.10", "192.168.7.20"]
    machine.down.add("wlan0")
    assert advertisable(None) == ["192.168.1.10"]
    machine.addresses = [LO]
    assert advertisable(None) == []


def test_the_watch_reports_each_change_once(machine: Machine) -> None:
    watch = AddressWatch(None)
    assert watch.addresses == ["192.168.1.10", "192.168.7.20"]
    assert watch.poll() is None

    machine.down.add("eth0")
    assert watch.poll() == ["192.168.7.20"]
    assert watch.poll() is None

    machine.addresses = []
    assert watch.poll() == []
    assert watch.poll() is None

    machine.down.clear()
    machine.addresses = [LO, WIRE, RADIO]
    assert watch.poll() == ["192.168.1.10", "192.168.7.20"]
    assert watch.local == [WIRE, RADIO]


def test_without_a_network_loopback_stands_in(machine: Machine) -> None:
    machine.down |= {"eth0", "wlan0"}
    watch = AddressWatch(None)
    assert watch.addresses == ["127.0.0.1"]
    assert watch.is_offline
    assert "only nodes on this machine" in str(watch.trouble)
    assert not watch.is_behind
    machine.down.clear()
    assert watch.is_behind  # before the poll that will tell
    assert watch.addresses == ["127.0.0.1"]
    assert watch.poll() == ["192.168.1.10", "192.168.7.20"]
    assert (watch.is_offline, watch.is_behind, watch.trouble) == (False, False, None)


def test_who_asked_for_loopback_is_not_offline(machine: Machine) -> None:
    watch = AddressWatch("127.0.0.1")
    assert (watch.is_offline, watch.is_behind, watch.trouble) == (False, False, None)


@pytest.mark.parametrize(
    ("interface", "advice"),
    [(None, "not even loopback"), ("127.0.0.1", "ip link set lo up"), ("eth0", "no network: eth0 is down")],
)
def test_no_interface_at_all_is_told(machine: Machine, interface: str | None, advice: str) -> None:
    machine.down |= {"lo", "eth0", "wlan0"}
    watch = AddressWatch(interface)
    assert watch.addresses == []
    assert advice in str(watch.trouble)
    assert not loopback_is_up()


def test_the_watch_does_not_mind_the_order(machine: Machine) -> None:
    watch = AddressWatch(None)
    machine.addresses.reverse()
    assert watch.poll() is None


def test_the_watch_of_one_interface_sees_only_that(machine: Machine) -> None:
    watch = AddressWatch("eth0")
    machine.addresses = [LO, WIRE]
    assert watch.poll() is None
    machine.addresses = [LO, WIRE._replace(ip="192.168.1.77")]
    assert watch.poll() == ["192.168.1.77"]
    machine.addresses = [LO]
    assert watch.poll() == []


def test_the_watch_keeps_what_it_has_while_the_kernel_cannot_be_asked(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[ifaddr.Adapter]:
        raise OSError(24, "Too many open files")

    watch = AddressWatch(None)
    monkeypatch.setattr(ifaddr, "get_adapters", fail)
    assert watch.poll() is None
    assert watch.addresses == ["192.168.1.10", "192.168.7.20"]


@pytest.mark.parametrize(
    ("candidates", "local", "expected"),
    [
        # a subnet we share comes first, otherwise the peer's order stays
        (["10.0.0.5", "192.168.1.30"], [WIRE], ["192.168.1.30", "10.0.0.5"]),
        (["10.0.0.5", "10.1.0.5"], [WIRE], ["10.0.0.5", "10.1.0.5"]),
        (["192.168.7.9", "192.168.1.9"], [WIRE, RADIO], ["192.168.7.9", "192.168.1.9"]),
        # a remote's loopback is not the remote
        (["127.0.0.1", "192.168.1.30"], [WIRE], ["192.168.1.30"]),
        (["127.0.0.1"], [WIRE], []),
        (["127.0.0.1"], [], []),
        # a node on loopback stays there
        (["127.0.0.1", "192.168.1.30"], [LO], ["127.0.0.1"]),
        (["192.168.1.30"], [LO], []),
        # every container host has 172.17.0.1: dialling it would reach ourselves …
        (["172.17.0.1", "10.0.0.5"], [WIRE, BRIDGE], ["10.0.0.5", "172.17.0.1"]),
        (["172.17.0.1", "192.168.1.30"], [WIRE, BRIDGE], ["192.168.1.30", "172.17.0.1"]),
        # … unless the peer lives on this machine
        (["172.17.0.1", "192.168.1.10"], [WIRE, BRIDGE], ["172.17.0.1", "192.168.1.10"]),
        # what nobody can dial
        (["0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "host", "10.0.0.5"], [WIRE], ["10.0.0.5"]),
        ([], [WIRE], []),
    ],
)
def test_best_candidate(candidates: list[str], local: list[Address], expected: list[str]) -> None:
    assert best_candidate(candidates, local) == expected


# --- on machines whose addresses change ----------------------------------------------------------

WATCHER = """
import sys
from zmqbus.net.interfaces import AddressWatch, advertisable
watch = AddressWatch(sys.argv[1] or None)
print(watch.addresses, flush=True)
for _ in sys.stdin:
    print(watch.poll(), flush=True)
"""


class Watcher:
    """An AddressWatch in a process of its own on `host`."""

    def __init__(self, host: Host, interface: str) -> None:
        self._process: Any = host.popen(
            [sys.executable, "-c", WATCHER, interface], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self) -> str:
        return str(self._process.stdout.readline()).strip()

    def poll(self) -> str:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.read()


@pytest.mark.netns
@pytest.mark.parametrize("interface", ["", "eth0"])
def test_the_watch_follows_links_and_addresses(interface: str) -> None:
    with Lan(hosts=1) as lan:
        (host,) = lan.hosts
        watcher = Watcher(host, interface)
        assert watcher.read() == "['10.77.0.1']"
        assert watcher.poll() == "None"

        host.link_down()
        assert watcher.poll() == ("[]" if interface else "['127.0.0.1']")
        host.link_up()
        assert watcher.poll() == "['10.77.0.1']"

        host.set_address("10.77.0.1", "10.77.0.9")
        assert watcher.poll() == "['10.77.0.9']"
        assert watcher.poll() == "None"


LISTENER = """
import socket, sys
server = socket.create_server((sys.argv[1], 7000))
print("listening", flush=True)
while True:
    server.accept()[0].close()
"""

DIALLER = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2])).close()
    print("reached")
except TimeoutError:
    print("silence")
"""


@pytest.mark.netns
def test_the_namespaces_of_the_tests_are_a_lan() -> None:
    with Lan(hosts=3, subnet="10.78.5.0/24") as lan:
        a, b, c = lan.hosts
        assert [host.address for host in lan.hosts] == ["10.78.5.1", "10.78.5.2", "10.78.5.3"]
        server: Any = b.popen([sys.executable, "-c", LISTENER, b.address], stdout=subprocess.PIPE, text=True)
        assert server.stdout.readline() == "listening\n"

        def dial(host: Host, patience_s: float) -> str:
            return host.run([sys.executable, "-c", DIALLER, b.address, str(patience_s)]).stdout.strip()

        assert dial(a, 10) == "reached"
        a.block(b)
        assert dial(a, 0.3) == "silence"
        assert dial(c, 10) == "reached"
        a.unblock(b)
        assert dial(a, 10) == "reached"
    assert server.returncode is not None
    assert subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.count(a.namespace) == 0


def test_a_list_that_lacked_an_address_for_a_moment_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = interfaces.AddressWatch("127.0.0.1")
    present = watch.local
    looks = iter([[], present, present])
    monkeypatch.setattr(interfaces, "_to_use", lambda interface: next(looks))
    assert watch.poll() is None
    monkeypatch.setattr(interfaces, "_to_use", lambda interface: [])
    assert watch.poll() == []
    monkeypatch.setattr(interfaces, "_to_use", lambda interface: present)
    assert watch.poll() == ["127.0.0.1"]
