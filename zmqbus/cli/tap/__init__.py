"""`zmqbus tap`: a sniffer that shows what passes on the bus, and never holds it up.

Messages are taken off the subscription as fast as they come (drain.py) and shown as fast as the terminal takes them
(views.py). On Ctrl-Z it leaves the bus before it stops, and comes back when it goes on: a subscriber that stands still
would make publishers wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING

import click

from zmqbus.cli import shell
from zmqbus.cli.messages.forms import Fields, human_age, to_json
from zmqbus.cli.shell import remark, stopping
from zmqbus.cli.shell.bus import Bus, Duration, Watch, Whole, greet, messages
from zmqbus.cli.shell.output import loss_report, plural
from zmqbus.cli.tap.drain import Drain
from zmqbus.cli.tap.views import Latest, Stream, Subjects, View
from zmqbus.net.clock import now
from zmqbus.protocol.topics import Matcher, check_pattern

if TYPE_CHECKING:
    from zmqbus.node.faces.subscription import Subscription
    from zmqbus.protocol.streams.stream import Gap


class Tally:
    """What passed, what matched and what was lost, over all stays on the bus."""

    def __init__(self) -> None:
        self.looked_at = self.matched = 0
        self.unseen = 0  # not looked at: they made room, or still waited in the end
        self.lost = 0
        self.gaps: list[Gap] = []
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
            loss_report(self, self.name),
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
        quiet: bool,
    ) -> None:
        self.tally = Tally()
        self._bus = bus
        self._patterns = patterns
        self._fits = fits
        self._view = view
        self._count = count
        self._seconds = seconds
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
        tally, view, fits = self.tally, self._view, self._fits
        with self._bus.join("tap") as (node, watch), node.subscribe(*self._patterns, observe=True) as subscription:
            if self._until is None:
                greet(self._patterns, self._bus)
                self._until = now() + (inf if self._seconds is None else self._seconds)
            watch.names |= tally.names
            drain = Drain(subscription)
            looked_at, enough = 0, False

            def pause() -> None:
                view.pause()
                watch.poll()

            try:
                for message, at in messages(drain.take, self._until, pause):
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
    subjects: bool,
    latest: bool,
    fail_on_loss: bool,
    quiet: bool,
) -> int:
    """Show everything that is published.

    For each message: time, topic, node#seq, size, age and value. Without a PATTERN, on all topics: '>'.

    tap only looks on. When messages come faster than the terminal takes them, the oldest that wait are not shown, and
    counted; publishers are not held up. Nor are they by Ctrl-Z: tap leaves the bus, and comes back when it goes on.

    \b
    Examples:
      zmqbus tap 'logs.>' -x logs.web1.debug
      zmqbus tap --where 'value.status >= 500 and startswith(topic, "logs.")'
      zmqbus tap --subjects
      zmqbus tap 'sensors.*' --for 10s --json > sensors.ndjson

    \b
    --where knows topic, value, seq, origin, node, time, age, size, headers;
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
        quiet=quiet,
    )
    sniffer.run()
    if fail_on_loss and sniffer.tally.lost:
        return shell.LOST
    return shell.TIMED_OUT if count is not None and sniffer.tally.matched < count else shell.OK
