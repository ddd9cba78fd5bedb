"""The IPv4 addresses of this machine: which exist, which to announce, and which of a peer's to dial.

Reads the kernel's list of interfaces; opens no connection and changes nothing. IPv4 only, as the bus is.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

import ifaddr

from zmqbus.errors import SetupError

# From linux/sockios.h and linux/if.h; other systems number them differently and are not asked.
_SIOCGIFFLAGS = 0x8913
_UP = 0x01 | 0x40  # IFF_UP, switched on; IFF_RUNNING, has a carrier: the cable is in, the access point joined
_LINK_OR_ADDRESS = 0x01 | 0x10  # RTMGRP_LINK | RTMGRP_IPV4_IFADDR of linux/rtnetlink.h
_IFREQ = struct.Struct("16sH22x")  # struct ifreq: the name, the flags, the rest of its union

LOOKS = 3  # at a list that lacks something, at most

ALONE = "no interface but loopback is up, so that only nodes on this machine can be reached until one is"


class Address(NamedTuple):
    """One IPv4 address of this machine."""

    ip: str
    """Dotted quad."""
    prefix_length: int
    """Bits of `ip` that name its subnet: 24 for 255.255.255.0."""
    interface: str
    """The interface that carries it: "eth0"."""


def local_addresses() -> list[Address]:
    """Every IPv4 address configured on this machine, up or down, loopback included, in the kernel's order."""
    return [
        Address(ip.ip, ip.network_prefix, adapter.name)
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
        if isinstance(ip.ip, str)  # IPv6 addresses are tuples
    ]


@lru_cache(maxsize=8192)  # asked of the same few addresses again and again, n³ times when n nodes boot together
def is_loopback(ip: str) -> bool:
    """Whether `ip` is in 127.0.0.0/8. False for anything that is no IPv4 address, such as a host name."""
    try:
        return IPv4Address(ip).is_loopback
    except ValueError:
        return False


def resolve_interface(spec: str) -> str:
    """The IPv4 address that `spec` means: an address of this machine, or the first of a named interface.

    Raises SetupError, listing what there is, when `spec` is neither.
    """
    addresses = local_addresses()
    for address in addresses:
        if spec in (address.ip, address.interface):
            return address.ip
    there_are = ", ".join(f"{address.interface} {address.ip}" for address in addresses) or "none"
    raise SetupError(f"no IPv4 address or interface {spec!r} on this machine; there are: {there_are}")


def advertisable(interface: str | None) -> list[str]:
    """The addresses to announce: the one `interface` means, or every non-loopback address that is up.

    An empty list means that this machine has no network now. Raises SetupError as `resolve_interface` does.
    """
    if interface is not None:
        return [resolve_interface(interface)]
    return _distinct(_usable(None))


class AddressWatch:
    """The addresses that a node uses; notices that some came, went or changed, when polled. Knows no timer.

    They are that of `interface`, or without one all but loopback, or, as long as that is nothing, loopback: a machine
    without a network still has a bus of its own.

    `addresses` is the present list and `local` the same with subnets; begin from `addresses` rather than from
    a separate call of `advertisable`, or a change in between goes unseen. An interface that is down or gone
    has no addresses here, so that its return is a change. One poll costs 0.7 ms.
    """

    def __init__(self, interface: str | None) -> None:
        self._interface = interface
        self.local: list[Address] = _to_use(interface)

    @property
    def addresses(self) -> list[str]:
        """The addresses to announce now; [] while there is nothing at all."""
        return _distinct(self.local)

    @property
    def is_offline(self) -> bool:
        """Whether loopback stands in for a network that is not there."""
        return self._interface is None and all(is_loopback(address.ip) for address in self.local)

    @property
    def is_behind(self) -> bool:
        """Whether a network has come up since the last poll, while loopback stood in. It looks, as a poll does."""
        return self.is_offline and bool(_usable(None))

    @property
    def trouble(self) -> str | None:
        """What is wrong with the network, in one line for a person."""
        if self.local:
            return f"no network: {ALONE}" if self.is_offline else None
        if self._interface is None:
            return "no network: no interface is up, not even loopback (switch that on: ip link set lo up)"
        if is_loopback(self._interface):
            return "no network: loopback is down, so that no node can be reached (switch it on: ip link set lo up)"
        return f"no network: {self._interface} is down, so that no other node can be reached until it is up"

    def poll(self) -> list[str] | None:
        """The new list when it differs from the last one seen (order does not count), else None."""
        try:
            current = _to_use(self._interface)
            for _ in range(LOOKS):
                if set(self.local) <= set(current):
                    break
                # A list that is read while interfaces change may lack some. What is gone is gone at a second look, too.
                before, current = current, _to_use(self._interface)
                if set(before) == set(current):
                    break
        except OSError:
            return None  # out of memory or descriptors: no news, ask again next time
        if set(current) == set(self.local):
            return None
        self.local = current
        return self.addresses


