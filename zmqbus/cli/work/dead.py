"""`zmqbus dead …`: the dead letters of a queue, to be listed, shown, pushed again, or thrown away.

They are jobs on a queue of their own, and this is a worker of it: what it has looked at and not dealt with it gives
back. Who wants to see them at the same moment does not.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import islice
from math import inf
from typing import TYPE_CHECKING

import click

from zmqbus.cli import shell
from zmqbus.cli.messages.forms import moment, rfc3339, value_to_json
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.bus import SETTLE, Bus, Duration, Whole, settle
from zmqbus.cli.shell.output import Column, on_terminal, plural, show_table
from zmqbus.cli.work.letters import Letters, attempts_of, name_of, own_headers, reason_of
from zmqbus.cli.work.pushing import Jobs
from zmqbus.net.clock import now
from zmqbus.protocol.queues.letters import ATTEMPTS, ORIGIN, REASON, SEQ
from zmqbus.protocol.topics import encode_topic

if TYPE_CHECKING:
    from zmqbus.node.faces.node import Node
    from zmqbus.node.work.queues.job import Job

AT_A_TIME = 10_000  # letters held; they may be large
SHOWN = 100
"""Letters that are listed, unless more are asked for."""
VALUE_SHOWN = 60  # characters, on a terminal
LOOK = 0.02  # seconds between two looks at what became of them

_COLUMNS = (
    Column("letter", whole=True),
    Column("died", whole=True, spare=1),
    Column("attempts", right=True, spare=2),
    Column("reason"),
    Column("value"),
)


def _none(bus: Bus, queue: str, names: Sequence[str]) -> int:
    which = f"no {' and no '.join(names)} among the dead letters" if names else "there are no dead letters"
    remark(f"{which} of {queue} on bus {bus.name!r}")
    return shell.FAILED if names else shell.OK


def _missing(letters: Letters) -> None:
    if letters.came < letters.there:
        remark(f"{plural(letters.there - letters.came, 'more letter')} did not come: somebody else looks at them")


# --- commands ----------------------------------------------------------------------------------


@click.group(cls=shell.Group)
def dead() -> None:
    """List, show, retry or purge what workers gave up: the dead letters of a queue.

    A job becomes a dead letter after five attempts, or when a worker rejects it. Its owner keeps it until somebody
    retries or purges it.
    """


_queue = click.argument("queue")
_names = click.argument("names", nargs=-1, metavar="[LETTER]...")
_wait = click.option(
    "--wait", type=Duration(), default=SETTLE, show_default=True, help="How long to look for nodes first."
)


@dead.command()
@_queue
@click.option("-n", "--count", type=Whole(1, AT_A_TIME), default=SHOWN, show_default=True, metavar="N", help="So many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@_wait
@click.pass_obj
def ls(bus: Bus, queue: str, count: int, as_json: bool, wait: float) -> int:
    """List the dead letters of QUEUE: when each died, after how many attempts, and why."""
    from zmqbus.cli.messages.render import compact

    encode_topic(queue)
    with bus.join("dead") as (node, watch):
        settle(node, watch, wait)
        with Letters(node, watch, queue, count) as letters:
            found = sorted(islice(letters, count), key=_age)
            if as_json:
                for letter in found:
                    click.echo(_json(queue, letter))
            elif found:
                limit = VALUE_SHOWN if on_terminal() else None
                show_table(_COLUMNS, [_cells(letter, compact(letter.value, limit)) for letter in found])
            if len(found) == count < letters.there:
                remark(f"{plural(letters.there - count, 'more letter')}: see them with -n")
            else:
                _missing(letters)
    return _none(bus, queue, ()) if not found and not watch.refused else shell.OK


@dead.command()
@_queue
@_names
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@_wait
@click.pass_obj
def show(bus: Bus, queue: str, names: tuple[str, ...], as_json: bool, wait: float) -> int:
    """Show each LETTER whole, as ls names it, or all: value and headers, and what is known of its death."""
    encode_topic(queue)
    found = 0
    with bus.join("dead") as (node, watch):
        settle(node, watch, wait)
        with Letters(node, watch, queue, AT_A_TIME) as letters:
            for letter in sorted(letters, key=_age):
                if not names or name_of(letter) in names:
                    found += 1
                    click.echo(_json(queue, letter) if as_json else _whole(letter))
            _missing(letters)
    return _none(bus, queue, names) if not found and not watch.refused else shell.OK


@dead.command()
@_queue
@_names
@click.option("--timeout", type=Duration(), help="Wait no longer than this until they are done, or on a disk.")
@_wait
@click.pass_obj
def retry(bus: Bus, queue: str, names: tuple[str, ...], timeout: float | None, wait: float) -> int:
    """Push each LETTER, as ls names it, or all, on QUEUE again, with the headers that it had.

    When a forwarder has it on its disk, or, without one, when a worker has done it, the letter is gone. What fails
    again stays a dead letter.
    """
    encode_topic(queue)
    with bus.join("dead") as (node, watch):
        settle(node, watch, wait)
        retrying = Retrying(node, Jobs(node, watch, queue, timeout), names)
        with Letters(node, watch, queue, AT_A_TIME) as letters:
            try:
                in_time = retrying.run(letters, inf if timeout is None else now() + timeout)
            finally:
                retrying.report(queue)
            _missing(letters)
    if not retrying.chosen:
        return _none(bus, queue, names) if not watch.refused else shell.OK
    return shell.TIMED_OUT if not in_time else shell.FAILED if retrying.failed else shell.OK


class Retrying:
    """Pushes letters again, and acknowledges them when they are in good hands."""

    def __init__(self, node: Node, jobs: Jobs, names: Sequence[str]) -> None:
        self.chosen = self.done = self.failed = 0
        self._died_here = 0  # of what failed, that which this node gave up itself; a forwarder counts its own
        self._node = node
        self._jobs = jobs
        self._names = names
        self._waiting: dict[int, Job] = {}  # letters, by the seq of what was pushed for each

    def run(self, letters: Letters, until: float) -> bool:
        """All of them. False: not in time."""
        while self._waiting or (letters.came < letters.there and not letters.over):
            letter = letters.get(LOOK)
            if letter is not None:
                self._take(letter, letters)
            elif self._waiting and not self._jobs.look() and self._jobs.given_up == self._died_here:
                self._settle()
            if now() >= until:
                return not self._waiting
        return True

    def _take(self, letter: Job, letters: Letters) -> None:
        headers = letter.headers or {}
        if headers.get(ORIGIN) == self._node.origin:  # what was pushed just now, and is dead once more
            letters.came -= 1
            self._again(letter, self._waiting.pop(headers.get(SEQ, 0), None))
        elif not self._names or name_of(letter) in self._names:
            self.chosen += 1
            self._waiting[self._jobs.push(letter.value, own_headers(letter))] = letter

    def _again(self, letter: Job, before: Job | None) -> None:
        """One failed again. Of its two letters one stays: the one from before, unless that is gone."""
        self.failed += 1
        if letter.origin == self._node.origin:
            self._died_here += 1
        if before is not None:
            letter.ack()
        else:
            self.done -= 1
        remark(f"{name_of(before or letter)} failed again: {reason_of(letter)}")

    def _settle(self) -> None:
        for letter in self._waiting.values():
            letter.ack()
        self.done += len(self._waiting)
        self._waiting.clear()

    def report(self, queue: str) -> None:
        """What became of them."""
        if self.chosen:
            facts = {"failed again": self.failed, "not done": self.chosen - self.done - self.failed}
            still = "".join(f", {n:,} {what} and dead letters still" for what, n in facts.items() if n)
            remark(f"{plural(self.done, 'dead letter')} of {queue} pushed again{still}")


@dead.command()
@_queue
@_names
@click.option("--yes", is_flag=True, help="Do it. Without this, only say how many there are.")
@_wait
@click.pass_obj
def purge(bus: Bus, queue: str, names: tuple[str, ...], yes: bool, wait: float) -> int:
    """Throw away each LETTER, as ls names it, or all dead letters of QUEUE. There is no way back."""
    encode_topic(queue)
    purged = 0
    with bus.join("dead") as (node, watch):
        settle(node, watch, wait)
        with Letters(node, watch, queue, AT_A_TIME) as letters:
            if not yes:
                if not letters.there:
                    return _none(bus, queue, ())
                again = f"zmqbus dead purge --yes {shlex.join((queue, *names))}"
                remark(f"{queue} has {plural(letters.there, 'dead letter')}; nothing was changed; to do it: {again}")
                return shell.USAGE
            for letter in letters:
                if not names or name_of(letter) in names:
                    letter.ack()
                    purged += 1
            _missing(letters)
    if not purged:
        return _none(bus, queue, names) if not watch.refused else shell.OK
    click.echo(f"{plural(purged, 'dead letter')} of {queue} thrown away")
    return shell.OK


# --- forms -------------------------------------------------------------------------------------


def _age(letter: Job) -> tuple[float, int, int]:
    return letter.time, letter.origin, letter.seq


def _cells(letter: Job, value: str) -> list[str]:

    died = moment(letter.time).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return [name_of(letter), died, attempts_of(letter), reason_of(letter), value]


def _json(queue: str, letter: Job) -> str:
    headers = letter.headers or {}
    return value_to_json(
        {
            "letter": name_of(letter),
            "queue": queue,
            "died": rfc3339(moment(letter.time)),
            "attempts": headers.get(ATTEMPTS),
            "reason": headers.get(REASON),
            "headers": own_headers(letter),
            "value": letter.value,
        }
    )


def _whole(letter: Job) -> str:
    from zmqbus.cli.messages.render import compact

    name, died, attempts, reason, _ = _cells(letter, "")
    lines = [f"{name}  died {died}, attempts: {attempts}: {reason}"]
    if headers := own_headers(letter):
        lines.append(f"  headers  {compact(headers)}")
    lines.append(f"  value    {compact(letter.value)}")
    return "\n".join(lines)
