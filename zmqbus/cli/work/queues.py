"""`zmqbus queues`: what waits on the bus to be done, with whom, and how it goes on. Every node is asked for its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import click
import msgspec

from zmqbus.cli.messages.forms import human_age, human_rate
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.bus import SETTLE, Bus, Duration, Watch, settle
from zmqbus.cli.shell.output import Column, make_table, on_terminal, show_table
from zmqbus.cli.shell.stopping import rest
from zmqbus.net.clock import now, time_ns
from zmqbus.protocol.commands import QueueFigures
from zmqbus.protocol.queues.letters import DEAD_PREFIX
from zmqbus.protocol.topics import Matcher, check_pattern

if TYPE_CHECKING:
    from zmqbus.node.faces.node import Node

BETWEEN = 1.0  # seconds between two looks, from which the rate is worked out

_COLUMNS: tuple[Column, ...] = (
    Column("queue"),
    Column("group", spare=3),
    Column("owner"),
    Column("waiting", right=True),
    Column("in flight", right=True),
    Column("delayed", right=True, spare=5),
    Column("redelivered", right=True, spare=2),
    Column("dead", right=True),
    Column("workers", right=True),
    Column("rate", right=True, spare=1),
    Column("oldest", right=True, spare=4),
)

Key = tuple[int, str, str]
"""Origin of the owner, topic and group."""


class Row(msgspec.Struct):
    """One queue of one owner, or what one group has to do of a topic."""

    queue: str
    group: str
    owner: str
    origin: str
    waiting: int = 0
    in_flight: int = 0
    delayed: int = 0
    redelivered: int = 0
    done: int = 0
    given_up: int = 0
    """Messages, since its owner started."""
    dead: int = 0
    """Dead letters that somebody has to look after."""
    workers: int = 0
    rate: float | None = None
    """Done per second, between two looks."""
    oldest_s: float | None = None
    """How long the oldest has been there that is not done."""


class Looking:
    """Looks at the queues of all nodes, again and again."""

    def __init__(self, node: Node, watch: Watch, patterns: tuple[str, ...], timeout: float) -> None:
        self.silent: set[str] = set()
        """Names of nodes that did not answer the last time."""
        self._node = node
        self._watch = watch
        self._matches = Matcher(patterns or (">",)).matches
        self._timeout = timeout
        self._before: tuple[float, dict[Key, int]] | None = None

    def look(self) -> list[Row]:
        """By queue, owner and group."""
        from zmqbus.node.faces.asking import queues_of

        peers = {peer.origin: peer for peer in self._node.peers()}
        told = queues_of(self._node, peers, self._timeout)
        at, rows = now(), dict[Key, Row]()
        for origin, owned in told.items():
            for figures in owned:
                self._count(rows, origin, peers[origin].name, figures)
        self.silent = {peers[origin].name for origin in peers.keys() - told.keys()}
        if self._before is not None:
            then, done = self._before
            for key, row in rows.items():
                row.rate = max(0, row.done - done.get(key, row.done)) / max(at - then, 1e-3)
        self._before = at, {key: row.done for key, row in rows.items()}
        shown = (row for key, row in rows.items() if not _is_idle(row) or (*key[:2], "") not in rows)
        return sorted(shown, key=lambda row: (row.queue, row.owner, row.origin, row.group))

    def _count(self, rows: dict[Key, Row], origin: int, owner: str, figures: QueueFigures) -> None:
        queue = figures.topic.removeprefix(DEAD_PREFIX)
        if not self._matches(queue):
            return
        row = rows.setdefault((origin, queue, figures.group), Row(queue, figures.group, owner, f"{origin:016x}"))
        if queue != figures.topic:
            row.dead += figures.waiting + figures.in_flight + figures.delayed
            return
        row.waiting += figures.waiting
        row.in_flight += figures.in_flight
        row.delayed += figures.delayed
        row.redelivered += figures.redelivered
        row.done += figures.done
        row.given_up += figures.dead
        row.workers += figures.workers
        if figures.oldest_ns:
            row.oldest_s = max(row.oldest_s or 0.0, time_ns() / 1e9 - figures.oldest_ns / 1e9)


def _is_idle(row: Row) -> bool:
    """A group of workers of a queue, of which nothing was ever published."""
    return bool(row.group) and not any((row.waiting, row.in_flight, row.delayed, row.done, row.given_up))


def _cells(row: Row) -> list[str]:
    from zmqbus.cli.messages.render import escape

    return [
        escape(row.queue),
        escape(row.group),
        escape(row.owner),
        *(f"{n:,}" for n in (row.waiting, row.in_flight, row.delayed, row.redelivered, row.dead, row.workers)),
        "" if row.rate is None else human_rate(row.rate),
        "" if row.oldest_s is None else human_age(row.oldest_s),
    ]


def _json(row: Row) -> bytes:
    return msgspec.json.encode(msgspec.structs.asdict(row) | {"group": row.group or None})


@click.command()
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--watch", "watching", is_flag=True, help="Go on: a live table, or a line for each that has changed.")
@click.option("--wait", type=Duration(), default=SETTLE, show_default=True, help="How long to look for nodes first.")
@click.option("--timeout", type=Duration(), default="2s", show_default=True, help="How long each node has to answer.")
@click.pass_obj
def queues(bus: Bus, patterns: tuple[str, ...], as_json: bool, watching: bool, wait: float, timeout: float) -> None:
    """List the queues of the bus: what waits, is with workers, was given out again, and is dead.

    A queue is its owner's: of the forwarder that claims it, or else of each node that pushed to it. The rate is that of
    jobs done in the last second, and `oldest` the age of the first that is not.
    """
    for pattern in patterns:
        check_pattern(pattern)
    with bus.join("queues") as (node, watch):
        settle(node, watch, wait)
        looking = Looking(node, watch, patterns, timeout)
        rows = looking.look()
        if watching:
            _go_on(looking, watch, as_json, rows)
        if rows:
            rest(BETWEEN)
            rows = looking.look()
        watch.poll()
        if as_json:
            for row in rows:
                click.echo(_json(row))
        elif rows:
            show_table(_COLUMNS, [_cells(row) for row in rows])
        _tell(looking, rows, bus, watch, len(node.peers()))


def _tell(looking: Looking, rows: list[Row], bus: Bus, watch: Watch, others: int) -> None:
    from zmqbus.cli.messages.render import escape

    for name in sorted(looking.silent):
        remark(f"{escape(name)} did not say what waits there")
    if not rows and not others and not watch.refused:
        remark(f"no other node is on bus {bus.name!r}")
    elif not rows and others > len(looking.silent):
        remark(f"no such queue is on bus {bus.name!r}")


def _go_on(looking: Looking, watch: Watch, as_json: bool, rows: list[Row]) -> NoReturn:
    if not as_json and on_terminal():
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            while True:
                live.update(make_table(_COLUMNS, [_cells(row) for row in rows], live.console.width), refresh=True)
                rest(BETWEEN)
                watch.poll()
                rows = looking.look()
    shown: dict[tuple[str, str, str], bytes] = {}
    while True:
        for row in rows:
            key = row.origin, row.queue, row.group
            steady = _json(msgspec.structs.replace(row, oldest_s=None))  # that grows all the time
            if shown.get(key) != steady:
                shown[key] = steady
                click.echo(_json(row) if as_json else "  ".join(_cells(row)))
        rest(BETWEEN)
        watch.poll()
        rows = looking.look()
