"""`zmqbus push`: push values, or the lines of standard input, each as a job for one worker.

A forwarder that claims the queue takes them over. Without one they are held in this process, which therefore stays
until workers have done all of them; what they gave up has no other place either, so that it is told in the end.
"""

from __future__ import annotations

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
from zmqbus.net.clock import now, sleep
from zmqbus.protocol.topics import encode_topic

if TYPE_CHECKING:
    from zmqbus.node.events import Undelivered
    from zmqbus.node.faces.node import Node


STOPPED = 0.5  # seconds that workers have for what they are at, when the command is asked to stop


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
        self._done = self._given_up = self._workers = 0  # what became of those that were held here

    def push(self, value: Any, headers: dict[str, str] | None, delay: float | None) -> None:
        """One value. Raises BufferFull, if there was no room in time."""
        until = now() + self._timeout
        while True:
            try:
                patience = max(0.0, min(until - now(), stopping.PEEK))
                self._node.push(self._queue, value, headers=headers, delay=delay, timeout=patience)
                self._pushed += 1
                return
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
        while self._look():
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

    def _look(self) -> int:
        from zmqbus.node.faces.asking import own_queues

        figures = [one for one in own_queues(self._node) if one.topic == self._queue and not one.group]
        self._held = sum(one.waiting + one.in_flight + one.delayed for one in figures)
        self._done = sum(one.done for one in figures)
        self._given_up = sum(one.dead for one in figures)
        self._workers = sum(one.workers for one in figures)
        self._unacked = int(self._node.statistics()["messages_unacked"])
        return self._held + self._unacked

    def report(self, late: Sequence[Undelivered]) -> tuple[str, bool]:
        """What became of all that, when the node was closed, and whether it is as it should be."""
        held = sum(one.unacked for one in late if one.peer == f"queue {self._queue}")
        unacked = sum(one.unacked for one in late if one.peer == "forwarder")
        text = f"pushed {plural(self._pushed, 'job')} on {self._queue}"
        if held or unacked:
            lost = f"{held:,} not done, and held by nobody from now on" if held else ""
            unknown = f"{unacked:,} not known to be on a forwarder's disk" if unacked else ""
            return "; ".join(filter(None, (text, lost, unknown))), False
        done = self._done + self._held  # since the last look
        facts = {
            "done": done,
            "given up by workers, and kept by nobody": self._given_up,
            "on a forwarder's disk": self._pushed - done - self._given_up,
        }
        told = [f"{'all' if n == self._pushed > 1 else f'{n:,}'} {what}" for what, n in facts.items() if n > 0]
        return ", ".join([text, *told]), not self._given_up


@click.command()
@click.argument("queue")
@click.argument("values", nargs=-1, metavar="[VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Values and lines are JSON, not text.")
@click.option("-H", "--headers", multiple=True, metavar="KEY=VALUE", help="A header for every job; may be repeated.")
@click.option("--count", type=Whole(1), metavar="N", help="Push the values N times over.")
@click.option("--rate", type=Rate(), metavar="R", help="Push R jobs per second, not as fast as they come.")
@click.option(
    "--durable",
    is_flag=True,
    help="Push nothing before there is a forwarder that claims the queue, and do not end before everything is on its "
    "disk.",
)
@click.option("--delay", type=Duration(), metavar="DURATION", help="No worker gets a job before that time has passed.")
@click.option(
    "--timeout",
    type=Duration(),
    help="Wait no longer than this for workers, for room, and for a forwarder and its disk.",
)
@click.option("-q", "--quiet", is_flag=True, help="Do not say what was pushed; only what went wrong.")
@click.pass_obj
def push(
    bus: Bus,
    queue: str,
    values: tuple[str, ...],
    as_json: bool,
    headers: tuple[str, ...],
    count: int | None,
    rate: float | None,
    durable: bool,
    delay: float | None,
    timeout: float | None,
    quiet: bool,
) -> int:
    """Push values on a queue, each as a job for one worker.

    A forwarder that claims the queue takes them over. Without one they are held here: the command ends when workers
    have done all of them. With - for a value, or none and a pipe, each line of standard input is pushed.

    \b
    Examples:
      zmqbus push jobs.resize photo-7.jpg photo-8.jpg
      zmqbus push --durable --json jobs.mail < mails.ndjson
      zmqbus push jobs.remind --delay 1h 'time to go'
    """
    encode_topic(queue)
    marks = parse_headers(headers)
    source = paced(values_of(values, as_json, count, verb="push"), rate)
    with bus.join("push") as (node, watch):
        durably = Durably(node, queue, watch, timeout) if durable else None
        if durably is not None and not durably.await_forwarder():
            durably.nobody("pushed", bus)
            return shell.TIMED_OUT
        jobs, settled, failed = Jobs(node, watch, queue, timeout), None, ""
        try:
            for value in source:
                jobs.push(value, marks, delay)
                if durably is not None:
                    durably.sent(value)
            if durably is not None:
                durably.settle()
            settled = jobs.settle()
        except NotDurable as error:
            failed = f": {error.reason}"
        except BufferFull:
            failed = "; there was no room for more"
        finally:
            if settled is None:
                jobs.settle(STOPPED)
            code = _leave(node, jobs, CONFIRM if settled else CONFIRM_STOPPED, failed, quiet)
            watch.poll()
    return code


def _leave(node: Node, jobs: Jobs, patience: float, failed: str, quiet: bool) -> int:
    """Close the node, and say what became of it all. Returns the exit code."""
    try:
        late = leave(node, patience)
    except stopping.Stopped:
        remark(f"{jobs.report([])[0]}; interrupted before all subscribers had confirmed it")
        raise
    text, well = jobs.report(late)
    unsure = ", ".join(sorted(one.peer for one in late if not one.unacked))
    if unsure:
        text += f"; not confirmed within {patience:g} s by {unsure}: some may be missing there"
    if failed or unsure or not well or not quiet:
        remark(f"{text}{failed}")
    if well and not failed and not unsure:
        return shell.OK
    return shell.FAILED if not well and not late else shell.TIMED_OUT
