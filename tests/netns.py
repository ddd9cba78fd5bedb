"""A LAN of several hosts on one machine, for tests: network namespaces joined by a bridge. Linux, root, iproute2.

    @pytest.mark.netns
    def test_something() -> None:
        with Lan(hosts=2) as lan:                      # skips the test where namespaces cannot be made
            a, b = lan.hosts                           # 10.77.0.1 and 10.77.0.2, each on its own "eth0"
            server = b.popen([sys.executable, "-c", PROGRAM, b.address], stdout=subprocess.PIPE, text=True)
            out = a.run([sys.executable, "-c", OTHER_PROGRAM, b.address]).stdout
            a.link_down(); a.link_up()                 # pull the cable, put it back
            a.set_address("10.77.0.1", "10.77.0.9")    # what DHCP does at times; `a.address` follows
            a.block(b); a.unblock(b)                   # a partition between just these two

What it promises:
- Nothing touches the machine's own interfaces: hosts and bridge live in namespaces of their own, no address is
  routed outside, and names are unique (`zmqbus-<pid>-<random>-…`), so that runs may go on side by side.
- On leaving, also by an exception, all processes on its hosts are killed (only the test can have started them), and
  the namespaces are deleted. Only a SIGKILL of the test run leaves them; `ip netns del` removes them.
- Multicast works without a default route. The first packets flow as soon as the Lan is entered. There is no IPv6, so
  that a host sends nothing that no test asked for, but for ARP and the IGMP reports of groups joined.

The processes started by `popen` and `run` see only their host: its addresses, its ports, its /sys/class/net. Files,
pids and clocks (time.monotonic too) are those of the machine, so that times may be compared between hosts.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import pytest

INTERFACE = "eth0"
_MULTICAST = "224.0.0.0/4"
_NO_IPV6 = "/proc/sys/net/ipv6/conf/all/disable_ipv6"
_COMMAND_TIMEOUT_S = 20.0


class Lan:
    """A context manager: `hosts` machines on one switch, numbered from the first address of `subnet` on."""

    def __init__(self, hosts: int = 3, *, subnet: str = "10.77.0.0/24") -> None:
        self._network = ipaddress.IPv4Network(subnet)
        self._name = f"zmqbus-{os.getpid()}-{secrets.token_hex(3)}"
        self._switch = f"{self._name}-switch"
        self._count = hosts
        self._cleanup = contextlib.ExitStack()
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        with self._cleanup as unless_done:
            try:
                self._add_namespace(self._switch)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"cannot make network namespaces here: {getattr(error, 'stderr', None) or error}")
            _batch(
                self._switch,
                "link add br0 type bridge stp_state 0 mcast_snooping 0",
                "link set br0 up",
            )
            for number, ip in zip(range(1, self._count + 1), self._network.hosts(), strict=False):
                host = Host(f"{self._name}-h{number}", str(ip), self._network.prefixlen)
                self._add_namespace(host.namespace)
                self._cleanup.callback(host.kill_all)
                host.run(["sh", "-c", f"test ! -e {_NO_IPV6} || echo 1 > {_NO_IPV6}"])
                port = f"port{number}"
                # Made inside both namespaces at once: neither end is ever seen outside.
                _ip("link", "add", port, "netns", self._switch, "type", "veth",
                    "peer", "name", INTERFACE, "netns", host.namespace)  # fmt: skip
                _batch(self._switch, f"link set {port} master br0 up")
                _batch(
                    host.namespace,
                    "link set lo up",
                    f"addr add {host.address}/{host.prefix_length} dev {INTERFACE}",
                    f"link set {INTERFACE} up",
                    f"route add {_MULTICAST} dev {INTERFACE}",
                )
                self.hosts.append(host)
            self._cleanup = unless_done.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _add_namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._cleanup.callback(_ip, "netns", "del", name)


class Host:
    """One machine of a `Lan`. `address` is its present IPv4 address, `namespace` the name for `ip netns exec`."""

    def __init__(self, namespace: str, address: str, prefix_length: int) -> None:
        self.namespace = namespace
        self.address = address
        self.prefix_length = prefix_length
        self._processes: list[subprocess.Popen[Any]] = []

    def __repr__(self) -> str:
        return f"<Host {self.namespace} {self.address}>"

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program on this host; `options` as for subprocess.Popen, and the pid is the program's own. Leaving
        the Lan kills it and all its descendants, and closes its pipes."""
        process = subprocess.Popen(["ip", "netns", "exec", self.namespace, *argv], **options)
        self._processes.append(process)
        return process

    def run(self, argv: Sequence[str], *, timeout: float = _COMMAND_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Run a program on this host to its end and return its output. Raises CalledProcessError when it fails."""
        return _run(["ip", "netns", "exec", self.namespace, *argv], timeout=timeout)

    def link_down(self) -> None:
        """Switch the interface off. Its address stays, its routes and neighbours go."""
        _batch(self.namespace, f"link set {INTERFACE} down")

    def link_up(self) -> None:
        _batch(self.namespace, f"link set {INTERFACE} up", f"route replace {_MULTICAST} dev {INTERFACE}")

    def set_address(self, old: str, new: str) -> None:
        """Replace one address by another of the same subnet; connections from the old one die without a word."""
        _batch(
            self.namespace,
            f"addr del {old}/{self.prefix_length} dev {INTERFACE}",
            f"addr add {new}/{self.prefix_length} dev {INTERFACE}",
            f"route replace {_MULTICAST} dev {INTERFACE}",
        )
        if self.address == old:
            self.address = new

    def block(self, other: Host) -> None:
        """Silently drop all packets between this host and `other`, multicast too, under their present addresses.

        Both kernels drop what they receive from the other; nobody gets an error, TCP just hears nothing more.
        """
        for here, there in ((self, other), (other, self)):
            _batch(here.namespace, f"xfrm policy add dir in src {there.address}/32 dst 0.0.0.0/0 action block")

    def unblock(self, other: Host) -> None:
        """Undo `block`, before any change of address."""
        for here, there in ((self, other), (other, self)):
            _batch(here.namespace, f"xfrm policy delete dir in src {there.address}/32 dst 0.0.0.0/0")

    def sent_packets(self) -> int:
        """How many packets have left this host by its interface, of any kind."""
        return int(self.run(["cat", f"/sys/class/net/{INTERFACE}/statistics/tx_packets"]).stdout)

    def kill_all(self) -> None:
        """Kill every process on this host and reap those that `popen` started."""
        for process in self._processes:
            process.kill()  # also one that has not yet entered the namespace
        for pid in _run(["ip", "netns", "pids", self.namespace]).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for process in self._processes:
            process.wait(_COMMAND_TIMEOUT_S)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # unsent input of one that is dead
                        pipe.close()
        self._processes.clear()


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _batch(namespace: str, *commands: str) -> None:
    """Run several `ip` commands in one process; stops at the first that fails and raises CalledProcessError."""
    _run(["ip", "-n", namespace, "-batch", "-"], stdin="\n".join(commands) + "\n")


def _run(
    argv: Sequence[str], *, stdin: str = "", timeout: float = _COMMAND_TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=timeout, check=True)
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(argv)}\n{stdin}{error.stdout}{error.stderr}", file=sys.stderr)
        raise
