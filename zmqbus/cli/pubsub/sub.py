"""`zmqbus sub`: print what is published, live or out of the forwarders' logs.

With a durable name a message counts as dealt with when its line is written: whole, to its newline. Each line is
written before the next message is asked for, so that at any instant the cursor is at most behind the last line
written, and in an orderly end stands right behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import datetime
from math import inf
from typing import TYPE_CHECKING

import click

from zmqbus.cli import shell
from zmqbus.cli.messages.forms import Fields
from zmqbus.cli.shell import remark, stopping
from zmqbus.cli.shell.bus import Bus, Duration, Start, Watch, Whole, greet, messages
from zmqbus.cli.shell.output import PATIENCE, Output, loss_report, plural, renderer
from zmqbus.errors import SetupError, WaitTimeout, ZmqbusError
from zmqbus.net.clock import now
from zmqbus.protocol.starts import check_cursor_name
from zmqbus.protocol.topics import check_pattern

if TYPE_CHECKING:
    from zmqbus.cli.shell.following import Following
    from zmqbus.node.faces.node import Node
    from zmqbus.node.faces.subscription import Subscription
    from zmqbus.protocol.message import Message

COMMIT = 5.0  # seconds that a forwarder has to confirm the last commit
COMMIT_STOPPED = 1.0  # … when asked to stop

# --- options -----------------------------------------------------------------------------------


def _durable_name(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    try:
        return None if name is None else check_cursor_name(name)
    except SetupError as error:
        raise click.BadParameter(str(error)) from None


# --- printing ----------------------------------------------------------------------------------


class Printer:
    """Prints what a subscription gets, and in the end says how much that was."""

    def __init__(self, subscription: Subscription, watch: Watch, following: Following | None, durable: bool) -> None:
        self.received = 0
        self.committed = True
        """Whether the forwarders have confirmed how far it came."""
        self._taken = 0
        self._ended = False
        self._subscription = subscription
        self._watch = watch
        self._following = following
        self._durable = durable
        self._output = Output()

    def run(self, render: Callable[[Fields], str], count: int | None, until: float) -> None:
        """Until there were so many, or it is so late."""
        for message, at in messages(self._take, until, self._pause):
            self.received += 1
            self._output.put(render(Fields(message, now=at, node=self._watch.name(message.origin))))
            if self._durable:
                self._output.flush()
            if self.received == count:
                return

    def end(self, quiet: bool) -> None:
        """Let out the rest, commit, and report."""
        self._output.flush(PATIENCE)
        subscription, following, received = self._subscription, self._following, self.received
        shown = self._output.shown
        if self._durable and shown == self._taken:
            self.committed = self._commit()
        if following is not None:
            following.poll(subscription)
        self._watch.poll()
        if quiet and not subscription.lost and shown == received and self.committed:
            return
        text = f"{plural(received, 'message')} received"
        if shown < received:
            text += f", {shown:,} of them shown"
        if subscription.repaired:
            text += f", {subscription.repaired:,} of them fetched from history"
        if self._durable and following is not None and not self._ended:
            place = following.standing(subscription)
            if not self.committed:
                place = "how far it came is not confirmed by its forwarder: the last messages may come again"
            text += f"; {place}" * bool(place)
        remark(f"{text}; {loss_report(subscription, self._watch.name, following.dropped if following else ())}")

    def _take(self, timeout: float) -> Sequence[Message]:
        message = self._subscription.get(timeout)
        if message is None:
            return ()
        self._taken += 1
        return (message,)

    def _pause(self) -> None:
        self._output.flush()
        self._watch.poll()
        if self._following is not None:
            self._following.poll(self._subscription)

    def _commit(self) -> bool:
        """Everything that was received is written. Returns whether that is on the forwarders' disks, too."""
        try:
            self._subscription.commit(COMMIT_STOPPED if stopping.asked() else COMMIT)
        except WaitTimeout:
            return False
        except ZmqbusError:  # it has ended: somebody else has the name, or its log cannot be read
            self._ended = True
        return True


def _read_log(
    node: Node,
    watch: Watch,
    patterns: Sequence[str],
    start: str | int | datetime | None,
    durable: str | None,
    quiet: bool,
) -> tuple[Subscription, Following]:
    from zmqbus.cli.shell.following import Following

    following = Following(node, watch, who=durable or "", quiet=quiet)
    following.forwarders()  # if there is none, the subscription warns of that, and begins when there is
    subscription = node.subscribe(*patterns, start=start, durable=durable)
    watch.poll()
    following.poll(subscription)
    return subscription, following


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
@click.option(
    "--start",
    type=Start(),
    metavar="WHERE",
    help="Read the forwarders' logs, from there on: first, last, -1h, a time such as 2026-07-31T03:00, or an offset.",
)
@click.option(
    "--durable",
    metavar="NAME",
    callback=_durable_name,
    help="Read the forwarders' logs under this name: the next one to read under it goes on behind the last line "
    "written here. The first time it begins at --start, or at the end.",
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
    start: str | int | datetime | None,
    durable: str | None,
    fail_on_loss: bool,
    quiet: bool,
) -> int:
    """Print every message on the topics that fit.

    In a pattern * is one token, and > at the end one or more. Quote them: both mean something to the shell. Missed
    messages are repaired; a slow reader makes publishers wait a little, so to look on unnoticed use tap. With --start
    or --durable the messages come out of the logs of forwarders, which nobody waits for.

    \b
    Examples:
      zmqbus sub 'logs.>'
      zmqbus sub 'sensors.*' -F '{topic} {value.celsius:.1f}' -n 10
      zmqbus sub 'logs.*.nginx' --json | jq .value
      zmqbus sub 'logs.>' --start -1h
      zmqbus sub 'orders.>' --durable billing --json >> orders.ndjson
    """
    for pattern in patterns:
        check_pattern(pattern)
    stored = start is not None or durable is not None
    if stored and history:
        raise click.UsageError(
            f"--history is of live messages; with {'--durable' if durable is not None else '--start'} they come out of "
            "the forwarders' logs: leave out one"
        )
    render = renderer(template, as_json)
    with bus.join("sub") as (node, watch), contextlib.ExitStack() as stack:
        following = None
        if stored:
            # Not entered: what is not written is not dealt with, and when the node is closed that is what it commits.
            subscription, following = _read_log(node, watch, patterns, start, durable, quiet)
        else:
            subscription = stack.enter_context(node.subscribe(*patterns, history=history))
        greet(patterns, bus)
        printer = Printer(subscription, watch, following, durable is not None)
        try:
            printer.run(render, count, inf if seconds is None else now() + seconds)
        finally:
            printer.end(quiet)
    if fail_on_loss and subscription.lost:
        return shell.LOST
    short = count is not None and printer.received < count
    return shell.TIMED_OUT if short or not printer.committed else shell.OK
