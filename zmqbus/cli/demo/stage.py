"""What the audience of the demo sees: a narration with live counts below it, and in the end the account."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
import msgspec

from zmqbus.cli import shell
from zmqbus.cli.demo.account import Account, Settled
from zmqbus.cli.demo.sources import Source
from zmqbus.cli.messages.forms import human_bytes, human_rate
from zmqbus.cli.shell.output import Column, make_table, on_terminal, plural, show_table
from zmqbus.net.clock import now

if TYPE_CHECKING:
    from zmqbus.cli.demo.crew import Crew

REDRAW = 0.1

_LIVE = (
    Column(""),
    Column("sent", right=True),
    Column("received", right=True),
    Column("repaired", right=True),
    Column("lost", right=True),
    Column("journaled", right=True),
    Column("consumed", right=True),
    Column("done", right=True),
)
_SHIPPED = (Column("file"), Column("bytes", right=True), Column("lines", right=True), Column("topic"))
_ACCOUNT = (
    Column("who"),
    Column("sent", right=True),
    Column("received", right=True),
    Column("repaired", right=True),
    Column("redelivered", right=True),
    Column("lost", right=True),
    Column("lost silently", right=True),
    Column("rate", right=True),
)


class Stage:
    """A narration, and on a terminal live counts below it."""

    def __init__(self, err: bool) -> None:
        self._began = now()
        self._err = err
        self._live: Any = None
        self.crew: Crew | None = None
        if not err and on_terminal():
            from rich.live import Live

            self._live = Live(auto_refresh=False, transient=True)
            self._live.start()
        self._due = 0.0

    def say(self, text: str) -> None:
        """One line of the narration, with the time since the beginning."""
        line = f"{now() - self._began:5.1f} s  {text}"
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            click.echo(line, err=self._err)

    def redraw(self) -> None:
        """The counts as they are."""
        if self._live is None or self.crew is None or now() < self._due:
            return
        self._due = now() + REDRAW
        sent, rows, stored = 0, [], {"journaled": 0, "consumed": 0}
        places: dict[str, list[str]] = {}
        work: list[list[str]] = []
        for actor in self.crew.actors:
            facts = actor.facts
            if "received" in facts:
                counts = (f"{facts[name]:,}" for name in ("received", "repaired", "lost"))
                rows.append([f"{actor.name}{actor.state}", "", *counts, "", "", ""])
            elif "journaled" in facts:  # an offset, which is the same in every life
                stored["journaled"] = facts["journaled"] - self.crew.journal_start
                places["journaled"] = [f"{actor.name}{actor.state}", "", "", "", "", f"{stored['journaled']:,}", "", ""]
            elif "consumed" in facts:
                stored["consumed"] += facts["consumed"]
                lost = f"{facts['lost']:,}"
                places["consumed"] = [f"{actor.name}{actor.state}", "", "", "", lost, "", f"{stored['consumed']:,}", ""]
            elif "done" in facts:
                work.append([f"{actor.name}{actor.state}", "", "", "", "", "", "", f"{facts['done']:,}"])
            else:
                sent += facts.get("sent", 0)
        rows = [["shippers", f"{sent:,}", "", "", "", "", "", ""], *rows, *places.values(), *work]
        self._live.update(make_table(_LIVE, rows, self._live.console.width), refresh=True)

    def close(self) -> None:
        """Curtain."""
        if self._live is not None:
            self._live.stop()


def announce(shipped: Sequence[Source]) -> None:
    """What is going to be shipped."""
    click.echo(f"zmqbus demo: the lines of {plural(len(shipped), 'file')} of this machine, short ones again and again")
    show_table(_SHIPPED, [(str(one.path), human_bytes(one.bytes), one.lines, one.topic) for one in shipped])


# --- the account -----------------------------------------------------------------------------------


def conclude(settled: Settled, journal: str | None, as_json: bool) -> int:
    """The account, and what it proves. `journal`: where it is kept, if it is. Returns the exit code."""
    unreported, lost = sum(one.unreported for one in settled.accounts), sum(one.lost for one in settled.accounts)
    total = settled.journal.sent
    code = shell.LOST if unreported else shell.OK
    if as_json:
        report = {
            "files": len(settled.streams),
            "lines": total,
            "aggregators": settled.aggregators,
            "journal": settled.journal,
            "consumer": settled.consumer,
            "workers": settled.workers,
            "shares": settled.shares,
            "streams": settled.streams,
            "cursor": settled.cursor,
            "journal_end": settled.end,
            "exit": code,
        }
        click.echo(msgspec.json.encode(report))
        return code
    click.echo()
    show_table(_ACCOUNT, [_row(one, settled) for one in settled.accounts])
    _tell("repaired: fetched from the shippers' histories, as are the earlier lines that `late` asked for")
    _tell(
        "redelivered: given to `indexer` once more after kill -9, since nobody knew whether it had dealt with them: "
        "at least once; and to other workers, when `doomed` was killed with them in hand"
    )
    if journal is not None:
        _tell(f"The journal is kept in {journal}; look into it with zmqbus journal info.")
    if unreported:
        _tell(f"FAILED: {plural(unreported, 'line')} missing or doubled without a word. Please report this.")
        return code
    if lost:
        _tell(
            f"Proved: no line was lost silently. {plural(lost, 'line')} could not be repaired, and all were reported."
        )
        return code
    repaired = next(one.repaired for one in settled.aggregators if one.name == "paused")
    missed = (
        f"{plural(repaired, 'line')} that `paused` had missed were repaired" if repaired else "`paused` missed none"
    )
    _tell(
        f"Proved: {plural(total, 'line')} sent, and every aggregator has all that it is owed, in order and once; "
        f"{missed}; nothing was lost."
    )
    _tell(
        f"Proved: published = journaled = consumed, on each of {plural(len(settled.streams), 'stream')}, although the "
        "forwarder and its consumer were killed on the way."
    )
    spread = ", ".join(f"{one.done:,} by `{one.name}`{' until it was killed' * one.killed}" for one in settled.shares)
    _tell(
        f"Proved: of three workers who shared {settled.workers.sent:,} of them, somebody has done each: {spread}; "
        f"{plural(settled.workers.redelivered, 'line')} that `doomed` had in hand went to the others."
    )
    return code


def _row(one: Account, settled: Settled) -> list[str]:
    """What has no meaning for somebody is left blank."""
    return [
        one.name,
        f"{one.sent:,}",
        f"{one.received:,}",
        f"{one.repaired:,}" if one in settled.aggregators else "",
        f"{one.redelivered:,}" if one in (settled.consumer, settled.workers) else "",
        f"{one.lost:,}",
        f"{one.unreported:,}",
        human_rate(one.rate),
    ]


def _tell(text: str) -> None:
    """A sentence: in words that are not torn apart on a terminal, in one line elsewhere."""
    click.echo(textwrap.fill(text, shutil.get_terminal_size().columns) if on_terminal() else text)
