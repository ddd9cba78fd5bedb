"""What all commands share with the shell they run in: global options, exit codes, output, how to fail and to stop.

Rule 1: no traceback reaches a user. Whatever goes wrong becomes one remark on stderr and an exit code.
Rule 2: standard output carries what was asked for and nothing else; remarks go to stderr, as `zmqbus: …`.
Rule 3: zmq, zeroconf and rich are imported where they are needed, not before: `zmqbus --help` is quick.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
import msgspec

from zmqbus.cli.forms import parse_duration
from zmqbus.errors import (
    AuthError,
    FormatError,
    GapError,
    MessageTooLarge,
    ParseError,
    TopicError,
    UnsupportedValue,
    WaitTimeout,
    WhereError,
    ZmqbusError,
)
from zmqbus.net.clock import now, time_ns

if TYPE_CHECKING:
    from rich.table import Table

    from zmqbus.node.events import EventStream
    from zmqbus.node.node import Node, Subscription
    from zmqbus.protocol.message import Message

OUTPUT_PATIENCE = 1.0  # seconds that whoever reads our output has for the rest of it when we end
GAPS_SHOWN = 20  # ranges in a report
PEEK = 0.25  # seconds: how often a command that waits looks at what else has happened
PAUSE_EVERY = 0.1  # seconds: how often output is let out while more and more comes

# --- exit codes --------------------------------------------------------------------------------

OK, FAILED, USAGE, TIMED_OUT, LOST = range(5)
BUG, IO_ERROR, NO_PERMISSION = 70, 74, 77  # as in sysexits.h
INTERRUPTED, OUTPUT_CLOSED = 130, 141  # 128 + the signal's number, as shells have it

EXIT_CODES = {
    OK: "done",
    FAILED: "it could not be done: the line on stderr says why",
    USAGE: "the command line is wrong: an option, a topic, a value, an expression",
    TIMED_OUT: "waited in vain: nobody there, too few messages, no confirmation",
    LOST: "messages were lost (with --fail-on-loss, and demo)",
    BUG: "an error in zmqbus itself; ZMQBUS_DEBUG=1 shows where",
    IO_ERROR: "a file or the output could not be read or written",
    NO_PERMISSION: "the key file cannot be used, or keys do not fit",
    INTERRUPTED: "interrupted by Ctrl-C (143: by SIGTERM)",
    OUTPUT_CLOSED: "whoever read the output has left",
}


def code_of(error: ZmqbusError) -> int:
    """The exit code for an error that ends a command."""
    match error:
        case TopicError() | ParseError() | WhereError() | FormatError() | UnsupportedValue() | MessageTooLarge():
            return USAGE
        case WaitTimeout():
            return TIMED_OUT
        case GapError():
            return LOST
        case AuthError():
            return NO_PERMISSION
        case _:
            return FAILED


# --- failing and stopping ----------------------------------------------------------------------


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: a command stops as on Ctrl-C, with another exit code."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def remark(text: str) -> None:
    """Say something on stderr, beside the output."""
    with contextlib.suppress(OSError):
        click.echo(f"zmqbus: {text}", err=True)


def guarded(work: Callable[[], Any]) -> int:
    """Run a command line; the exit code. Only here is an error turned into what the user sees."""
    try:
        try:
            code = work()
            sys.stdout.flush()
            return code if isinstance(code, int) else OK
        finally:
            _let_go_of_output()
    except click.exceptions.Exit as end:  # click's own way, such as after --help
        return end.exit_code
    except click.ClickException as error:
        remark(_usage(error))
        return error.exit_code
    except ZmqbusError as error:
        remark(str(error))
        return code_of(error)
    except Terminated as stop:
        return 128 + stop.number
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return OUTPUT_CLOSED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        remark(f"{where}{error.strerror or error}")
        return IO_ERROR
    except Exception as error:
        if os.environ.get("ZMQBUS_DEBUG"):
            raise
        remark(f"{type(error).__name__}: {error}; this is an error in zmqbus: please report it, with ZMQBUS_DEBUG=1")
        return BUG


def _usage(error: click.ClickException) -> str:
    text = " ".join(error.format_message().split())
    context = error.ctx if isinstance(error, click.UsageError) else None
    if isinstance(error, click.NoSuchOption) and context is not None and context.parent is not None:
        if any(error.option_name in option.opts for option in context.parent.command.params):
            return f"{error.option_name} belongs before the command: zmqbus {error.option_name} … {context.info_name} …"
        if context.info_name == "pub":
            text += " A value that begins with - comes after --."
    return f"{text} (try: {context.command_path} --help)" if context is not None else text


def _let_go_of_output() -> None:
    """Give the reader of our output what is left, but not for ever: it may have stopped, or left.

    What remains unwritten would otherwise block, or fail noisily, when the interpreter exits.
    """
    try:
        with _deadline(OUTPUT_PATIENCE):
            sys.stdout.flush()
    except (OSError, ValueError, _TooSlow):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _TooSlow(Exception):
    pass


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    def too_slow(number: int, frame: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, too_slow)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def prepare() -> None:
    """For this process: output that takes any text, and signals that stop commands in an orderly way."""
    if sys.stdout is None:  # closed, as by >&-
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the locale may be ASCII; topics need not

    def interrupt(number: int, frame: object) -> None:
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), b"\r  \r")  # over the ^C that the terminal has printed
        raise KeyboardInterrupt

    def terminate(number: int, frame: object) -> None:
        raise Terminated(number)

    for number, handler in ((signal.SIGINT, interrupt), (signal.SIGTERM, terminate), (signal.SIGHUP, terminate)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(number, handler)


def conclude() -> None:
    """The command has ended: from here on a signal just ends the process, without a word."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


