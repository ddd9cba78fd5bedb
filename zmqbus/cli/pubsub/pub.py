"""`zmqbus pub`: publish values, or the lines of standard input.

With `--durable` they are published one after the other without waiting, and waited for together: all of them in the
end, and before that whenever so much is on its way that the node's buffer might fill up. Publishing itself never
waits then, so that Ctrl-C is always heard.
"""

from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedIOBase
from itertools import repeat
from math import inf
from threading import Thread
from typing import TYPE_CHECKING, Any, cast

import click
import msgspec

from zmqbus.cli import shell
from zmqbus.cli.messages.forms import parse_value
from zmqbus.cli.shell import remark, stopping
from zmqbus.cli.shell.bus import Bus, Duration, Rate, Watch, Whole
from zmqbus.cli.shell.output import plural
from zmqbus.errors import NotDurable, ParseError, WaitTimeout
from zmqbus.net.clock import now
from zmqbus.protocol.frames import MESSAGE_BYTES_MAX
from zmqbus.protocol.streams.acks import NO_ROOM, UNCLAIMED
from zmqbus.protocol.topics import Matcher, encode_topic

if TYPE_CHECKING:
    from zmqbus.node.events import Undelivered
    from zmqbus.node.faces.node import Node
    from zmqbus.node.publishing.publisher import Publisher

WAIT = 2.0  # for the first subscriber, when nothing was said about waiting
SETTLE = 0.15  # after the first one: others that are there already answer within this
CONFIRM = 5.0  # how long subscribers have to confirm, before we leave and take the history with us
CONFIRM_STOPPED = 1.0  # … when asked to stop
READ_BYTES = 64 * 1024  # of standard input at a time
PAUSE_MAX = 1.0  # behind its schedule by more than this, `--rate` starts a new one: there was no input
SPIN = 0.001  # waits below this are left out, and made up for by the next one
CLAIM = 5.0  # that a forwarder may take to be there, when nothing was said about waiting: it may be starting
LOOK = 0.02  # between two looks for one
PATIENT = 2.0  # it is said what is waited for after this
UNACKED_BYTES_MAX = 8 * 1024 * 1024  # on their way to a forwarder's disk; an eighth of the node's buffer
UNACKED_MAX = 20_000  # messages, which are rarely smaller than the rest of that

# --- what to publish ---------------------------------------------------------------------------


class Pacer:
    """When to send, for a rate per second: message i at start + i / rate, so that errors do not add up."""

    def __init__(self, rate: float) -> None:
        self._period = 1 / rate
        self._due: float | None = None

    def delay(self, now: float) -> float:
        """Seconds to wait before sending the next message. Call it once for each."""
        if self._due is None or now - self._due > PAUSE_MAX:
            self._due = now
        delay = max(0.0, self._due - now)
        self._due += self._period
        return delay


def blocks(stream: BufferedIOBase) -> Iterator[bytes]:
    """What comes in, as it comes. Raises Stopped soon after the command was asked to stop."""
    poll = select.poll()
    is_file = True
    try:
        poll.register(stream.fileno(), select.POLLIN)
    except OSError:  # of a test, and always ready
        is_file = False
    while True:
        stopping.check()
        if not is_file or poll.poll(stopping.PEEK * 1000):
            block = stream.read1(READ_BYTES)
            if not block:
                return
            yield block


