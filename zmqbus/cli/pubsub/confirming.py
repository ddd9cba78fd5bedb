"""Waiting for those who are to have what was sent: a forwarder's disk, and subscribers before we leave.

With `--durable` messages are sent one after the other without waiting, and waited for together: all of them in the
end, and before that whenever so much is on its way that the node's buffer might fill up. Sending itself never waits
then, so that Ctrl-C is always heard.
"""

from __future__ import annotations

from math import inf
from threading import Thread
from typing import TYPE_CHECKING, Any

import msgspec

from zmqbus.cli.shell import remark, stopping
from zmqbus.cli.shell.bus import Bus, Watch
from zmqbus.cli.shell.output import plural
from zmqbus.errors import NotDurable
from zmqbus.net.clock import now
from zmqbus.protocol.streams.acks import NO_ROOM, UNCLAIMED
from zmqbus.protocol.topics import Matcher

if TYPE_CHECKING:
    from zmqbus.node.events import Undelivered
    from zmqbus.node.faces.node import Node

CONFIRM = 5.0  # how long subscribers have to confirm, before we leave and take the history with us
CONFIRM_STOPPED = 1.0  # … when asked to stop
CLAIM = 5.0  # that a forwarder may take to be there, when nothing was said about waiting: it may be starting
LOOK = 0.02  # between two looks for one
PATIENT = 2.0  # it is said what is waited for after this
UNACKED_BYTES_MAX = 8 * 1024 * 1024  # on their way to a forwarder's disk; an eighth of the node's buffer
UNACKED_MAX = 20_000  # messages, which are rarely smaller than the rest of that


class Durably:
    """Waits for the disk of a forwarder now and then, for who sends on one topic without waiting."""

    def __init__(self, node: Node, topic: str, watch: Watch, timeout: float | None) -> None:
        """Each wait lasts at most `timeout` seconds; None: no limit, except that a forwarder has to be found soon."""
        self.unknown = 0
        """Messages, the last of them, that are not known to be on a disk; as of the last wait."""
        self._node = node
        self._topic = topic
        self._watch = watch
        self._timeout = timeout
        self._bytes = 0

    def await_forwarder(self) -> bool:
        """Until one claims the topic. False: none did in time."""
        until = now() + (CLAIM if self._timeout is None else self._timeout)
        while not any(peer.journal and Matcher(peer.claims).matches(self._topic) for peer in self._node.peers()):
            self._watch.poll()
            if now() >= until:
                return False
            stopping.rest(LOOK)
        return True

    def nobody(self, done: str, bus: Bus) -> None:
        """Say that none did, and what was not `done` therefore."""
        if not self._watch.refused:
            start = "zmqbus forwarder --journal DIR"
            remark(f"nothing {done}: no forwarder on bus {bus.name!r} claims {self._topic}; start one: {start}")

    def sent(self, value: Any) -> None:
        """A value was sent; waits if much is on its way by now. Raises NotDurable then, if that is in vain."""
        self.unknown += 1
        self._bytes += len(value) if isinstance(value, str | bytes) else len(msgspec.msgpack.encode(value))
        if self._bytes >= UNACKED_BYTES_MAX or self.unknown >= UNACKED_MAX:
            self.settle()

    def settle(self, patience: float | None = None) -> None:
        """Until everything is on disk. `patience`: in place of the timeout, and not to be interrupted.

        Raises:
            NotDurable: it was not in time, or cannot be for now.
        """
        limit = self._timeout if patience is None else patience
        began = now()
        until = inf if limit is None else began + limit
        said = patience is not None
        while self.unknown:
            if patience is None:
                stopping.check()
            left = until - now()
            try:
                self._node.flush(max(0.0, min(left, stopping.PEEK)))
                self._bytes = self.unknown = 0
            except NotDurable as error:
                self.unknown = min(self.unknown, error.unacked or self.unknown)
                self._watch.poll()
                if error.reason in (NO_ROOM, UNCLAIMED):
                    raise
                if left <= stopping.PEEK:
                    raise NotDurable(self.unknown, f"no acknowledgement within {limit:g} s") from None
                if not said and now() >= began + PATIENT:
                    said = True
                    remark(f"waiting for {plural(self.unknown, 'message')} to be on a forwarder's disk; Ctrl-C ends")


def leave(node: Node, patience: float) -> list[Undelivered]:
    """Close the node; returns who had not confirmed everything. Raises Stopped if asked to stop meanwhile."""
    late: list[Undelivered] = []
    failed: list[Exception] = []

    def close() -> None:
        try:
            late.extend(node.close(patience))
        except Exception as error:
            failed.append(error)

    leaving = Thread(target=close, name="zmqbus leaving", daemon=True)
    leaving.start()
    while leaving.is_alive():
        leaving.join(stopping.PEEK)
        if patience > CONFIRM_STOPPED:  # else it was asked before
            stopping.check()
    if failed:
        raise failed[0]
    return late
