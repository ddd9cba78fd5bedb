"""`zmqbus push`: push values, or the lines of standard input, each as a job for one worker.

A forwarder that claims the queue takes them over. Without one they are held in this process, which therefore stays
until workers have done all of them; what they gave up has no other place either, so that it is told in the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Any

import click

from zmqbus.cli import shell
from zmqbus.cli.pubsub.confirming import CONFIRM, CONFIRM_STOPPED, LOOK, PATIENT, Durably, leave
from zmqbus.cli.shell import remark, stopping
from zmqbus.cli.shell.bus import Bus, Duration, Rate, Watch, Whole
from zmqbus.cli.shell.input import paced, parse_headers, values_of
from zmqbus.cli.shell.output import plural
from zmqbus.errors import BufferFull, NotDurable
from zmqbus.net.clock import now
from zmqbus.protocol.queues.letters import DEAD_PREFIX
from zmqbus.protocol.topics import encode_topic

if TYPE_CHECKING:
    from zmqbus.node.events import Undelivered
    from zmqbus.node.faces.node import Node


class Jobs:
    """What is pushed on one queue, and what has become of it."""

    def __init__(self, node: Node, watch: Watch, queue: str, timeout: float | None) -> None:
        """`timeout`: seconds that a wait for workers, or for room, may last; None: no limit."""
        self.pushed = self.done = self.given_up = 0
        """… by workers, of what was held here. What a forwarder took over, it knows."""
        self.left = 0
        """Held here, or on its way to a forwarder."""
        self._node = node
        self._watch = watch
        self._queue = queue
        self._timeout = inf if timeout is None else timeout

    def push(self, value: Any, headers: dict[str, str] | None, delay: float | None) -> None:
        """One value. Raises BufferFull, if there was no room in time."""
        until = now() + self._timeout
        while True:
            patience = min(until - now(), stopping.PEEK)
            try:
                self._node.push(self._queue, value, headers=headers, delay=delay, timeout=max(0.0, patience))
                self.pushed += 1
                return
            except BufferFull:
                stopping.check()
                self._watch.poll()
                if now() >= until:
                    raise

    def settle(self) -> bool:
        """Until nothing is left. False: that was not so in time."""
        began = now()
        said = False
        while self._look():
            self._watch.poll()
            if now() >= began + self._timeout:
                return False
            if not said and now() >= began + PATIENT:
                said = True
                nobody = "" if self._workers else f"; nobody pulls {self._queue}"
                remark(f"waiting for {plural(self.left, 'job')} to be done{nobody}; Ctrl-C ends")
            stopping.rest(LOOK)
        return True

    def _look(self) -> int:
        from zmqbus.node.faces.asking import own_queues

        figures = [one for one in own_queues(self._node) if one.topic == self._queue and not one.group]
        self.done = sum(one.done for one in figures)
        self.given_up = sum(one.dead for one in figures)
        self._workers = sum(one.workers for one in figures)
        unacked = int(self._node.statistics()["messages_unacked"])
        self.left = unacked + sum(one.waiting + one.in_flight for one in figures)
        return self.left

    def report(self, late: Sequence[Undelivered], durable: bool) -> tuple[str, int]:
        """What became of it all, as far as is known in the end, and the exit code."""
        held = sum(one.unacked for one in late if one.peer == f"queue {self._queue}")
        unacked = sum(one.unacked for one in late if one.peer == "forwarder")
        text = f"pushed {plural(self.pushed, 'job')} on {self._queue}"
        if unacked:
            return f"{text}; {unacked:,} not known to be on a forwarder's disk", shell.TIMED_OUT
        if held:
            return f"{text}; {held:,} not done, and given up with this process", shell.TIMED_OUT
        taken = self.pushed - self.done - self.given_up
        facts = []
        if self.done:
            facts.append("all done" if self.done == self.pushed else f"{self.done:,} done")
        if self.given_up:
            facts.append(f"{self.given_up:,} given up by workers, and kept nowhere")
        if taken:
            facts.append(f"{'all' if taken == self.pushed else f'{taken:,}'} on a forwarder's disk")
        return ", ".join([text, *facts]), shell.FAILED if self.given_up else shell.OK
