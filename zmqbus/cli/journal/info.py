"""`zmqbus journal info`: what a journal holds, at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from zmqbus.cli import shell
from zmqbus.cli.journal.shared import directory, helpful
from zmqbus.cli.messages.forms import human_bytes, moment, rfc3339
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.output import Column, plural, show_table

if TYPE_CHECKING:
    from zmqbus.journal.inspect import Info

ROWS_SHOWN = 20  # of topics, cursors and files in quarantine, each; --json has all

_CURSORS: tuple[Column, ...] = (Column("cursor"), Column("next offset", right=True), Column("lag", right=True))
_TOPICS: tuple[Column, ...] = (Column("topic"), Column("streams", right=True))
_FILES: tuple[Column, ...] = (Column("in quarantine", whole=True), Column("bytes", right=True))


def _time(time_ns: int | None) -> str | None:
    return None if time_ns is None else rfc3339(moment(time_ns / 1e9))


def _local(time_ns: int | None) -> str:
    return "?" if time_ns is None else moment(time_ns / 1e9).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


def _row(seen: Info) -> dict[str, Any]:
    return {
        "path": seen.path,
        "identity": seen.uuid,
        "format": seen.version,
        "in_use": seen.holder is not None,
        "holder": seen.holder or None,
        "first_offset": seen.first_offset,
        "next_offset": seen.next_offset,
        "messages": seen.next_offset - seen.first_offset,
        "oldest": _time(seen.oldest_ns),
        "newest": _time(seen.newest_ns),
        "segments": [
            {"path": one.path, "bytes": one.file_bytes, "first_offset": one.base_offset} for one in seen.segments
        ],
        "bytes": seen.bytes_used,
        "bytes_free": seen.bytes_free,
        "streams": seen.streams,
        "topics": [{"topic": topic, "streams": streams} for topic, streams in seen.topics.items()],
        "cursors": [
            {"name": name, "offset": cursor.offset, "lag": max(0, seen.next_offset - cursor.offset)}
            for name, cursor in seen.cursors.items()
        ],
        "quarantine": [{"path": path, "bytes": size} for path, size in seen.quarantined],
        "tail": seen.tail,
        "damage": None if seen.damage is None else str(seen.damage),
    }


def _summary(seen: Info) -> list[tuple[str, str]]:
    messages = seen.next_offset - seen.first_offset
    stretch = f" (offsets {seen.first_offset} to {seen.next_offset - 1})" if messages else ""
    holder = "no" if seen.holder is None else f"by process {seen.holder}" if seen.holder else "by another process"
    tail = "being written" if seen.holder is not None else "unfinished: the next start puts it into quarantine"
    rows = [
        ("journal", seen.path),
        ("identity", f"{seen.uuid} (format version {seen.version})"),
        ("in use", holder),
        ("messages", f"{messages:,}{stretch}"),
        ("next offset", str(seen.next_offset)),
    ]
    if messages:
        rows.append(("times", f"{_local(seen.oldest_ns)} to {_local(seen.newest_ns)}"))
    rows += [
        ("segments", f"{len(seen.segments):,}, {human_bytes(seen.bytes_used)}; {human_bytes(seen.bytes_free)} free"),
        ("streams", f"{seen.streams:,} on {plural(len(seen.topics), 'topic')}"),
        ("cursors", f"{len(seen.cursors):,}"),
        ("quarantine", plural(len(seen.quarantined), "file")),
    ]
    if seen.tail is not None:
        rows.append(("its end", tail))
    if seen.damage is not None:
        rows.append(("damaged", f"{seen.damage.path} at byte {seen.damage.position}; what follows is not counted"))
    return rows


def _table(columns: tuple[Column, ...], rows: list[list[str]], noun: str) -> None:
    if not rows:
        return
    click.echo()
    show_table(columns, rows[:ROWS_SHOWN])
    if len(rows) > ROWS_SHOWN:
        click.echo(f"… and {plural(len(rows) - ROWS_SHOWN, f'more {noun}')} (--json has all)")


@click.command()
@directory
@click.option("--json", "as_json", is_flag=True, help="All of it as one JSON object.")
def info(directory: str, as_json: bool) -> int:
    """Show what is in the journal DIR, and who uses it.

    Quick: headers and the last segment are read, and nothing else. Whether all is sound, verify tells.
    """
    from zmqbus.cli.messages.render import escape
    from zmqbus.journal.inspect import info as look

    with helpful(directory):
        seen = look(directory)
    if as_json:
        click.echo(msgspec.json.encode(_row(seen)))
    else:
        for label, text in _summary(seen):
            click.echo(f"{label:11}  {escape(text)}")
        cursors = sorted(seen.cursors.items(), key=lambda item: (item[1].offset, item[0]))
        lags = [
            [escape(name), str(cursor.offset), f"{max(0, seen.next_offset - cursor.offset):,}"]
            for name, cursor in cursors
        ]
        _table(_CURSORS, lags, "cursor")
        _table(_TOPICS, [[escape(topic), f"{streams:,}"] for topic, streams in seen.topics.items()], "topic")
        _table(_FILES, [[escape(path), human_bytes(size)] for path, size in seen.quarantined], "file")
    if seen.damage is not None:
        remark(escape(str(seen.damage)))
        return shell.DATA_ERROR
    return shell.OK
