"""`zmqbus push`: push values, or the lines of standard input, each as a job for one worker.

A forwarder that claims the queue takes them over. Without one they are held in this process, which therefore stays
until workers have done all of them; what they gave up has no other place either, so that it is told in the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from zmqbus.cli import shell
from zmqbus.cli.pubsub.confirming import CONFIRM, CONFIRM_STOPPED, Durably, leave
from zmqbus.cli.shell import remark, stopping
from zmqbus.cli.shell.bus import Bus, Duration, Rate, Whole
from zmqbus.cli.shell.input import paced, parse_headers, values_of
from zmqbus.cli.work.letters import tell
from zmqbus.cli.work.pushing import Jobs
from zmqbus.errors import BufferFull, NotDurable
from zmqbus.protocol.topics import encode_topic

if TYPE_CHECKING:
    from zmqbus.node.faces.node import Node


STOPPED = 0.5  # seconds that workers have for what they are at, when the command is asked to stop


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
            if jobs.given_up:
                tell(node, queue)
            patience = CONFIRM if settled and not jobs.given_up else CONFIRM_STOPPED
            code = _leave(node, jobs, patience, failed, quiet)
            watch.poll()
    return code


def _leave(node: Node, jobs: Jobs, patience: float, failed: str, quiet: bool) -> int:
    """Close the node, and say what became of it all. Returns the exit code."""
    try:
        late = leave(node, patience)
    except stopping.Stopped:
        remark(f"{jobs.report([])[0]}; interrupted before all subscribers had confirmed it")
        raise
    text, code = jobs.report(late)
    if unsure := ", ".join(sorted(one.peer for one in late if not one.unacked)):
        text += f"; not confirmed within {patience:g} s by {unsure}: some may be missing there"
    if failed or unsure or code or not quiet:
        remark(f"{text}{failed}")
    return shell.TIMED_OUT if failed or unsure else code
