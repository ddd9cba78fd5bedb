"""Reading messages out of a journal: which ones (for `dump` and `export`), and `zmqbus journal dump`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from zmqbus.cli import shell
from zmqbus.cli.journal.shared import directory, helpful
from zmqbus.cli.messages.forms import Fields, to_json
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.bus import Moment, Whole
from zmqbus.cli.shell.output import PATIENCE, Output, plural
from zmqbus.cli.shell.stopping import check
from zmqbus.errors import RemoteProtocolError
from zmqbus.net.clock import time_ns
from zmqbus.protocol.message import Message
from zmqbus.protocol.topics import Matcher, check_pattern

if TYPE_CHECKING:
    from zmqbus.journal.records import Batch

# --- which messages ----------------------------------------------------------------------------


class Selection(NamedTuple):
    """What was asked for. Times are those of the publishers' clocks."""

    patterns: tuple[str, ...]
    start: int | None
    since_ns: int | None
    until_ns: int | None
    limit: int | None


_OPTIONS = (
    click.argument("patterns", nargs=-1, metavar="[PATTERN]..."),
    click.option("--from", "start", type=int, metavar="OFFSET", help="Begin there; -10: ten offsets before the end."),
    click.option(
        "--since", type=Moment(), metavar="TIME", help="Not what is older: -1h, 03:00, '2026-07-31 03:00', @1785466800."
    ),
    click.option("--until", type=Moment(), metavar="TIME", help="Only what is older than this; written as --since."),
    click.option("-n", "--count", type=Whole(1), metavar="N", help="End after N messages."),
)


def selecting(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments that make up a Selection; the command is given it as `selection`."""

    @functools.wraps(command)
    def selected(
        patterns: tuple[str, ...],
        start: int | None,
        since: int | None,
        until: int | None,
        count: int | None,
        **others: Any,
    ) -> Any:
        for pattern in patterns:
            check_pattern(pattern)
        if since is not None and until is not None and since >= until:
            raise click.UsageError("--since is not before --until: there is no time between them")
        return command(selection=Selection(patterns, start, since, until, count), **others)

    wrapped: Callable[..., Any] = selected
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


class Reading:
    """The messages of a journal that were asked for, in order, each with its batch. What is missing, or is no message,
    is remarked upon where it stands. `raw`: leave values as the msgpack they are."""

    def __init__(self, path: str, selection: Selection, *, raw: bool = False) -> None:
        from zmqbus.journal.inspect import View
        from zmqbus.journal.reader import find_time
        from zmqbus.protocol.frames import ValueDecoder

        self._selection = selection
        self._decoder = ValueDecoder(msgspec.Raw if raw else None)
        self._view = View(path)
        self.undecodable = 0
        """Messages that could not be decoded."""
        self.read = 0
        """Messages handed out."""
        segments = self._view.segments
        first, self.end = segments[0].base_offset if segments else 0, self._view.durable_offset
        start = selection.start
        self.start = first if start is None else max(first, self.end + start) if start < 0 else start
        if selection.since_ns is not None and segments:
            self.start = max(self.start, find_time(self._view, selection.since_ns))

    def messages(self, progress: Callable[[int, int], None]) -> Iterator[tuple[Message, Batch]]:
        """Calls `progress(done, total)` often. Raises JournalCorrupt at damage, after everything before it."""
        from zmqbus.journal.inspect import Finding
        from zmqbus.journal.positions import U64_MAX

        _, _, since_ns, until_ns, limit = self._selection
        since_ns, until_ns = since_ns or 0, U64_MAX if until_ns is None else until_ns
        accept = None
        if self._selection.patterns:
            matches = Matcher(self._selection.patterns).matches

            def accept(topic: bytes) -> bool:
                return matches(topic.decode(errors="replace"))

        for item in self._view.batches(self.start, accept, progress):
            if isinstance(item, Finding):
                remark(f"{item.text}: removed by retention, or declared lost by a repair")
                continue
            if not since_ns <= item.time_ns < until_ns:
                continue
            for message in self._messages(item):
                if message.offset is not None and message.offset >= self.start:
                    self.read += 1
                    yield message, item
                    if self.read == limit:
                        return

    def _messages(self, item: Batch) -> list[Message]:
        from zmqbus.cli.messages.render import escape
        from zmqbus.protocol.frames import decode_batches

        topic = item.topic.decode(errors="backslashreplace")
        parts = [bytes(item.frame)] if item.external is None else [bytes(item.frame), bytes(item.external)]
        try:
            [batch] = decode_batches(parts)
            if batch.count != item.count:
                raise RemoteProtocolError(f"{batch.count} messages where the journal counts {item.count}")
            values, headers = self._decoder.decode(batch)
        except (RemoteProtocolError, msgspec.MsgspecError, ValueError) as error:
            self.undecodable += item.count
            span = f"{item.offset}" if item.count == 1 else f"{item.offset} to {item.next_offset - 1}"
            noun = "message" if item.count == 1 else "messages"
            remark(f"{noun} {span} on {escape(topic)} cannot be decoded: {escape(str(error))}")
            return []
        return [
            Message(
                topic,
                value,
                item.first_seq + i,
                item.origin,
                item.time_ns / 1e9,
                headers[i] if headers is not None else None,
                item.offset + i,
            )
            for i, value in enumerate(values)
        ]

    def nothing(self) -> str:
        """Why there was nothing to read, where that is plain; begins with a colon."""
        if self.start < self.end or self.undecodable:
            return ""
        last = f"the last message is {self.end - 1}" if self.end else "there is no message in it"
        return f": {last}" if self._selection.since_ns is None else f": nothing is as new as that; {last}"


# --- dump --------------------------------------------------------------------------------------


@click.command()
@directory
@selecting
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--hex", "dump_hex", is_flag=True, help="A hexdump of every value.")
@click.option("-q", "--quiet", is_flag=True, help="Do not say how many messages there were; only what went wrong.")
def dump(directory: str, selection: Selection, as_json: bool, dump_hex: bool, quiet: bool) -> int:
    """Print messages of the journal DIR.

    All of them, or those whose topics fit a PATTERN.

    For each message: offset, date and time, topic, origin#seq, size and value. Times are those of the publishers'
    clocks; order is that of the journal, so with --since and --until all of it is looked through.

    \b
    Examples:
      zmqbus journal dump /var/lib/zmqbus --from -20
      zmqbus journal dump /var/lib/zmqbus 'logs.*.nginx' --since -1h
      zmqbus journal dump /var/lib/zmqbus --since 03:00 --until 03:10 --json | jq .value
    """
    if as_json and dump_hex:
        raise click.UsageError("--json and --hex are different forms: choose one")
    from rich.console import Console

    from zmqbus.cli.messages.render import Line

    with helpful(directory):
        reading = Reading(directory, selection)
    render: Callable[[Fields], str] = to_json if as_json else Line(Console(), dump=dump_hex, stored=True).render
    output = Output()

    def progress(done: int, total: int) -> None:
        check()
        output.flush()

    try:
        now = time_ns() / 1e9
        for message, _ in reading.messages(progress):
            output.put(render(Fields(message, now=now)))
        output.flush()
    finally:
        output.flush(PATIENCE)
        shown = output.shown
        if not quiet or shown < reading.read:
            text = f"{plural(reading.read, 'message')} read, {shown:,} shown" if shown < reading.read else ""
            remark(text or f"{plural(shown, 'message')} shown{reading.nothing()}")
    return shell.DATA_ERROR if reading.undecodable else shell.OK
