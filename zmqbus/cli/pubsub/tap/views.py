"""How `tap` shows what matches: line by line, as a table of topics, or only the last message of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import click
import msgspec

from zmqbus.cli.messages.forms import Fields, human_bytes, human_rate
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.output import PATIENCE, Column, Output, make_table, on_terminal, plural, show_table
from zmqbus.net.clock import now, time_ns

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zmqbus.cli.messages.render import LastPerTopic, TopicTable

REDRAW = 0.25  # seconds between two pictures of a live table


class View(Protocol):
    """How messages that match are shown."""

    def add(self, fields: Fields) -> None:
        """One more."""

    def pause(self) -> None:
        """There are no more at the moment, or it is time to look up."""

    def hide(self) -> None:
        """The terminal is somebody else's for a while."""

    def end(self) -> None:
        """That was all."""

    def account(self, matched: int) -> str:
        """In the end: how many matched, and what became of them."""


class Stream:
    """One line (or more, for a map or a hexdump) per message, at once."""

    def __init__(self, render: Callable[[Fields], str]) -> None:
        self._render = render
        self._output = Output()

    def add(self, fields: Fields) -> None:
        """Print it."""
        self._output.put(self._render(fields))

    def pause(self) -> None:
        """Let it out."""
        self._output.flush()

    def hide(self) -> None:
        """There is nothing to hide."""

    def end(self) -> None:
        """Let out what is taken without much ado."""
        self._output.flush(PATIENCE)

    def account(self, matched: int) -> str:
        """What was shown."""
        shown = self._output.shown
        return f"{matched:,} matched and shown" if shown == matched else f"{matched:,} matched, {shown:,} shown"


class Subjects:
    """A table of topics: messages, rate, bandwidth. Live on a terminal, otherwise once, at the end."""

    COLUMNS: tuple[Column, ...] = (
        Column("topic"),
        Column("messages", right=True),
        Column("bytes", right=True),
        Column("rate", right=True),
        Column("bandwidth", right=True),
    )

    def __init__(self, as_json: bool) -> None:
        from zmqbus.cli.messages.render import TopicTable

        self._table: TopicTable = TopicTable()
        self._json = as_json
        self._started = now()
        self._live = None if as_json or not on_terminal() else _Live(self._picture)

    def add(self, fields: Fields) -> None:
        """Count it."""
        self._table.add(fields.message.topic, fields.size or 0, now())

    def pause(self) -> None:
        """Show the rates of the last seconds."""
        if self._live is not None:
            self._live.redraw()

    def hide(self) -> None:
        """Take the picture away."""
        if self._live is not None:
            self._live.hide()

    def end(self) -> None:
        """Show the totals, with the rates of the whole time."""
        self.hide()
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
            show_table(self.COLUMNS, [self._cells(row, row.count / seconds) for row in rows])
        if self._table.dropped:
            remark(f"{plural(self._table.dropped, 'message')} of further topics are not in the table")

    def _picture(self, width: int, height: int) -> RenderableType:
        rows = self._table.rows(now())
        shown = [self._cells(row, row.rate) for row in rows[: max(1, height - 5)]]
        if len(rows) > len(shown):
            shown.append([f"… and {plural(len(rows) - len(shown), 'more topic')}", "", "", "", ""])
        return make_table(self.COLUMNS, shown, width)

    def account(self, matched: int) -> str:
        """How many are in the table."""
        counted, topics = matched - self._table.dropped, plural(len(self._table), "topic")
        return f"{matched:,} matched, {'all' if counted == matched else f'{counted:,}'} counted in {topics}"

    @staticmethod
    def _cells(row: Any, rate: float) -> list[str]:
        topic, count, size, _ = row.cells()
        return [topic, count, size, human_rate(rate), f"{human_bytes(round(rate * row.bytes / row.count))}/s"]


class Latest:
    """The last message of each topic. Live on a terminal, each on one line; otherwise once, at the end."""

    def __init__(self, render: Callable[[Fields], str], brief: Callable[[Fields], str] | None) -> None:
        from zmqbus.cli.messages.render import LastPerTopic

        self._last: LastPerTopic = LastPerTopic()
        self._render = render
        self._brief = brief
        self._nodes: dict[int, str] = {}
        self._output = Output()
        self._live = _Live(self._picture) if brief is not None and on_terminal() else None

    def add(self, fields: Fields) -> None:
        """Keep it in place of the one before."""
        self._last.add(fields.message)
        self._nodes[fields.message.origin] = fields.node

    def pause(self) -> None:
        """Show what there is."""
        if self._live is not None:
            self._live.redraw()

    def hide(self) -> None:
        """Take the picture away."""
        if self._live is not None:
            self._live.hide()

    def end(self) -> None:
        """Print the last messages, by topic."""
        self.hide()
        for line in self._lines(self._render):
            self._output.put(line)
        self._output.flush(PATIENCE)
        if self._last.dropped:
            remark(f"{plural(self._last.dropped, 'message')} of further topics are not shown")

    def account(self, matched: int) -> str:
        """Of how many topics the last one was shown."""
        return f"{matched:,} matched, {self._output.shown:,} shown: the last of each topic"

    def _lines(self, render: Callable[[Fields], str]) -> Iterator[str]:
        at = time_ns() / 1e9
        for message in self._last.messages():
            yield render(Fields(message, now=at, node=self._nodes[message.origin]))

    def _picture(self, width: int, height: int) -> RenderableType:
        from rich.text import Text

        assert self._brief is not None
        lines = list(self._lines(self._brief))
        if len(lines) > height - 2:
            lines[height - 3 :] = [f"… and {plural(len(lines) - height + 3, 'more topic')}"]
        return Text.from_ansi("\n".join(lines), no_wrap=True)


class _Live:
    """A picture on the terminal that is drawn anew a few times a second, and gone while hidden."""

    def __init__(self, picture: Callable[[int, int], RenderableType]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._picture = picture
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._due = 0.0

    def redraw(self) -> None:
        """If it is time to."""
        if now() >= self._due:
            self._live.start()
            self._live.update(self._picture(self._console.width, self._console.height), refresh=True)
            self._due = now() + REDRAW

    def hide(self) -> None:
        """Leave the terminal as it was, until the next time."""
        self._live.stop()
