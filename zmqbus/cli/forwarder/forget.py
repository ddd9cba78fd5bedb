"""`zmqbus forwarder forget`: take away the cursor of a durable subscription that nobody will continue."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from zmqbus.cli import shell
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.bus import SETTLE, Bus, Duration
from zmqbus.cli.shell.output import plural
from zmqbus.protocol import commands

if TYPE_CHECKING:
    from zmqbus.cli.forwarder.asking import Cursor, Figures, Told
    from zmqbus.node.faces.node import Node


def freed(figures: Figures, cursors: list[Cursor], cursor: Cursor) -> str:
    """What retention may do once this cursor is gone."""
    others = [one for one in cursors if one is not cursor]
    first = max(figures.journal_first_offset, cursor.offset)
    end = min([figures.journal_next_offset, *(one.offset for one in others)])
    if end <= first:
        if others and end <= cursor.offset and cursor.offset < figures.journal_next_offset:
            return "it holds nothing that another cursor does not hold as well"
        return "it holds nothing back"
    text = (
        f"retention may then remove {plural(end - first, 'message')} that only it holds (offsets {first} to {end - 1})"
    )
    if not figures.journal_bytes_max and not figures.journal_age_max_s:
        text += ", but is told to keep everything"
    return text


def _state(told: Told, cursor: Cursor) -> str:
    from zmqbus.cli.forwarder.status import lag
    from zmqbus.cli.messages.render import escape

    assert told.figures is not None
    behind = plural(lag(told.figures, cursor.offset), "message")
    where = f"{escape(told.peer.name)}: cursor {escape(cursor.name)} is at offset {cursor.offset}, {behind} behind"
    return f"{where}; {freed(told.figures, told.cursors, cursor)}"


@click.command()
@click.argument("cursor")
@click.option("--forwarder", "name", metavar="NAME", help="Only at this one. Default: at all that have it.")
@click.option("--yes", is_flag=True, help="Do it. Without this, only say what would become of it.")
@click.option("--wait", type=Duration(), default=SETTLE, show_default=True, help="How long to look for nodes first.")
@click.option("--timeout", type=Duration(), default="2s", show_default=True, help="How long each has to answer.")
@click.pass_obj
def forget(bus: Bus, cursor: str, name: str | None, yes: bool, wait: float, timeout: float) -> int:
    """Take away the durable subscription named CURSOR: who comes back under that name begins anew.

    A forwarder keeps what a cursor has not passed. Forget one that nobody will continue, and retention has its way. It
    is refused while somebody reads under that name.
    """
    from zmqbus.cli.forwarder.asking import forwarders, nobody
    from zmqbus.cli.messages.render import escape

    with bus.join("forget") as (node, watch):
        found = forwarders(node, watch, name, wait, timeout)
        watch.poll()
        if not found:
            if not watch.refused:
                nobody(bus, name, node.peers())
            return shell.TIMED_OUT
        having = [(told, one) for told in found for one in told.cursors if one.name == cursor]
        silent = any(told.figures is None for told in found)
        if not having:
            names = sorted({escape(one.name) for told in found for one in told.cursors})
            there = f"; there are: {', '.join(names)}" if names else ""
            remark(f"no forwarder that answered has a cursor {escape(cursor)}{there}")
            return shell.TIMED_OUT if silent else shell.FAILED
        if busy := [escape(told.peer.name) for told, one in having if one.reading]:
            remark(f"somebody reads as {escape(cursor)} from {', '.join(busy)} at present: stop that first")
            return shell.FAILED
        for told, one in having:
            click.echo(_state(told, one))
        if not yes:
            again = f"zmqbus forwarder forget --yes {shlex.quote(cursor)}"
            remark(
                f"nothing was changed; to do it: {escape(again)}"
                + (f" --forwarder {shlex.quote(name)}" if name else "")
            )
            return shell.USAGE
        return max(shell.TIMED_OUT if silent else shell.OK, _forget(node, having, timeout))


def _forget(node: Node, having: list[tuple[Told, Cursor]], timeout: float) -> int:
    from zmqbus.cli.messages.render import escape
    from zmqbus.node.faces.asking import ask

    code = shell.OK
    questions: dict[int, commands.Body] = {
        told.peer.origin: commands.Commit(one.name, one.offset, forget=True) for told, one in having
    }
    answers = ask(node, questions, timeout)
    for told, one in having:
        who = escape(told.peer.name)
        match answers.get(told.peer.origin):
            case commands.Commit():
                click.echo(f"{who}: cursor {escape(one.name)} is forgotten")
            case commands.Error(reason=reason):
                remark(f"{who} refused: {escape(reason)}")
                code = shell.FAILED
            case _:
                remark(
                    f"{who} did not answer within {timeout:g} s: whether it has forgotten {escape(one.name)}, ask anew"
                )
                code = shell.TIMED_OUT
    return code
