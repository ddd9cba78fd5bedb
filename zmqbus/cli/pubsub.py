"""`zmqbus pub` and `zmqbus sub`: publish values or lines, and print what is published."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BufferedIOBase
from itertools import repeat
from math import inf
from threading import Thread
from typing import TYPE_CHECKING, Any, cast

import click

from zmqbus.cli import shell
from zmqbus.cli.messages.forms import Fields, parse_value, to_json
from zmqbus.cli.shell import remark, stopping
from zmqbus.cli.shell.bus import Bus, Duration, Rate, Whole, greet, messages
from zmqbus.cli.shell.output import PATIENCE, Output, colored, loss_report, plural
from zmqbus.errors import ParseError, WaitTimeout
from zmqbus.net.clock import now
from zmqbus.protocol.frames import MESSAGE_BYTES_MAX
from zmqbus.protocol.topics import check_pattern, encode_topic

if TYPE_CHECKING:
    from zmqbus.node.events import Undelivered
    from zmqbus.node.faces.node import Node
    from zmqbus.protocol.message import Message

WAIT = 2.0  # for the first subscriber, when nothing was said about waiting
SETTLE = 0.15  # after the first one: others that are there already answer within this
CONFIRM = 5.0  # how long subscribers have to confirm, before we leave and take the history with us
CONFIRM_STOPPED = 1.0  # … when asked to stop
READ_BYTES = 64 * 1024  # of standard input at a time
PAUSE_MAX = 1.0  # behind its schedule by more than this, `--rate` starts a new one: there was no input
SPIN = 0.001  # waits below this are left out, and made up for by the next one

# --- pub ---------------------------------------------------------------------------------------


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
    help="Publish nothing before there are N subscribers; 0: at once. Default: wait up to 2 s for one, then go ahead.",
)
@click.option("--timeout", type=Duration(), help="Wait no longer than this for subscribers.")
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
    """
    encode_topic(topic)
    marks = parse_headers(headers)
    source = _source(values, as_json, count)
    pacer = Pacer(rate) if rate is not None else None
    published = 0
    with bus.join("pub") as (node, watch):
        _await_subscribers(node, topic, wanted, timeout)
        publisher = node.publisher(topic)
        patience = CONFIRM
        try:
            for value in source:
                stopping.check()
                if pacer is not None and (delay := pacer.delay(now())) > SPIN:
                    stopping.rest(delay)
                publisher.send(value, marks)
                published += 1
        except stopping.Stopped:
            patience = CONFIRM_STOPPED
            raise
        finally:
            subscribers = node.wait_for_subscribers(topic, 0)
            watched = node.wait_for_subscribers(topic, 0, observers=True) > subscribers
            text = f"published {plural(published, 'message')} on {topic}"
            try:
                late = _leave(node, patience)
            except stopping.Stopped:
                waiting = plural(subscribers, "subscriber")
                remark(f"{text}; interrupted before {waiting} had confirmed all of it: some may be missing there")
                raise
            watch.poll()
            if late:
                names = ", ".join(sorted(one.peer for one in late))
                remark(f"{text}; not confirmed within {patience:g} s by {names}: some may be missing there")
            elif not subscribers and published and wanted != 0 and not watch.refused:
                remark(f"{text}; nobody was subscribed to it{', a tap looked on' * watched}")
            elif not quiet:
                remark(f"{text} to {plural(subscribers, 'subscriber')}{', all confirmed' * bool(subscribers)}")
    return shell.TIMED_OUT if late else shell.OK


# --- sub ---------------------------------------------------------------------------------------


def renderer(template: str | None, as_json: bool) -> Callable[[Fields], str]:
    """How `sub` prints a message: as a line of JSON, by a template, or just topic and value."""
    from zmqbus.cli.messages.render import FormatString, compact, escape

    if template is not None and as_json:
        raise click.UsageError("--json and --format are two forms: choose one")
    if as_json:
        return to_json
    if template is not None:
        return FormatString(template).render
    styled = colored()

    def line(fields: Fields) -> str:
        topic = escape(fields["topic"])
        return f"{click.style(topic, fg='cyan') if styled else topic}  {compact(fields['value'])}"

    return line


@click.command()
@click.argument("patterns", nargs=-1, required=True, metavar="PATTERN...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("-F", "--format", "template", metavar="TEMPLATE", help="Such as '{topic} {value.status} {age:.3f}'.")
@click.option("-n", "--count", type=Whole(1), metavar="N", help="End after N messages.")
@click.option("--for", "seconds", type=Duration(), help="End after this time, such as 10s or 1h30m.")
@click.option(
    "--history",
    type=Whole(0),
    default=0,
    metavar="N",
    help="Begin with the last N messages of each stream, as far as their publishers still hold them.",
)
@click.option("--fail-on-loss", is_flag=True, help="Exit with 4 if messages were lost.")
@click.option("-q", "--quiet", is_flag=True, help="No report at the end, unless messages were lost or not shown.")
@click.pass_obj
def sub(
    bus: Bus,
    patterns: tuple[str, ...],
    as_json: bool,
    template: str | None,
    count: int | None,
    seconds: float | None,
    history: int,
    fail_on_loss: bool,
    quiet: bool,
) -> int:
    """Print every message on the topics that fit.

    In a pattern * is one token, and > at the end one or more. Quote them: both mean something to the shell. Missed
    messages are repaired; a slow reader makes publishers wait a little, so to look on unnoticed use tap.

    \b
    Examples:
      zmqbus sub 'logs.>'
      zmqbus sub 'sensors.*' -F '{topic} {value.celsius:.1f}' -n 10
      zmqbus sub 'logs.*.nginx' --json | jq .value
    """
    for pattern in patterns:
        check_pattern(pattern)
    render = renderer(template, as_json)
    received = 0
    with bus.join("sub") as (node, watch), node.subscribe(*patterns, history=history) as subscription:
        greet(patterns, bus)
        output = Output()

        def take(timeout: float) -> tuple[Message, ...]:
            message = subscription.get(timeout)
            return () if message is None else (message,)

        def pause() -> None:
            output.flush()
            watch.poll()

        try:
            for message, at in messages(take, inf if seconds is None else now() + seconds, pause):
                received += 1
                output.put(render(Fields(message, now=at, node=watch.name(message.origin))))
                if received == count:
                    break
        finally:
            output.flush(PATIENCE)
            shown = output.shown
            if not quiet or subscription.lost or shown < received:
                text = f"{plural(received, 'message')} received"
                if shown < received:
                    text += f", {shown:,} of them shown"
                if subscription.repaired:
                    text += f", {subscription.repaired:,} of them fetched from history"
                remark(f"{text}; {loss_report(subscription, watch.name)}")
    if fail_on_loss and subscription.lost:
        return shell.LOST
    return shell.TIMED_OUT if count is not None and received < count else shell.OK
