"""`zmqbus pub`: publish values, or the lines of standard input."""

from __future__ import annotations

import contextlib
from math import inf
from typing import TYPE_CHECKING

import click

from zmqbus.cli import shell
from zmqbus.cli.pubsub.confirming import CONFIRM, CONFIRM_STOPPED, Durably, leave
from zmqbus.cli.shell import remark, stopping
from zmqbus.cli.shell.bus import Bus, Duration, Rate, Whole
from zmqbus.cli.shell.input import paced, parse_headers, values_of
from zmqbus.cli.shell.output import plural
from zmqbus.errors import NotDurable, WaitTimeout
from zmqbus.net.clock import now
from zmqbus.protocol.topics import encode_topic

if TYPE_CHECKING:
    from zmqbus.node.faces.node import Node

WAIT = 2.0  # for the first subscriber, when nothing was said about waiting
SETTLE = 0.15  # after the first one: others that are there already answer within this


def _await_subscribers(node: Node, topic: str, wanted: int | None, timeout: float | None) -> None:
    """As `--wait-subscribers` says; raises WaitTimeout only then."""
    if wanted is not None:
        _wait_for(node, topic, wanted, timeout)
        return
    try:
        seen = _wait_for(node, topic, 1, WAIT if timeout is None else timeout, observers=True)
        while True:
            seen = _wait_for(node, topic, seen + 1, SETTLE, observers=True)
    except WaitTimeout:
        pass  # nobody, or no more


def _wait_for(node: Node, topic: str, wanted: int, timeout: float | None, *, observers: bool = False) -> int:
    until = inf if timeout is None else now() + timeout
    while True:
        stopping.check()
        left = until - now()
        try:
            return node.wait_for_subscribers(topic, wanted, max(0.0, min(left, stopping.PEEK)), observers=observers)
        except WaitTimeout as error:
            if left <= stopping.PEEK:
                raise WaitTimeout(error.what, error.seen, error.wanted, timeout or 0.0) from None


@click.command()
@click.argument("topic")
@click.argument("values", nargs=-1, metavar="[VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Values and lines are JSON, not text.")
@click.option(
    "-H", "--headers", multiple=True, metavar="KEY=VALUE", help="A header for every message; may be repeated."
)
@click.option("--count", type=Whole(1), metavar="N", help="Publish the values N times over.")
@click.option(
    "--rate",
    type=Rate(),
    metavar="R",
    help="Publish R messages per second, not as fast as they come.",
)
@click.option(
    "--wait-subscribers",
    "wanted",
    type=Whole(0),
    metavar="N",
    help="Publish nothing before there are N subscribers; 0: at once. Default: wait up to 2 s for one, then go ahead; "
    "with --durable, 0.",
)
@click.option(
    "--durable",
    is_flag=True,
    help="Publish nothing before there is a forwarder that claims the topic, and do not end before everything is on "
    "its disk.",
)
@click.option(
    "--timeout", type=Duration(), help="Wait no longer than this for subscribers, and for a forwarder and its disk."
)
@click.option("-q", "--quiet", is_flag=True, help="Do not say what was published; only what went wrong.")
@click.pass_obj
def pub(
    bus: Bus,
    topic: str,
    values: tuple[str, ...],
    as_json: bool,
    headers: tuple[str, ...],
    count: int | None,
    rate: float | None,
    wanted: int | None,
    durable: bool,
    timeout: float | None,
    quiet: bool,
) -> int:
    """Publish values on a topic, each as a message of its own.

    With - for a value, or none and a pipe, each line of standard input is published: as text, or as bytes where it is
    not UTF-8.

    \b
    Examples:
      zmqbus pub greetings.world hello
      zmqbus pub --json sensors.7 '{"celsius": 21.5}' --count 100 --rate 10
      tail -f /var/log/syslog | zmqbus pub logs.web1.syslog
      zmqbus pub --durable orders.new < orders.txt
    """
    encode_topic(topic)
    marks = parse_headers(headers)
    source = paced(values_of(values, as_json, count), rate)
    published, failure = 0, None
    with bus.join("pub") as (node, watch):
        durably = Durably(node, topic, watch, timeout) if durable else None
        if durably is not None and not durably.await_forwarder():
            durably.nobody("published", bus)
            return shell.TIMED_OUT
        if durably is None or wanted:
            _await_subscribers(node, topic, wanted, timeout)
        publisher = node.publisher(topic)
        patience = CONFIRM
        try:
            for value in source:
                published += 1
                publisher.send(value, marks)
                if durably is not None:
                    durably.sent(value)
            if durably is not None:
                durably.settle()
        except NotDurable as error:
            failure, patience = error, CONFIRM_STOPPED
        except stopping.Stopped:
            patience = CONFIRM_STOPPED
            if durably is not None:
                with contextlib.suppress(NotDurable):
                    durably.settle(CONFIRM_STOPPED)
            raise
        finally:
            subscribers = node.wait_for_subscribers(topic, 0)
            watched = node.wait_for_subscribers(topic, 0, observers=True) > subscribers
            text = f"published {plural(published, 'message')} on {topic}"
            if durably is not None and durably.unknown:
                reason = f": {failure.reason}" if failure is not None else ""
                remark(f"{text}; {durably.unknown:,} not known to be on a forwarder's disk{reason}")
            elif durably is not None and published:
                text += ", all on a forwarder's disk"
            try:
                late = [one for one in leave(node, patience) if durably is None or not one.unacked]
            except stopping.Stopped:
                waiting = plural(subscribers, "subscriber")
                remark(f"{text}; interrupted before {waiting} had confirmed all of it: some may be missing there")
                raise
            watch.poll()
            if late:
                names = ", ".join(sorted(one.peer for one in late))
                remark(f"{text}; not confirmed within {patience:g} s by {names}: some may be missing there")
            elif durably is not None:
                if not quiet and not durably.unknown:  # else it is said
                    remark(text)
            elif not subscribers and published and wanted != 0 and not watch.refused:
                remark(f"{text}; nobody was subscribed to it{', a tap looked on' * watched}")
            elif not quiet:
                remark(f"{text} to {plural(subscribers, 'subscriber')}{', all confirmed' * bool(subscribers)}")
    return shell.TIMED_OUT if late or failure is not None else shell.OK
