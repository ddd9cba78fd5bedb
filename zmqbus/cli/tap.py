"""`zmqbus tap`: a sniffer that shows what passes on the bus, and never holds it up.

Messages are taken off the subscription by a thread of their own (`Drain`), as fast as they come, and wait for the
terminal in a bounded queue. When that is full, messages pass by unseen and are counted: better than a publisher that
waits because somebody pressed Ctrl-S. What the bus itself lost on the way here is counted apart, with ranges.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol

import click
import msgspec

from zmqbus.cli import shell
from zmqbus.cli.forms import Fields, human_bytes, human_rate, to_json
from zmqbus.cli.shell import Bus, Column, Duration, Watch, plural, remark
from zmqbus.net.clock import now, time_ns
from zmqbus.protocol.topics import Matcher, check_pattern

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zmqbus.cli.render import LastPerTopic, TopicTable
    from zmqbus.node.node import Subscription
    from zmqbus.protocol.message import Message

QUEUE_MESSAGES_MAX = 100_000  # some 20 MB of small ones
QUEUE_BYTES_MAX = 64 * 1024 * 1024
REDRAW = 0.25  # seconds between two pictures of a live table
TAKEN_MAX = 256  # at a time: a few milliseconds of printing

# --- taking messages off the bus ---------------------------------------------------------------


class Drain:
    """Takes messages off a subscription on a thread of its own. Bounded: beyond that they pass by unseen."""

    def __init__(self, subscription: Subscription) -> None:
        self._passed = 0
        self._subscription = subscription
        self._queue: deque[tuple[Message, int]] = deque()
        # Bytes that went in and came out: each is counted by one thread only, so no lock is needed.
        self._bytes_in = 0
        self._bytes_out = 0
        self._stirred = Event()
        self._error: Exception | None = None
        # A daemon: our exit must not wait for it.
        self._thread = Thread(target=self._run, name="zmqbus tap", daemon=True)
        self._thread.start()

    def take(self, timeout: float) -> list[Message]:
        """Some messages; none when none come within `timeout` seconds. Raises what ended the subscription."""
        queue = self._queue
        if not queue:
            if self._error is not None:
                raise self._error
            self._stirred.clear()
            if not queue:
                self._stirred.wait(timeout)
        some = []
        for _ in range(min(len(queue), TAKEN_MAX)):
            message, size = queue.popleft()
            self._bytes_out += size
            some.append(message)
        return some

    @property
    def unseen(self) -> int:
        """How many have passed by; and, where that happened, how many of those before them still wait to be shown."""
        return self._passed and self._passed + len(self._queue)

    def _run(self) -> None:
        queue, stirred = self._queue, self._stirred
        try:
            for message in self._subscription:
                value = message.value
                size = len(value) if value.__class__ is str or value.__class__ is bytes else _size(value)
                if len(queue) < QUEUE_MESSAGES_MAX and self._bytes_in - self._bytes_out < QUEUE_BYTES_MAX:
                    self._bytes_in += size
                    queue.append((message, size))
                    if not stirred.is_set():
                        stirred.set()
                else:
                    self._passed += 1
        except Exception as error:
            self._error = error
        finally:
            stirred.set()


def _size(value: Any) -> int:
    try:
        return len(msgspec.msgpack.encode(value))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return 1024


# --- what becomes of them ----------------------------------------------------------------------


class View(Protocol):
    """How messages that match are shown."""

    def add(self, fields: Fields) -> None:
        """One more."""

    def pause(self) -> None:
        """There are no more at the moment, or it is time to look up."""

    def end(self) -> None:
        """That was all."""


class Stream:
    """One line (or hexdump) per message, at once."""

    def __init__(self, render: Callable[[Fields], str]) -> None:
        self._render = render
        self._write = sys.stdout.write

    def add(self, fields: Fields) -> None:
        """Print it."""
        self._write(self._render(fields) + "\n")

    def pause(self) -> None:
        """Let it out."""
        sys.stdout.flush()

    def end(self) -> None:
        """Let it out."""
        sys.stdout.flush()


class Subjects:
    """A table of topics: messages, rate, bandwidth. Live on a terminal, otherwise once, at the end."""

    COLUMNS: tuple[Column, ...] = (
        ("topic", False),
        ("messages", True),
        ("bytes", True),
        ("rate", True),
        ("bandwidth", True),
    )

    def __init__(self, as_json: bool) -> None:
        from zmqbus.cli.render import TopicTable

        self._table: TopicTable = TopicTable()
        self._json = as_json
        self._started = now()
        self._live = None if as_json or not shell.on_terminal() else _Live(self._picture)

    def add(self, fields: Fields) -> None:
        """Count it."""
        self._table.add(fields.message.topic, fields.size or 0, now())

    def pause(self) -> None:
        """Show the rates of the last seconds."""
        if self._live is not None:
            self._live.redraw()

    def end(self) -> None:
        """Show the totals, with the rates of the whole time."""
        if self._live is not None:
            self._live.close()
        seconds = max(now() - self._started, 1e-3)
        rows = self._table.rows(now())
        if self._json:
            for row in rows:
                line = {
                    "topic": row.topic,
                    "messages": row.count,
                    "bytes": row.bytes,
                    "messages_per_second": round(row.count / seconds, 3),
                    "bytes_per_second": round(row.bytes / seconds, 3),
                }
                click.echo(msgspec.json.encode(line))
        else:
            shell.show_table(self.COLUMNS, [self._cells(row, row.count / seconds) for row in rows])
        if self._table.dropped:
            remark(f"{plural(self._table.dropped, 'message')} of further topics are not in the table")

    def _picture(self, height: int) -> RenderableType:
        rows = self._table.rows(now())
        shown = [self._cells(row, row.rate) for row in rows[: max(1, height - 5)]]
        if len(rows) > len(shown):
            shown.append([f"… and {plural(len(rows) - len(shown), 'more topic')}", "", "", "", ""])
        return shell.make_table(self.COLUMNS, shown)

    @staticmethod
    def _cells(row: Any, rate: float) -> list[str]:
        topic, count, size, _ = row.cells()
        return [topic, count, size, human_rate(rate), f"{human_bytes(round(rate * row.bytes / row.count))}/s"]


class Latest:
    """The last message of each topic. Live on a terminal, otherwise once, at the end."""

    def __init__(self, render: Callable[[Fields], str], watch: Watch, live: bool) -> None:
        from zmqbus.cli.render import LastPerTopic

        self._last: LastPerTopic = LastPerTopic()
        self._render = render
        self._watch = watch
        self._live = _Live(self._picture) if live and shell.on_terminal() else None

    def add(self, fields: Fields) -> None:
        """Keep it in place of the one before."""
        self._last.add(fields.message)

    def pause(self) -> None:
        """Show what there is."""
        if self._live is not None:
            self._live.redraw()

    def end(self) -> None:
        """Print the last messages, by topic."""
        if self._live is not None:
            self._live.close()
        for line in self._lines():
            click.echo(line)
        if self._last.dropped:
            remark(f"{plural(self._last.dropped, 'message')} of further topics are not shown")

    def _lines(self) -> Iterator[str]:
        at = time_ns() / 1e9
        for message in self._last.messages():
            yield self._render(Fields(message, now=at, node=self._watch.name(message.origin)))

    def _picture(self, height: int) -> RenderableType:
        from rich.text import Text

        lines = list(self._lines())
        if len(lines) > height - 2:
            lines[height - 3 :] = [f"… and {plural(len(lines) - height + 3, 'more topic')}"]
        return Text.from_ansi("\n".join(lines), no_wrap=True)


class _Live:
    """A picture on the terminal that is drawn anew a few times a second, and gone at the end."""

    def __init__(self, picture: Callable[[int], RenderableType]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._picture = picture
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()
        self._due = 0.0

    def redraw(self) -> None:
        """If it is time to."""
        if now() >= self._due:
            self._live.update(self._picture(self._console.height), refresh=True)
            self._due = now() + REDRAW

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._live.stop()


# --- the command -------------------------------------------------------------------------------


def _renderer(template: str | None, as_json: bool, dump: bool) -> Callable[[Fields], str]:
    from rich.console import Console

    from zmqbus.cli.render import FormatString, Line

    if (template is not None) + as_json + dump > 1:
        raise click.UsageError("--json, --format and --hex are different forms: choose one")
    if as_json:
        return to_json
    if template is not None:
        return FormatString(template).render
    return Line(Console(), dump=dump).render


@click.command()
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("-x", "--exclude", multiple=True, metavar="PATTERN", help="Leave out what fits this; may be repeated.")
@click.option("--where", metavar="EXPR", help="Only messages for which this is true, such as 'value.status >= 500'.")
@click.option("-F", "--format", "template", metavar="TEMPLATE", help="Such as '{time:%H:%M:%S} {node} {value}'.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--hex", "dump", is_flag=True, help="A hexdump of every value.")
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="N", help="End after N messages.")
@click.option("--for", "seconds", type=Duration(), help="End after this time, such as 10s or 1h30m.")
@click.option(
    "--subjects", is_flag=True, help="A table of topics with messages, rate and bandwidth; live on a terminal."
)
@click.option(
    "--last-per-topic", "latest", is_flag=True, help="Only the last message of each topic; live on a terminal."
)
@click.option("--fail-on-loss", is_flag=True, help="Exit with 4 if messages were lost on the way here.")
@click.option(
    "-q", "--quiet", is_flag=True, help="No report at the end, unless messages were lost or passed by unseen."
)
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

    tap only looks on. When messages come faster than the terminal takes them, it lets some pass unseen, and says how
    many; publishers are not held up.

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
    from zmqbus.cli.where import compile_where

    patterns = patterns or (">",)
    for pattern in (*patterns, *exclude):
        check_pattern(pattern)
    excluded = Matcher(exclude).matches if exclude else None
    test = compile_where(where) if where is not None else None
    render = _renderer(template, as_json, dump)
    if subjects and (latest or template is not None or dump):
        raise click.UsageError("--subjects is a table of its own: leave out --last-per-topic, --format and --hex")

    with bus.join("tap") as node, node.subscribe(*patterns) as subscription:
        shell.greet(patterns, bus)
        watch = Watch(node)
        drain = Drain(subscription)
        view: View
        if subjects:
            view = Subjects(as_json)
        elif latest:
            view = Latest(render, watch, live=not as_json and template is None)
        else:
            view = Stream(render)

        def pause() -> None:
            view.pause()
            watch.poll()

        looked_at = matched = 0
        silent = False
        try:
            try:
                for message, at in shell.messages(drain.take, seconds, pause):
                    looked_at += 1
                    if excluded is not None and excluded(message.topic):
                        continue
                    fields = Fields(message, now=at, node=watch.name(message.origin))
                    if test is None or test(fields):
                        matched += 1
                        view.add(fields)
                        if matched == count:
                            break
            finally:
                view.end()
        except BrokenPipeError:
            silent = True
            raise
        finally:
            unseen = drain.unseen
            if not silent and (not quiet or subscription.lost or unseen):
                remark(_report(looked_at, matched, unseen, shell.loss_report(subscription, watch.name)))
    if fail_on_loss and subscription.lost:
        return shell.LOST
    return shell.TIMED_OUT if count is not None and matched < count else shell.OK


def _report(looked_at: int, matched: int, unseen: int, losses: str) -> str:
    seen = plural(looked_at + unseen, "message")
    parts = (
        f"{seen} seen, {matched:,} matched and shown" if matched < looked_at + unseen else f"{seen} shown",
        f"{unseen:,} passed by unseen, faster than they could be shown" if unseen else "",
        losses,
    )
    return "; ".join(filter(None, parts))
