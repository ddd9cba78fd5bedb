"""`zmqbus demo`: the main job on real input. Every log file has a shipper, aggregators follow, one of them is stopped.

All are processes of their own (crew.py) that find each other by mDNS on the loopback interface. Here they are directed,
and in the end the account is settled: for each aggregator, what was sent since it subscribed against what it received
and what it reported as lost.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec
from click.core import ParameterSource

from zmqbus.cli import shell
from zmqbus.cli.messages.forms import human_age, human_bytes, human_rate
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.bus import Duration, Whole
from zmqbus.cli.shell.output import Column, make_table, on_terminal, plural, show_table
from zmqbus.errors import SetupError
from zmqbus.net.clock import now

if TYPE_CHECKING:
    from zmqbus.cli.demo.crew import Actor, Crew

LOGS = Path("/var/log")
COUNTERS = ("stat", "meminfo", "vmstat", "net/dev", "diskstats", "interrupts", "loadavg")  # in /proc
FILES_MAX = 8
REDRAW = 0.1
VISITED_MAX = 10_000  # entries of /var/log that are looked at
SAMPLE_BYTES = 4096  # that tell text from anything else
CATCH_UP = 20.0  # for `paused`, before the shippers leave
COUNTED_BYTES = 4 * 1024 * 1024  # of a file, to say how many lines it has; it may be large

# --- what to ship ------------------------------------------------------------------------------


class Source(NamedTuple):
    """A file, how many bytes and lines it has for now, and the topic its lines go to."""

    path: Path
    bytes: int
    lines: str
    topic: str


def is_text(path: Path) -> bool:
    """Whether this is a regular, readable file with lines of text in it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with open(path, "rb") as file:
            sample = file.read(SAMPLE_BYTES)
        sample.decode()
    except OSError:
        return False
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":  # the sample may end within a character
            return False
    return b"\n" in sample and b"\0" not in sample


def find_logs(directory: Path = LOGS) -> list[Path]:
    """The largest text files below a directory; links are not followed."""
    found = []
    visited = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            visited += 1
            path = Path(folder, name)
            if not path.is_symlink() and is_text(path):
                with contextlib.suppress(OSError):
                    found.append((path.stat().st_size, path))
        if visited > VISITED_MAX:
            break
    return [path for _, path in sorted(found, reverse=True)[:FILES_MAX]]


