"""`zmqbus forwarder status`: how the forwarders of a bus are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from zmqbus.cli import shell
from zmqbus.cli.messages.forms import human_age, human_bytes, human_rate, told_claims
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.bus import SETTLE, Bus, Duration
from zmqbus.cli.shell.output import Column, plural, show_table

if TYPE_CHECKING:
    from zmqbus.cli.forwarder.asking import Figures, Told

_FORWARDERS: tuple[Column, ...] = (
    Column("forwarder"),
    Column("claims", spare=2),
    Column("journal", right=True),
    Column("segments", right=True, spare=8),
    Column("offsets", right=True, whole=True),
    Column("in", right=True),
    Column("bytes in", right=True, spare=1),
    Column("streams", right=True, spare=5),
    Column("unacked", right=True, spare=4),
    Column("commits", right=True, spare=7),
    Column("last", right=True, spare=6),
    Column("fsync", right=True, spare=3),
    Column("full"),
    Column("up", right=True, spare=9),
)
_CURSORS: tuple[Column, ...] = (
    Column("cursor"),
    Column("forwarder"),
    Column("next offset", right=True),
    Column("lag", right=True),
    Column("read by"),
)


def _row(told: Told) -> dict[str, Any]:
    peer, figures = told.peer, told.figures
    row: dict[str, Any] = {
        "name": peer.name,
        "origin": f"{peer.origin:016x}",
        "host": peer.host,
        "pid": peer.pid,
        "inbox": peer.inbox,
        "claims": told_claims(peer.claims),
        "answered": figures is not None,
    }
    if figures is not None:
        shown = msgspec.structs.asdict(figures)
        del shown["cursors"]
        row |= {name.removeprefix("journal_"): value for name, value in shown.items()}
        row["full"] = figures.journal_full or None
        row["cursors"] = [
            {"name": one.name, "offset": one.offset, "lag": lag(figures, one.offset), "reading": one.reading}
            for one in told.cursors
        ]
    return row


def lag(figures: Figures, offset: int) -> int:
    """Messages of the journal, on whatever topic, that a cursor has not passed."""
    return max(0, figures.journal_next_offset - offset)


def _cells(told: Told) -> list[str]:
    from zmqbus.cli.messages.render import escape

    peer, figures = told.peer, told.figures
    name, claims = escape(peer.name), escape(" ".join(told_claims(peer.claims)))
    if figures is None:
        return [name, claims, "?"] + [""] * (len(_FORWARDERS) - 3)
    first, following = figures.journal_first_offset, figures.journal_next_offset
    most = f" of {human_bytes(figures.journal_bytes_max)}" if figures.journal_bytes_max else ""
    return [
        name,
        claims,
        f"{human_bytes(figures.journal_bytes)}{most}",
        f"{figures.journal_segments:,}",
        f"{first} to {following - 1}" if following > first else f"none; {following} is next",
        human_rate(figures.journal_messages_per_s),
        f"{human_bytes(int(figures.journal_bytes_in_per_s))}/s",
        f"{figures.journal_streams:,}",
        f"{figures.journal_unacked:,}",
        f"{figures.commits:,}",
        "-" if figures.last_commit_s is None else f"{human_age(figures.last_commit_s)} ago",
        f"{human_age(figures.fsync_p50_ms / 1e3)}, max {human_age(figures.fsync_max_ms / 1e3)}"
        if figures.commits
        else "-",
        "FULL" if figures.journal_full else "no",
        human_age(figures.uptime_s),
    ]


def _cursors(told: Told, figures: Figures) -> list[list[str]]:
    from zmqbus.cli.messages.render import escape

    return [
        [
            escape(one.name),
            escape(told.peer.name),
            str(one.offset),
            f"{lag(figures, one.offset):,}",
            "somebody" if one.reading else "nobody",
        ]
        for one in sorted(told.cursors, key=lambda one: (one.offset, one.name))
    ]


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per forwarder and line.")
@click.option("--wait", type=Duration(), default=SETTLE, show_default=True, help="How long to look for nodes first.")
@click.option("--timeout", type=Duration(), default="2s", show_default=True, help="How long each has to answer.")
@click.pass_obj
def status(bus: Bus, name: str | None, as_json: bool, wait: float, timeout: float) -> int:
    """Ask every forwarder on the bus, or the one named NAME (or of that origin), how it is.

    Rates are over the last ten seconds, fsync times over the last thousand. A cursor's lag counts all messages of the
    journal that it has not passed, on whatever topic. Exits with 3 if there is none, or one does not answer.
    """
    from zmqbus.cli.forwarder.asking import forwarders, nobody
    from zmqbus.cli.messages.render import escape

    with bus.join("status") as (node, watch):
        found = forwarders(node, watch, name, wait, timeout)
        watch.poll()
        if not found:
            if not watch.refused:
                nobody(bus, name, node.peers())
            return shell.TIMED_OUT
    if as_json:
        for told in found:
            click.echo(msgspec.json.encode(_row(told)))
    else:
        show_table(_FORWARDERS, [_cells(told) for told in found])
        if rows := [row for told in found if told.figures is not None for row in _cursors(told, told.figures)]:
            click.echo()
            show_table(_CURSORS, rows)
    for told in found:
        figures, who = told.figures, escape(told.peer.name)
        if figures is not None and figures.journal_full:
            remark(f"{who} takes nothing at present: {escape(figures.journal_full)}")
        if figures is not None and figures.messages_lost:
            remark(f"{who} could not get {plural(figures.messages_lost, 'message')} that had been published")
        if figures is not None and (more := figures.cursors - len(told.cursors)) > 0:
            remark(f"{who} has {plural(more, 'more cursor')}")
    return shell.OK if all(told.figures is not None for told in found) else shell.TIMED_OUT