class NetworkNews:
    """A descriptor that is readable when an interface or an address of this machine may have changed; rtnetlink(7).

    To poll every second or two instead would cost more than it seems: beside a thread that computes, each of the
    hundred small calls that list the addresses waits for the interpreter's lock, 5 ms a time.
    """

    def __init__(self) -> None:
        """Raises OSError where the system has nothing of the kind."""
        if sys.platform != "linux":
            raise OSError("rtnetlink is Linux's")
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._netlink.setblocking(False)
        try:
            self._netlink.bind((0, _LINK_OR_ADDRESS))
        except OSError:
            self._netlink.close()
            raise

    def fileno(self) -> int:
        """The descriptor."""
        return self._netlink.fileno()

    def clear(self) -> None:
        """Take in what there is; it is not looked at. Then poll."""
        while True:
            try:
                self._netlink.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # more happened than fits: news all the same
                    raise

    def close(self) -> None:
        """Let go of the descriptor."""
        self._netlink.close()


def best_candidate(candidates: Sequence[str], local: Sequence[Address]) -> list[str]:
    """The addresses a peer advertises, in the order to dial them; those not worth dialling left out.

    `local` are the addresses this node uses (`AddressWatch.local`). A node on loopback dials only loopback,
    every other node never does: a remote's 127.0.0.1 is not the remote. Addresses on a subnet we share come
    first. An address that is also ours comes last unless all are ours (a peer on this machine): every
    machine with containers has 172.17.0.1 on its inner bridge, and dialling it reaches ourselves.
    """
    ours = {address.ip for address in local}
    if ours and all(map(is_loopback, ours)):
        return [ip for ip in candidates if is_loopback(ip)]
    usable = [ip for ip in candidates if _is_dialable(ip)]
    networks = [IPv4Network((address.ip, address.prefix_length), strict=False) for address in local]
    on_this_machine = ours.issuperset(usable)

    def rank(ip: str) -> int:
        if ip in ours and not on_this_machine:
            return 2
        return 0 if any(IPv4Address(ip) in network for network in networks) else 1

    return sorted(usable, key=rank)


def _is_dialable(ip: str) -> bool:
    try:
        address = IPv4Address(ip)
    except ValueError:
        return False
    # is_reserved is 240.0.0.0/4 and so includes the broadcast address
    return not (address.is_loopback or address.is_unspecified or address.is_multicast or address.is_reserved)


def _usable(interface: str | None) -> list[Address]:
    """What `advertisable` announces, as far as it exists and is up at this moment."""
    if interface is None:
        chosen = [address for address in local_addresses() if not is_loopback(address.ip)]
    else:
        chosen = [a for a in local_addresses() if interface in (a.ip, a.interface)][:1]
    up = _up(address.interface for address in chosen)
    return [address for address in chosen if address.interface in up]


def _to_use(interface: str | None) -> list[Address]:
    """What an AddressWatch is to see."""
    return _usable(interface) or (_usable("127.0.0.1") if interface is None else [])


def loopback_is_up() -> bool:
    """Whether programs of this machine can talk to each other; also by its other addresses, which are routed there."""
    return bool(_usable("127.0.0.1"))


def _distinct(addresses: Iterable[Address]) -> list[str]:
    return list(dict.fromkeys(address.ip for address in addresses))


def _up(interfaces: Iterable[str]) -> set[str]:
    """Those of `interfaces` that are switched on and have a carrier. All, where the system cannot be asked."""
    names = set(interfaces)
    if sys.platform != "linux":
        return names
    up = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in names:
            try:
                reply = fcntl.ioctl(probe, _SIOCGIFFLAGS, _IFREQ.pack(name.encode(), 0))
            except OSError:
                continue  # it vanished after it was listed
            if _IFREQ.unpack(reply)[1] & _UP == _UP:
                up.add(name)
    return up