def find_counters() -> list[Path]:
    """This machine's own counters, each reading of which is new."""
    return [path for name in COUNTERS if is_text(path := Path("/proc", name))][: FILES_MAX // 2]


def token(text: str) -> str:
    """A text as one token of a topic."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_")[:60] or "file"


def sources(paths: Sequence[Path], host: str) -> list[Source]:
    """What to ship, and where to: `logs.<host>.<file>`, no two to the same topic."""
    found: list[Source] = []
    taken: set[str] = set()
    for path in paths:
        below = path.relative_to(LOGS) if path.is_relative_to(LOGS) else Path(path.name)
        name = unique = token(str(below).removesuffix(".log"))
        number = 1
        while unique in taken:
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique)
        with open(path, "rb") as file:
            data = file.read(COUNTED_BYTES)
        size = max(len(data), path.stat().st_size)  # counters have none
        lines = data.count(b"\n")
        found.append(Source(path, size, f"{lines:,}{'+' * (size > len(data))}", f"logs.{token(host)}.{unique}"))
    return found


# --- the account --------------------------------------------------------------------------------


class Account(msgspec.Struct):
    """One aggregator's: `sent` is what it was owed; `unreported` what is missing without a word, or came twice."""

    name: str
    sent: int
    received: int
    repaired: int
    lost: int
    unreported: int
    rate: float


def settle(actor: Actor, heads: dict[tuple[str, int], int], starts: dict[tuple[str, int], int]) -> Account:
    """Hold what an aggregator reports against what was sent: up to `heads`, and from `starts` at the latest."""
    facts = actor.facts
    sent = unreported = disorder = explained = 0
    for key, last in heads.items():
        ranges = [(first, end) for topic, origin, first, end in facts["gaps"] if (topic, origin) == key]
        first, received, doubled = facts["streams"].get(key, (starts[key], 0, 0))
        first = min([first, starts[key], *(gap_first for gap_first, _ in ranges)])
        lost = sum(end - gap_first + 1 for gap_first, end in ranges)
        sent += last - first + 1
        unreported += abs(last - first + 1 - received - lost)
        disorder += doubled
        explained += lost
    if explained < facts["lost"]:  # so many gaps that not every range is kept: the sum must do
        unreported = abs(sent - facts["received"] - facts["lost"])
    rate = round(facts["received"] / max(facts["seconds"], 1e-3), 1)
    return Account(actor.name, sent, facts["received"], facts["repaired"], facts["lost"], unreported + disorder, rate)


# --- the stage ---------------------------------------------------------------------------------


class Stage:
    """What the audience sees: a narration, and on a terminal live counts below it."""

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
        shippers = [actor for actor in self.crew.actors if "received" not in actor.facts]
        sent = sum(actor.facts.get("sent", 0) for actor in shippers)
        rows = [["shippers", f"{sent:,}", "", "", ""]]
        for actor in self.crew.actors:
            if "received" in actor.facts:
                counts = (f"{actor.facts[name]:,}" for name in ("received", "repaired", "lost"))
                rows.append([f"{actor.name}{actor.state}", "", *counts])
        self._live.update(make_table(_LIVE, rows, self._live.console.width), refresh=True)

    def close(self) -> None:
        """Curtain."""
        if self._live is not None:
            self._live.stop()


_LIVE = (
    Column(""),
    Column("sent", right=True),
    Column("received", right=True),
    Column("repaired", right=True),
    Column("lost", right=True),
)
_SHIPPED = (Column("file"), Column("bytes", right=True), Column("lines", right=True), Column("topic"))
_ACCOUNT = (
    Column("aggregator"),
    Column("sent", right=True),
    Column("received", right=True),
    Column("repaired", right=True),
    Column("lost", right=True),
    Column("lost silently", right=True),
    Column("rate", right=True),
)


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path(path_type=Path))
@click.option(
    "--rate",
    type=Whole(1, 1_000_000),
    default=20_000,
    show_default=True,
    metavar="N",
    help="Lines per second that all shippers send together, apart from the spike.",
)
@click.option(
    "--seconds",
    type=Duration(1, 600),
    default="4s",
    show_default=True,
    metavar="DURATION",
    help="How long to ship, apart from the spike, such as 10 or 1m.",
)
@click.option(
    "--history",
    type=Whole(0, 1_000_000),
    default=1000,
    show_default=True,
    metavar="N",
    help="How many earlier lines of each file the late aggregator asks for.",
)
@click.option("--json", "as_json", is_flag=True, help="The account as one JSON object; the narration goes to stderr.")
@click.pass_context
def demo(
    context: click.Context, files: tuple[Path, ...], rate: int, seconds: float, history: int, as_json: bool
) -> int:
    """Ship this machine's own log lines, in one terminal, and see that none is lost.

    One process per log file ships its lines to logs.<host>.<file>; aggregators follow them. One of these is stopped
    for a while, during a spike; one joins late. Then the account: sent, received, repaired and lost. Exits with 4 if
    anything is missing that was not reported as lost.

    Without a FILE: up to 8 readable logs below /var/log; with none there, readings of the counters in /proc. All of it
    stays on the loopback interface, on a bus of its own; global options have no place here. Short files are sent again
    and again.
    """
    from zmqbus.cli.demo.crew import Crew

    _refuse_global_options(context)
    for path in files:
        if not is_text(path):
            raise click.BadParameter(f"{path} is not a readable file with lines of text", param_hint="FILE")
    paths = list(dict.fromkeys(files)) or find_logs() or find_counters()
    if not paths:
        raise SetupError("no readable log files below /var/log, and no counters in /proc: name some files")
    if len(paths) > FILES_MAX:
        raise click.BadParameter(
            f"{len(paths)} files: at most {FILES_MAX}, each has a process of its own", param_hint="FILE"
        )
    shipped = sources(paths, socket.gethostname())
    if not as_json:
        click.echo(
            f"zmqbus demo: the lines of {plural(len(shipped), 'file')} of this machine, short ones again and again"
        )
        rows = [(str(one.path), human_bytes(one.bytes), one.lines, one.topic) for one in shipped]
        show_table(_SHIPPED, rows)
    stage = Stage(err=as_json)
    crew = stage.crew = Crew(stage.redraw)
    try:
        accounts, total = _perform(stage, crew, shipped, rate, seconds, history)
    finally:
        stage.close()
        crew.end()
    return _conclude(accounts, len(shipped), total, as_json)


def _refuse_global_options(context: click.Context) -> None:
    assert context.parent is not None
    for option in context.parent.command.params:
        if context.parent.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"demo has a bus of its own, on the loopback interface: leave out {option.opts[0]}")


