"""What a command pushes on a queue, and what becomes of it: done by workers, taken over by a forwarder, or neither."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from zmqbus.cli import shell
from zmqbus.cli.pubsub.confirming import LOOK, PATIENT
from zmqbus.cli.shell import remark, stopping
from zmqbus.cli.shell.bus import Watch
from zmqbus.cli.shell.output import plural
from zmqbus.errors import BufferFull
from zmqbus.net.clock import now, sleep

if TYPE_CHECKING:
    from zmqbus.node.events import Undelivered
    from zmqbus.node.faces.node import Node


class Jobs:
    """What is pushed on one queue, and what has become of it as of the last look."""

    def __init__(self, node: Node, watch: Watch, queue: str, timeout: float | None) -> None:
        """`timeout`: seconds that a wait for workers, or for room, may last; None: no limit."""
        self._node = node
        self._watch = watch
        self._queue = queue
        self._timeout = inf if timeout is None else timeout
        self._pushed = 0
        self._held = self._unacked = 0  # by this process, and on their way to a forwarder
        self._done = self._workers = 0  # what became of those that were held here
        self.given_up = 0
        """… that became dead letters, held here as well."""

    def push(self, value: Any, headers: dict[str, Any] | None, delay: float | None = None) -> int:
        """One value; returns its seq. Raises BufferFull, if there was no room in time."""
        until = now() + self._timeout
        while True:
            try:
                patience = max(0.0, min(until - now(), stopping.PEEK))
                seq = self._node.push(self._queue, value, headers=headers, delay=delay, timeout=patience)
                self._pushed += 1
                return seq
            except BufferFull:
                stopping.check()
                self._watch.poll()
                if now() >= until:
                    raise

    def settle(self, patience: float | None = None) -> bool:
        """Until nothing is left: all is done, or a forwarder has it. False: that was not so in time.

        `patience`: in place of the timeout, and not to be interrupted.
        """
        until = now() + (self._timeout if patience is None else patience)
        said_at = now() + PATIENT
        while self.look():
            self._watch.poll()
            if now() >= until:
                return False
            if now() >= said_at:
                said_at = inf
                nobody = "" if self._workers or not self._held else f", but nobody pulls {self._queue}"
                remark(f"waiting for {plural(self._held + self._unacked, 'job')} to be done{nobody}; Ctrl-C ends")
            if patience is None:
                stopping.check()
            sleep(LOOK)
        return True

    def look(self) -> int:
        """How many are left: held here, or on their way to a forwarder."""
        from zmqbus.node.faces.asking import own_queues

        figures = [one for one in own_queues(self._node) if one.topic == self._queue and not one.group]
        self._held = sum(one.waiting + one.in_flight + one.delayed for one in figures)
        self._done = sum(one.done for one in figures)
        self.given_up = sum(one.dead for one in figures)
        self._workers = sum(one.workers for one in figures)
        self._unacked = int(self._node.statistics()["messages_unacked"])
        return self._held + self._unacked

    def report(self, late: Sequence[Undelivered]) -> tuple[str, int]:
        """What became of all that, when the node was closed, and the exit code."""
        held = sum(one.unacked for one in late if one.peer == f"queue {self._queue}")
        unacked = sum(one.unacked for one in late if one.peer == "forwarder")
        text = f"pushed {plural(self._pushed, 'job')} on {self._queue}"
        if held or unacked:
            lost = f"{held:,} not done, and held by nobody from now on" if held else ""
            unknown = f"{unacked:,} not known to be on a forwarder's disk" if unacked else ""
            return "; ".join(filter(None, (text, lost, unknown))), shell.TIMED_OUT
        done = self._done + self._held  # since the last look
        facts = {
            "done": done,
            "given up by workers, and kept by nobody": self.given_up,
            "on a forwarder's disk": self._pushed - done - self.given_up,
        }
        told = [f"{'all' if n == self._pushed > 1 else f'{n:,}'} {what}" for what, n in facts.items() if n > 0]
        return ", ".join([text, *told]), shell.FAILED if self.given_up else shell.OK