def lines(source: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends, as they come. Raises ParseError for one that no message can carry."""
    rest = bytearray()
    number = 0
    for block in source:
        *ended, last = block.split(b"\n")
        for end in ended:
            number += 1
            rest += end
            _check_length(rest, number)
            yield bytes(rest).removesuffix(b"\r")
            rest.clear()
        rest += last
        _check_length(rest, number + 1)
    if rest:
        yield bytes(rest).removesuffix(b"\r")


def _check_length(line: bytearray, number: int) -> None:
    if len(line) > MESSAGE_BYTES_MAX:
        begin = line[:80].decode(errors="replace")
        reason = (
            f"line {number} of standard input is longer than a message may be ({MESSAGE_BYTES_MAX:,} bytes); split it"
        )
        raise ParseError("message", begin, reason)


def line_values(source: Iterable[bytes], as_json: bool) -> Iterator[Any]:
    """What to publish for each line: its text; its bytes, where it is not UTF-8; with `as_json` what it stands for."""
    for number, line in enumerate(lines(source), 1):
        if not as_json:
            try:
                yield line.decode()
            except UnicodeDecodeError:
                yield line
        elif line.strip():
            try:
                yield parse_value(line.decode("utf-8", "surrogateescape"), as_json=True)
            except ParseError as error:
                raise ParseError(error.what, error.text, f"{error.reason} (line {number} of standard input)") from None


def parse_headers(pairs: Sequence[str]) -> dict[str, str] | None:
    """Headers from `key=value` texts."""
    headers = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--headers")
        parse_value(pair, as_json=False)  # UTF-8?
        headers[key] = value
    return headers or None


def _source(values: Sequence[str], as_json: bool, count: int | None) -> Iterator[Any]:
    """What to publish, in order."""
    if "-" in values and len(values) > 1:
        raise click.UsageError(
            "- stands for the lines of standard input, and for nothing beside it: leave out the rest"
        )
    if values and values[0] != "-":
        parsed = [parse_value(value, as_json) for value in values]
        return (value for again in repeat(parsed, count or 1) for value in again)
    if sys.stdin is None or (not values and sys.stdin.isatty()):
        raise click.UsageError("give a VALUE, or - (or a pipe) to publish the lines of standard input")
    if count is not None:
        raise click.UsageError("--count repeats values given as arguments, not standard input")
    return line_values(blocks(cast(BufferedIOBase, sys.stdin.buffer)), as_json)


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


def _leave(node: Node, patience: float) -> list[Undelivered]:
    """Close the node; returns who had not confirmed everything. Raises Stopped if asked to stop meanwhile."""
    late: list[Undelivered] = []
    failed: list[Exception] = []

    def close() -> None:
        try:
            late.extend(node.close(patience))
        except Exception as error:
            failed.append(error)

    leaving = Thread(target=close, name="zmqbus pub leaving", daemon=True)
    leaving.start()
    while leaving.is_alive():
        leaving.join(stopping.PEEK)
        if patience > CONFIRM_STOPPED:  # else it was asked before
            stopping.check()
    if failed:
        raise failed[0]
    return late


class Durably:
    """Publishes on one topic without waiting, and waits for the disk of a forwarder now and then."""

    def __init__(self, node: Node, topic: str, watch: Watch, timeout: float | None) -> None:
        """Each wait lasts at most `timeout` seconds; None: no limit, except that a forwarder has to be found soon."""
        self.published = 0
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

    def send(self, publisher: Publisher, value: Any, headers: dict[str, str] | None) -> None:
        """Publish one value; waits if much is on its way already. Raises NotDurable then, if that is in vain."""
        publisher.send(value, headers)
        self.published += 1
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
    source = _source(values, as_json, count)
    pacer = Pacer(rate) if rate is not None else None
    published, failure = 0, None
    with bus.join("pub") as (node, watch):
        durably = Durably(node, topic, watch, timeout) if durable else None
        if durably is not None and not durably.await_forwarder():
            if not watch.refused:
                start = "zmqbus forwarder --journal DIR"
                remark(f"nothing published: no forwarder on bus {bus.name!r} claims {topic}; start one: {start}")
            return shell.TIMED_OUT
        if durably is None or wanted:
            _await_subscribers(node, topic, wanted, timeout)
        publisher = node.publisher(topic)
        patience = CONFIRM
        try:
            for value in source:
                stopping.check()
                if pacer is not None and (delay := pacer.delay(now())) > SPIN:
                    stopping.rest(delay)
                published += 1
                if durably is not None:
                    durably.send(publisher, value, marks)
                else:
                    publisher.send(value, marks)
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
                late = [one for one in _leave(node, patience) if durably is None or not one.unacked]
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