def _perform(
    stage: Stage, crew: Crew, shipped: Sequence[Source], rate: int, seconds: float, history: int
) -> tuple[list[Account], int]:
    """The play; returns the accounts, and how many lines were sent in all."""
    from zmqbus.cli.demo.crew import CONFIRM, SPIKE_LINES, START_TIMEOUT, follow, ship

    bus = f"demo-{secrets.token_hex(4)}"
    shippers = [crew.start(ship, bus, f"ship-{one.topic.split('.')[-1]}", one.topic, one.path) for one in shipped]
    steady = crew.start(follow, bus, "steady", 0)
    paused = crew.start(follow, bus, "paused", 0)
    everybody = (*shippers, steady, paused)
    stage.say(f"{len(everybody)} processes start: a shipper per file, aggregators `steady`, `paused`")
    crew.expect(everybody, "up", START_TIMEOUT)
    crew.tell(everybody, "meet", len(everybody) - 1)
    crew.expect(everybody, "met", START_TIMEOUT)
    wait = max(one.facts["met"] for one in everybody) - max(one.facts["up"] for one in everybody)
    stage.say(f"all have found each other by mDNS, {human_age(wait)} after the last was up")

    each = max(1, rate // len(shippers))
    crew.tell(shippers, "rate", each)
    stage.say(f"they ship {each * len(shippers):,} lines per second")
    crew.listen(seconds / 4)
    crew.tell([steady], "guard", paused.process.pid)
    os.kill(paused.process.pid, signal.SIGSTOP)
    paused.state = " (stopped)"
    stage.say("`paused` is stopped (SIGSTOP), as if its machine hung")
    crew.tell(shippers[:1], "spike")
    stage.say(f"just then {shippers[0].name} has a spike of {SPIKE_LINES:,} lines")
    crew.expect(shippers[:1], "spiked", START_TIMEOUT)
    crew.listen(seconds / 4)
    os.kill(paused.process.pid, signal.SIGCONT)
    crew.tell([steady], "guard")
    paused.state = ""
    stage.say("`paused` goes on (SIGCONT), fetching what it missed from the shippers")
    crew.listen(seconds / 4)

    late = crew.start(follow, bus, "late", history)
    crew.expect([late], "up", START_TIMEOUT)
    crew.tell([late], "meet", len(everybody))
    crew.expect([late], "met", START_TIMEOUT)
    wait = late.facts["met"] - late.facts["up"]
    stage.say(f"`late` joins, {human_age(wait)} after it was up, asking for {history:,} earlier lines")
    joined_at = crew.ask(shippers, "where", START_TIMEOUT)
    crew.listen(seconds / 4)

    crew.tell(shippers, "rate", 0)
    silent_at = now()
    sent = sum(crew.ask(shippers, "where", START_TIMEOUT))
    caught_up = crew.until(lambda: all(_has(one, sent) for one in (steady, paused)), CATCH_UP)
    state = f"caught up {human_age(now() - silent_at)} later" if caught_up else f"not caught up within {CATCH_UP:g} s"
    stage.say(f"shippers fall silent; aggregators have {state}")
    crew.tell(shippers, "stop")
    crew.expect(shippers, "stopped", CONFIRM + START_TIMEOUT)
    keys = [(source.topic, one.facts["origin"]) for source, one in zip(shipped, shippers, strict=True)]
    heads = {key: one.facts["sent"] for key, one in zip(keys, shippers, strict=True)}
    stage.say(f"the shippers have left, after {sum(heads.values()):,} lines")
    for one in shippers:
        if one.facts["unconfirmed"]:
            remark(f"{one.name} left before {', '.join(one.facts['unconfirmed'])} had confirmed everything")
    crew.tell([steady, paused, late], "finish", heads)
    crew.expect([steady, paused, late], "streams", START_TIMEOUT)
    whole = dict.fromkeys(keys, 1)
    # They said so after it had joined: when it did, they were no further, and so it is owed this much, or more.
    tail = {key: max(1, seq - history + 1) for key, seq in zip(keys, joined_at, strict=True)}
    accounts = [settle(steady, heads, whole), settle(paused, heads, whole), settle(late, heads, tail)]
    return accounts, sum(heads.values())


def _has(aggregator: Actor, lines: int) -> bool:
    return bool(aggregator.facts["received"] + aggregator.facts["lost"] >= lines)


def _conclude(accounts: Sequence[Account], files: int, total: int, as_json: bool) -> int:
    """The account, and what it proves."""
    unreported, lost = sum(one.unreported for one in accounts), sum(one.lost for one in accounts)
    code = shell.LOST if unreported else shell.OK
    if as_json:
        click.echo(msgspec.json.encode({"files": files, "lines": total, "aggregators": accounts, "exit": code}))
        return code
    numbers = ("sent", "received", "repaired", "lost", "unreported")
    rows = [[one.name, *(f"{getattr(one, name):,}" for name in numbers), human_rate(one.rate)] for one in accounts]
    click.echo()
    show_table(_ACCOUNT, rows)
    _tell("repaired: fetched from the shippers' histories, as are the earlier lines that `late` asked for")
    repaired = next(one.repaired for one in accounts if one.name == "paused")
    if unreported:
        _tell(f"FAILED: {plural(unreported, 'line')} missing or doubled without a word. Please report this.")
        return code
    if lost:
        _tell(
            f"Proved: no line was lost silently. {plural(lost, 'line')} could not be repaired, and all were reported."
        )
        return code
    missed = (
        f"{plural(repaired, 'line')} that `paused` had missed were repaired" if repaired else "`paused` missed none"
    )
    _tell(
        f"Proved: {plural(total, 'line')} sent, and every aggregator has all that it is owed, in order and once; "
        f"{missed}; nothing was lost."
    )
    return code


def _tell(text: str) -> None:
    """A sentence: in words that are not torn apart on a terminal, in one line elsewhere."""
    click.echo(textwrap.fill(text, shutil.get_terminal_size().columns) if on_terminal() else text)
