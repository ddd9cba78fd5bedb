"""Which forwarders are on the bus, and what they say of themselves. What a peer says is checked before it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from zmqbus.cli.messages.render import escape
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.bus import Bus, Watch, settle
from zmqbus.protocol import commands

if TYPE_CHECKING:
    from zmqbus.node.faces.node import Node
    from zmqbus.protocol.members.peers import Peer


class Figures(msgspec.Struct):
    """The counters of a forwarder. One of another release may lack some."""

    uptime_s: float = 0.0
    journal_path: str = ""
    journal_bytes: int = 0
    journal_bytes_max: int = 0
    journal_age_max_s: float = 0.0
    journal_on_full: str = ""
    journal_segments: int = 0
    journal_first_offset: int = 0
    journal_next_offset: int = 0
    journal_streams: int = 0
    journal_full: str = ""
    journal_messages: int = 0
    journal_messages_per_s: float = 0.0
    journal_bytes_in: int = 0
    journal_bytes_in_per_s: float = 0.0
    journal_unacked: int = 0
    commits: int = 0
    last_commit_s: float | None = None
    fsync_p50_ms: float = 0.0
    fsync_max_ms: float = 0.0
    readings: int = 0
    cursors: int = 0
    messages_lost: int = 0
    messages_repaired: int = 0


class Cursor(msgspec.Struct):
    """Where a durable subscription is, and whether somebody reads under its name at present."""

    name: str
    offset: int
    reading: bool


class Told(msgspec.Struct):
    """A forwarder, and what it said of itself; None where it said nothing."""

    peer: Peer
    figures: Figures | None
    cursors: list[Cursor]


def forwarders(node: Node, watch: Watch, name: str | None, wait: float, timeout: float) -> list[Told]:
    """Those on the bus, by name, and what they answer; with `name`, only those of that name or origin."""
    from zmqbus.node.faces.asking import ask

    settle(node, watch, wait)
    found = [peer for peer in node.peers() if peer.role == "forwarder" and (name is None or called(peer, name))]
    answers = ask(node, {peer.origin: commands.Stats() for peer in found}, timeout)
    told = []
    for peer in sorted(found, key=lambda peer: (peer.name, peer.origin)):
        answer = answers.get(peer.origin)
        figures, cursors = None, []
        if isinstance(answer, commands.Statistics):
            try:
                figures = msgspec.convert(answer.counters, Figures)
                cursors = [Cursor(*cursor) for cursor in answer.cursors]
            except msgspec.ValidationError as error:
                remark(f"{escape(peer.name)} gave an answer that makes no sense: {escape(str(error))}")
        else:
            remark(f"{escape(peer.name)} did not answer within {timeout:g} s")
        told.append(Told(peer, figures, cursors))
    return told


def called(peer: Peer, name: str) -> bool:
    """Whether this peer is meant by a name, or an origin as `nodes` prints it."""
    return name in (peer.name, f"{peer.origin:016x}")


def nobody(bus: Bus, name: str | None, others: Sequence[Peer]) -> None:
    """Say that there is no forwarder, or none of that name."""
    there = ", ".join(sorted(escape(peer.name) for peer in others if peer.role == "forwarder"))
    if name is not None and there:
        remark(f"no forwarder on bus {bus.name!r} is named {escape(name)}; there are: {there}")
    else:
        remark(f"no forwarder is on bus {bus.name!r}")