# --- options -----------------------------------------------------------------------------------


class Duration(click.ParamType):  # type: ignore[type-arg]
    """`500ms`, `10s`, `1h30m`: seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        try:
            return value if isinstance(value, float) else parse_duration(value)
        except ParseError as error:
            self.fail(str(error), param, ctx)


class Bus(msgspec.Struct, frozen=True):
    """The global options: which bus, and how to get there."""

    name: str
    key_file: str | None
    interface: str | None
    peers: tuple[str, ...]

    @contextlib.contextmanager
    def join(self, command: str) -> Iterator[Node]:
        """A node for as long as a command runs, named after it."""
        from zmqbus.node.node import Node

        with Node(
            f"{command}-{os.getpid()}",
            bus=self.name,
            key=self.key_file,
            interface=self.interface,
            peers=self.peers,
        ) as node:
            yield node


def greet(patterns: Sequence[str], bus: Bus) -> None:
    """On a terminal: say that the command waits, for what, and how to end it."""
    if on_terminal() and sys.stderr.isatty():
        remark(f"{' '.join(patterns)} on bus {bus.name!r}; Ctrl-C ends")


class Watch:
    """What else happens on a node: warnings are passed on to stderr, and names of peers kept, also after they left."""

    def __init__(self, node: Node) -> None:
        self._events: EventStream = node.events()
        self._names = {peer.origin: peer.name for peer in node.peers()}

    def name(self, origin: int) -> str:
        """The name of the node with this origin; "" when it is not known."""
        if origin not in self._names:
            self.poll()
        return self._names.get(origin, "")

    def poll(self) -> None:
        """Take note of what has happened."""
        from zmqbus.cli.render import escape
        from zmqbus.node.events import Warned
        from zmqbus.protocol.peers import PeerJoined

        while (event := self._events.get(0)) is not None:
            match event:
                case PeerJoined(peer=peer):
                    self._names[peer.origin] = peer.name
                case Warned(reason=reason):
                    remark(f"warning: {escape(reason)}")


def messages(
    take: Callable[[float], Sequence[Message]], seconds: float | None, pause: Callable[[], object]
) -> Iterator[tuple[Message, float]]:
    """Messages as they come, each with the wall-clock time, for so many seconds.

    `take` returns some that are here, or come within a time. `pause` is called whenever there are none at the moment,
    and a few times a second.
    """
    deadline = None if seconds is None else now() + seconds
    pause_at = 0.0
    while True:
        time = now()
        if deadline is not None and time >= deadline:
            return
        some = take(0.0)
        if not some or time >= pause_at:
            pause()
            pause_at = time + PAUSE_EVERY
        if not some:
            some = take(PEEK if deadline is None else max(0.0, min(PEEK, deadline - time)))
        at = time_ns() / 1e9
        for message in some:
            yield message, at


# --- saying what happened ----------------------------------------------------------------------


def plural(n: int, noun: str) -> str:
    """`1 message`, `1,204 messages`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def loss_report(subscription: Subscription, name: Callable[[int], str]) -> str:
    """`nothing lost`, or how much, and below it which messages, by publisher and range."""
    from zmqbus.cli.render import escape

    if not subscription.lost:
        return "nothing lost"
    gaps = subscription.gaps
    lines = [f"{plural(subscription.lost, 'message')} lost:"]
    for gap in gaps[:GAPS_SHOWN]:
        span = f"#{gap.first}" if gap.first == gap.last else f"#{gap.first} to #{gap.last}"
        lines.append(f"  {escape(gap.topic)}  {escape(name(gap.origin) or f'{gap.origin:016x}')}{span} ({gap.count:,})")
    if len(gaps) > GAPS_SHOWN:
        lines.append(f"  … and {plural(len(gaps) - GAPS_SHOWN, 'more range')}")
    return "\n".join(lines)


def on_terminal() -> bool:
    """Whether standard output is a terminal, for people; otherwise it is for programs."""
    return sys.stdout.isatty()


Column = tuple[str, bool]  # heading, whether it is aligned to the right


def make_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Table:
    """A table for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for heading, right in columns:
        table.add_column(heading, justify="right" if right else "left", overflow="fold", min_width=len(heading))
    for row in rows:
        table.add_row(*map(Text, row))  # not markup: these are texts of peers
    return table


def show_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """On a terminal a table that fits it; elsewhere plain columns, whole, under one line of headings."""
    if on_terminal():
        from rich.console import Console

        Console().print(make_table(columns, rows))
        return
    lines = [[heading for heading, _ in columns], *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, (_, right) in zip(line, widths, columns, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())
