"""What a node was asked to be, checked before anything is opened."""

from __future__ import annotations

import os
import socket as system
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from zmqbus.errors import SetupError
from zmqbus.net.discovery import check_bus
from zmqbus.net.interfaces import is_loopback, resolve_interface
from zmqbus.net.keys import BusKey
from zmqbus.net.sockets import NO_KEY, parse_endpoint
from zmqbus.protocol.streams.history import BUFFER_BYTES_MAX, HISTORY_BYTES_MAX

OUTBOX_BYTES_MAX = 1 << 30


class Config(NamedTuple):
    """What a node was asked to be, checked."""

    name: str
    bus: str
    key: BusKey | None
    interface: str | None
    peers: tuple[str, ...]
    mdns: bool
    history_bytes: int
    buffer_bytes: int
    acks: int
    outbox: str | None
    outbox_bytes: int

    @classmethod
    def make(
        cls,
        name: str | None,
        bus: str,
        key: str | Path | BusKey | None,
        interface: str | None,
        peers: Sequence[str],
        discovery: str,
        history_bytes: int | None,
        buffer_bytes: int | None,
        acks: int,
        outbox: str | Path | None,
        outbox_bytes: int | None,
    ) -> Config:
        """Check what a user gave.

        Raises:
            SetupError, KeyFileError
        """
        if name is None:
            name = f"{system.gethostname()}-{os.getpid()}"
        if not name or len(name) > 255 or not name.isprintable():
            raise SetupError(f"node name {name!r}: use 1 to 255 printable characters")
        check_bus(bus)
        if isinstance(peers, str):
            raise SetupError(f"peers is a list of endpoints, not one string: peers=[{peers!r}]")
        for peer in peers:
            host, _ = parse_endpoint(peer)
            if key is None and not is_loopback(host):
                raise SetupError(f"peer {peer} is not on this machine: {NO_KEY}")
        if discovery not in ("mdns", "static", "both"):
            raise SetupError(f"discovery={discovery!r}: use 'mdns', 'static' or 'both'")
        if key is not None and not isinstance(key, BusKey):
            key = BusKey.load(key)
        if interface is not None:
            interface = resolve_interface(interface)
        elif key is None:
            interface = "127.0.0.1"
        if key is None and interface is not None and not is_loopback(interface):
            raise SetupError(f"interface {interface} is open to the network: {NO_KEY}")
        history = HISTORY_BYTES_MAX if history_bytes is None else history_bytes
        buffer = BUFFER_BYTES_MAX if buffer_bytes is None else buffer_bytes
        kept = OUTBOX_BYTES_MAX if outbox_bytes is None else outbox_bytes
        limits = (
            ("history_bytes", 0, history),
            ("buffer_bytes", 0, buffer),
            ("acks", 1, acks),
            ("outbox_bytes", 1, kept),
        )
        for what, least, given in limits:
            if not isinstance(given, int) or given < least:
                raise SetupError(f"{what}={given!r}: use a whole number, {least} or more")
        path = None if outbox is None else str(outbox)
        mdns = discovery != "static"
        return cls(name, bus, key, interface, tuple(peers), mdns, history, buffer, acks, path, kept)
