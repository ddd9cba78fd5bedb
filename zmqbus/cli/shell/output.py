"""Standard output: a stream of messages for whoever reads it as slowly as they like, tables, and how much was lost."""

from __future__ import annotations

import os
import select
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import click

from zmqbus.cli.messages.forms import Fields, to_json
from zmqbus.cli.shell.stopping import PEEK, check, suspended
from zmqbus.net.clock import now

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from zmqbus.node.events import LogGap
    from zmqbus.protocol.streams.stream import Gap

BLOCK_BYTES = 64 * 1024  # gathered before it is written, while more comes
STEP_BYTES = 4096  # at a time: what a pipe that is ready takes without blocking
PATIENCE = 1.0  # seconds that whoever reads our output has for the rest of it when we end
METER_AFTER = 0.5  # seconds that work takes before it gets a bar
METER_EVERY = 0.1  # … and between two pictures of it
GAPS_SHOWN = 20  # ranges in a report
FOLDED = 16  # cells that a column keeps, when texts have to be folded
GAP = 3  # cells between columns; one more on either side of the table


def on_terminal() -> bool:
    """Whether standard output is a terminal, for people; otherwise it is for programs."""
    return sys.stdout.isatty()


def colored() -> bool:
    """Whether that terminal should show colours, or bold."""
    return on_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")


def reader_has_left() -> bool:
    """Whether nobody reads standard output any more: it is a pipe, and its other end is closed."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # it is no file
        return False
    return any(events & select.POLLERR for _, events in poll.poll(0))


def plural(n: int, noun: str) -> str:
    """`1 message`, `1,204 messages`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


class Output:
    """Messages on their way to standard output. Waits for a slow reader in short steps, and counts what that took."""

    def __init__(self) -> None:
        sys.stdout.flush()
        buffer = sys.stdout.buffer
        self._raw = getattr(buffer, "raw", buffer)
        self._poll: select.poll | None = select.poll()
        try:
            self._poll.register(self._raw.fileno(), select.POLLOUT)
        except OSError:  # it is no file
            self._poll = None
        self._encoding = sys.stdout.encoding
        self._pending = bytearray()
        self._ends: deque[int] = deque()  # of messages that are pending, in bytes since the beginning
        self._written = 0
        self._shown = 0

    def put(self, text: str) -> None:
        """One message more, without its last newline. It is written by and by, at the latest by `flush`."""
        self.put_bytes(text.encode(self._encoding, "backslashreplace") + b"\n")

    def put_bytes(self, data: bytes) -> None:
        """The same for one that is encoded already."""
        self._pending += data
        self._ends.append(self._written + len(self._pending))
        if len(self._pending) >= BLOCK_BYTES:
            self.flush()

    def flush(self, patience: float | None = None) -> None:
        """Write what is pending: all of it, unless Ctrl-Z comes; or what is taken within `patience` seconds.

        Raises:
            Stopped: the command was asked to stop, and nothing was said about patience. The rest is still pending.
        """
        until = None if patience is None else now() + patience
        while self._pending:
            if until is None:
                check()
                if suspended():
                    return
            elif now() >= until:
                return
            if self._poll is None or self._poll.poll(1000 * (PEEK if until is None else max(0.0, until - now()))):
                written = self._raw.write(bytes(self._pending[:STEP_BYTES])) or 0
                del self._pending[:written]
                self._written += written

    @property
    def shown(self) -> int:
        """Messages that were written, to their ends."""
        while self._ends and self._ends[0] <= self._written:
            self._ends.popleft()
            self._shown += 1
        return self._shown


def renderer(template: str | None, as_json: bool) -> Callable[[Fields], str]:
    """How a message is printed: as a line of JSON, by a template, or just topic and value."""
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


class Meter:
    """How far long work has come: a bar on stderr, on a terminal only, and not for work that is done at once."""

    def __init__(self, label: str, *, shown: bool = True) -> None:
        self._label = label
        self._shown = shown and sys.stderr is not None and sys.stderr.isatty()
        self._due = now() + METER_AFTER
        self._bar: Progress | None = None

    def update(self, done: int, total: int) -> None:
        """Whoever works calls this often. Raises Stopped, if the command was asked to stop."""
        check()
        if not self._shown or now() < self._due:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = TextColumn(self._label), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
            self._bar.add_task("")
        self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, refresh=True)
        self._due = now() + METER_EVERY

    def hide(self) -> None:
        """Take the bar away: something else is to be printed. It comes back with the next update."""
        if self._bar is not None:
            self._bar.stop()


# --- saying what was lost ----------------------------------------------------------------------


class Losses(Protocol):
    """What a subscription knows about what it lost."""

    @property
    def lost(self) -> int:
        """Messages."""

    @property
    def gaps(self) -> list[Gap]:
        """Ranges."""


def loss_report(losses: Losses, name: Callable[[int], str], dropped: Sequence[LogGap] = ()) -> str:
    """`nothing lost`, or how much, and below it which messages, by publisher and range; of a log also by offsets that
    are no more."""
    from zmqbus.cli.messages.render import escape

    if not losses.lost:
        return "nothing lost"
    gaps = losses.gaps
    lines = [f"{plural(losses.lost, 'message')} lost:"]
    lines += [
        f"  offsets {one.first} to {one.last} of {escape(one.forwarder)} ({one.count:,}, of any topic)"
        for one in dropped[:GAPS_SHOWN]
    ]
    for gap in gaps[:GAPS_SHOWN]:
        span = f"#{gap.first}" if gap.first == gap.last else f"#{gap.first} to #{gap.last}"
        lines.append(f"  {escape(gap.topic)}  {escape(name(gap.origin) or f'{gap.origin:016x}')}{span} ({gap.count:,})")
    if (more := max(0, len(gaps) - GAPS_SHOWN) + max(0, len(dropped) - GAPS_SHOWN)) > 0:
        lines.append(f"  … and {plural(more, 'more range')}")
    return "\n".join(lines)


# --- tables ------------------------------------------------------------------------------------


class Column(NamedTuple):
    """`whole`: never folded, to be copied. `spare`: left out where there is no room, the highest first; 0: never."""

    heading: str
    right: bool = False
    whole: bool = False
    spare: int = 0


def make_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> Table:
    """A table for a terminal so many cells wide."""
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    widths = [max(map(cell_len, cells)) for cells in zip([one.heading for one in columns], *rows, strict=True)]
    least = [full if one.whole else min(full, FOLDED) for one, full in zip(columns, widths, strict=True)]
    shown = list(range(len(columns)))
    while sum(least[i] + GAP for i in shown) - GAP + 2 > width and any(columns[i].spare for i in shown):
        shown.remove(max(shown, key=lambda i: columns[i].spare))
    table = Table(box=box.SIMPLE_HEAD, header_style="bold" if colored() else "", pad_edge=False)
    for i in shown:
        one = columns[i]
        table.add_column(
            one.heading,
            justify="right" if one.right else "left",
            overflow="fold",
            no_wrap=one.whole,
            min_width=widths[i] if one.whole else len(one.heading),
        )
    for row in rows:
        table.add_row(*(Text(row[i]) for i in shown))  # not markup: these are texts of peers
    return table


def show_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """On a terminal a table that fits it; elsewhere plain columns, whole, under one line of headings."""
    if on_terminal():
        from rich.console import Console

        console = Console()
        console.print(make_table(columns, rows, console.width), crop=False)
        return
    lines = [[one.heading for one in columns], *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if one.right else cell.ljust(width)
            for cell, width, one in zip(line, widths, columns, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())
