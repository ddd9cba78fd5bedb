"""`zmqbus tap`: a sniffer that shows what passes on the bus, and never holds it up.

Messages are taken off the subscription as fast as they come (drain.py) and shown as fast as the terminal takes them
(views.py). On Ctrl-Z it leaves the bus before it stops, and comes back when it goes on: a subscriber that stands still
would make publishers wait.

With `--since` it reads the forwarders' logs, and follows them. Nobody waits for who reads a log, so there it takes its
time: nothing makes room, and after Ctrl-Z it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING

import click

from zmqbus.cli import shell
from zmqbus.cli.messages.forms import Fields, human_age, to_json, told_claims
from zmqbus.cli.pubsub.tap.drain import Drain
from zmqbus.cli.pubsub.tap.views import Latest, Stream, Subjects, View
from zmqbus.cli.shell import remark, stopping
from zmqbus.cli.shell.bus import Bus, Duration, Moment, Watch, Whole, greet, messages, since
from zmqbus.cli.shell.output import loss_report, plural
from zmqbus.net.clock import now
from zmqbus.protocol.topics import Matcher, check_pattern

if TYPE_CHECKING:
    from zmqbus.cli.shell.following import Following
    from zmqbus.node.events import LogGap
    from zmqbus.node.faces.node import Node
    from zmqbus.node.faces.subscription import Subscription
    from zmqbus.protocol.message import Message
    from zmqbus.protocol.streams.stream import Gap


class Tally:
    """What passed, what matched and what was lost, over all stays on the bus."""

    def __init__(self) -> None:
        self.looked_at = self.matched = 0
        self.unseen = 0  # not looked at: they made room, or still waited in the end
        self.lost = 0
        self.gaps: list[Gap] = []
        self.dropped: list[LogGap] = []
        self.names: dict[int, str] = {}

    def name(self, origin: int) -> str:
        """The name of the node with this origin; "" when it is not known."""
        return self.names.get(origin, "")

    def add(self, subscription: Subscription, watch: Watch, unseen: int) -> None:
        """A stay is over."""
        watch.poll()
        self.unseen += unseen
        self.lost += subscription.lost
        self.gaps += subscription.gaps
        self.names |= watch.names

    def report(self, view: View) -> str:
        """All of it."""
        seen = self.looked_at + self.unseen
        shown = view.account(self.matched)
        parts = (
            f"{plural(seen, 'message')} shown"
            if shown == f"{seen:,} matched and shown"
            else f"{plural(seen, 'message')} seen, {shown}",
            f"{self.unseen:,} not shown: they came faster than they could be" if self.unseen else "",
            loss_report(self, self.name, self.dropped),
        )
        return "; ".join(filter(None, parts))


class Sniffer:
    """Looks on at what fits, until it has seen enough, or for so long."""

    def __init__(
        self,
        bus: Bus,
        patterns: Sequence[str],
        fits: Callable[[Fields], bool],
        view: View,
        *,
        count: int | None,
        seconds: float | None,
        since_ns: int | None,
        quiet: bool,
    ) -> None:
        self.tally = Tally()
        self._bus = bus
        self._patterns = patterns
        self._fits = fits
        self._view = view
        self._count = count
        self._seconds = seconds
        self._since_ns = since_ns
        self._quiet = quiet
        self._until: float | None = None
        self._finished = False

    def run(self) -> None:
        """All stays on the bus; between two of them the process was stopped by Ctrl-Z."""
        try:
            with stopping.suspendable():
                while self._stay():
                    self._view.hide()
                    left_at = now()
                    stopping.suspend()
                    remark(f"back after {human_age(now() - left_at)}; what passed meanwhile is not shown")
        finally:
            if self._until is not None:  # it has been on the bus
                self._finish()

    def _stay(self) -> bool:
        """Until it is over (False), or Ctrl-Z came (True)."""
        with self._bus.join("tap") as (node, watch):
            if self._since_ns is not None and (following := self._log(node, watch)) is not None:
                self._read(node, watch, following, self._since_ns)
                return False
            return self._look_on(node, watch)

    def _begin(self) -> float:
        """It is on the bus, and messages come; returns until when."""
        if self._until is None:
            greet(self._patterns, self._bus)
            self._until = now() + (inf if self._seconds is None else self._seconds)
        return self._until

    def _look_on(self, node: Node, watch: Watch) -> bool:
        """At what is published now."""
        tally, view, fits = self.tally, self._view, self._fits
        with node.subscribe(*self._patterns, observe=True) as subscription:
            until = self._begin()
            watch.names |= tally.names
            drain = Drain(subscription)
            looked_at, enough = 0, False

            def pause() -> None:
                view.pause()
                watch.poll()

            try:
                for message, at in messages(drain.take, until, pause):
                    looked_at += 1
                    fields = Fields(message, now=at, node=watch.name(message.origin))
                    if fits(fields):
                        tally.matched += 1
                        view.add(fields)
                        enough = tally.matched == self._count
                        if enough:
                            break
            finally:
                left = 0 if enough else drain.taken - looked_at + len(drain)
                tally.looked_at += looked_at
                tally.add(subscription, watch, drain.dropped + left)
                if enough or not stopping.suspended():
                    self._finish()  # before the node takes its time to leave
            return not enough and stopping.suspended()

    def _log(self, node: Node, watch: Watch) -> Following | None:
        """Say what is going to be read. None: there is no forwarder."""
        from zmqbus.cli.messages.render import escape
        from zmqbus.cli.shell.following import Following

        following = Following(node, watch, quiet=self._quiet)
        forwarders = following.forwarders()
        if not forwarders:
            self._since_ns = None
            if not watch.refused:
                remark(f"no forwarder is on bus {self._bus.name!r}, so there is no log to read; this is live")
            return None
        if not self._quiet:
            said = ", ".join(
                f"{escape(peer.name)} ({escape(' '.join(told_claims(peer.claims)))})" for peer in forwarders
            )
            remark(f"reading the log of {said}: nothing but what is claimed, once it is on disk")
        return following

    def _read(self, node: Node, watch: Watch, following: Following, since_ns: int) -> None:
        """The logs, and then what comes there."""
        tally, view, fits = self.tally, self._view, self._fits
        with node.subscribe(*self._patterns, start=since(since_ns)) as subscription:
            until = self._begin()

            def take(timeout: float) -> Sequence[Message]:
                message = subscription.get(timeout)
                return () if message is None else (message,)

            def pause() -> None:
                view.pause()
                watch.poll()
                following.poll(subscription)

            pause()
            try:
                while True:
                    for message, at in messages(take, until, pause):
                        tally.looked_at += 1
                        fields = Fields(message, now=at, node=watch.name(message.origin))
                        if fits(fields):
                            tally.matched += 1
                            view.add(fields)
                            if tally.matched == self._count:
                                return
                    if not stopping.suspended():
                        return
                    view.hide()
                    stopping.suspend()
            finally:
                following.poll(subscription)
                tally.dropped = following.dropped
                tally.add(subscription, watch, 0)
                self._finish()

    def _finish(self) -> None:
        if self._finished:
            return
        self._finished = True
        self._view.end()  # if nobody reads any more, nobody wants a report
        tally = self.tally
        if not self._quiet or tally.lost or tally.unseen:
            remark(tally.report(self._view))


def _view(template: str | None, as_json: bool, dump: bool, subjects: bool, latest: bool) -> View:
    from rich.console import Console

    from zmqbus.cli.messages.render import FormatString, Line

    if (template is not None) + as_json + dump > 1:
        raise click.UsageError("--json, --format and --hex are different forms: choose one")
    if subjects:
        if latest or template is not None or dump:
            raise click.UsageError("--subjects is a table of its own: leave out --last-per-topic, --format and --hex")
        return Subjects(as_json)
    if as_json:
        return Latest(to_json, None) if latest else Stream(to_json)
    if template is not None:
        render = FormatString(template).render
        return Latest(render, None) if latest else Stream(render)
    console = Console()
    lines = Line(console, dump=dump).render
    return Latest(lines, Line(console, brief=True).render) if latest else Stream(lines)


# --- the command -------------------------------------------------------------------------------


@click.command()
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("-x", "--exclude", multiple=True, metavar="PATTERN", help="Leave out what fits this; may be repeated.")
@click.option("--where", metavar="EXPR", help="Only messages for which this is true, such as 'value.status >= 500'.")
@click.option("-F", "--format", "template", metavar="TEMPLATE", help="Such as '{time:%H:%M:%S} {node} {value}'.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--hex", "dump", is_flag=True, help="A hexdump of every value.")
@click.option("-n", "--count", type=Whole(1), metavar="N", help="End after N messages.")
@click.option("--for", "seconds", type=Duration(), help="End after this time, such as 10s or 1h30m.")
@click.option(
    "--since",
    "since_ns",
    type=Moment(ago=True),
    metavar="TIME",
    help="Begin with what the forwarders' logs have since then, such as 10m (ago), 03:00 or 2026-07-31T03:00.",
)
@click.option(
    "--subjects", is_flag=True, help="A table of topics with messages, rate and bandwidth; live on a terminal."
)
@click.option(
    "--last-per-topic", "latest", is_flag=True, help="Only the last message of each topic; live on a terminal."
)
@click.option("--fail-on-loss", is_flag=True, help="Exit with 4 if messages were lost on the way here.")
@click.option("-q", "--quiet", is_flag=True, help="No report at the end, unless messages were lost or not shown.")
@click.pass_obj
def tap(
    bus: Bus,
    patterns: tuple[str, ...],
    exclude: tuple[str, ...],
    where: str | None,
    template: str | None,
    as_json: bool,
    dump: bool,
    count: int | None,
    seconds: float | None,
    since_ns: int | None,
    subjects: bool,
    latest: bool,
    fail_on_loss: bool,
    quiet: bool,
) -> int:
    """Show everything that is published.

    For each message: time, topic, node#seq, size, age and value. Without a PATTERN, on all topics: '>'.

    tap only looks on. When messages come faster than the terminal takes them, the oldest that wait are not shown, and
    counted; publishers are not held up. Nor are they by Ctrl-Z: tap leaves the bus, and comes back when it goes on.
    With --since it reads the logs of forwarders, and follows them: everything is shown, but only of topics that are
    claimed. Without a forwarder it says so, and is live.

    \b
    Examples:
      zmqbus tap 'logs.>' -x logs.web1.debug
      zmqbus tap --where 'value.status >= 500 and startswith(topic, "logs.")'
      zmqbus tap --subjects
      zmqbus tap 'sensors.*' --for 10s --json > sensors.ndjson
      zmqbus tap 'logs.>' --since 10m --where 'value.status >= 500'

    \b
    --where knows topic, value, seq, origin, node, time, age, size, headers, offset;
      == != < <= > >= in, and or not, + - * / // %, value.key, value["a key"][0];
      has(x) len(x) lower(x) int(x) float(x) str(x)
      startswith(x, y) endswith(x, y) contains(x, y) matches(x, r"regex")
    --format knows the same names in braces, with Python's format specifications.
    """
    from zmqbus.cli.messages.where import compile_where

    patterns = patterns or (">",)
    for pattern in (*patterns, *exclude):
        check_pattern(pattern)
    excluded = Matcher(exclude).matches if exclude else None
    test = compile_where(where) if where is not None else None

    def fits(fields: Fields) -> bool:
        return not (excluded is not None and excluded(fields.message.topic)) and (test is None or test(fields))

    sniffer = Sniffer(
        bus,
        patterns,
        fits,
        _view(template, as_json, dump, subjects, latest),
        count=count,
        seconds=seconds,
        since_ns=since_ns,
        quiet=quiet,
    )
    sniffer.run()
    if fail_on_loss and sniffer.tally.lost:
        return shell.LOST
    return shell.TIMED_OUT if count is not None and sniffer.tally.matched < count else shell.OK
