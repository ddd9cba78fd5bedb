"""What all commands share with the shell they run in: exit codes and how to fail; around it output, options, signals.

Rule 1: no traceback reaches a user. Whatever goes wrong becomes one remark on stderr and an exit code.
Rule 2: standard output carries what was asked for and nothing else; remarks go to stderr, as `zmqbus: …`.
Rule 3: zmq, zeroconf and rich are imported where they are needed, not before: `zmqbus --help` is quick.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from zmqbus.cli.shell.stopping import Stopped
from zmqbus.errors import (
    AuthError,
    FormatError,
    GapError,
    JournalCorrupt,
    JournalFailed,
    JournalLocked,
    JournalUnavailable,
    JournalVersion,
    LogUnavailable,
    MessageTooLarge,
    NoResponders,
    NoSpace,
    NotDurable,
    ParseError,
    RequestTimeout,
    SubscriptionTaken,
    TopicError,
    UnsupportedValue,
    WaitTimeout,
    WhereError,
    ZmqbusError,
)

# --- exit codes --------------------------------------------------------------------------------

OK, FAILED, USAGE, TIMED_OUT, LOST, TAKEN = range(6)
# As in sysexits.h:
DATA_ERROR, NO_INPUT, BUG, CANNOT_CREATE, IO_ERROR, IN_USE, NO_PERMISSION = 65, 66, 70, 73, 74, 75, 77
INTERRUPTED, OUTPUT_CLOSED = 130, 141  # 128 + the signal's number, as shells have it

EXIT_CODES = {
    OK: "done",
    FAILED: "it could not be done: the line on stderr says why",
    USAGE: "the command line is wrong: an option, a topic, a value, an expression",
    TIMED_OUT: "waited in vain: nobody there, too few messages, no confirmation",
    LOST: "messages were lost (with --fail-on-loss, and demo)",
    TAKEN: "another consumer has taken over the durable name (sub --durable)",
    DATA_ERROR: "a journal is damaged, or something in it is no message",
    NO_INPUT: "there is no journal, or it cannot be opened, or it is of a newer zmqbus",
    BUG: "an error in zmqbus itself; ZMQBUS_DEBUG=1 shows where",
    CANNOT_CREATE: "the file to write to cannot be created, or is there already",
    IO_ERROR: "a file or the output could not be read or written, or a disk is full",
    IN_USE: "the journal is in use by another process",
    NO_PERMISSION: "the key file cannot be used, or keys do not fit",
    INTERRUPTED: "interrupted by Ctrl-C (143: by SIGTERM)",
    OUTPUT_CLOSED: "whoever read the output has left",
}


def code_of(error: ZmqbusError) -> int:
    """The exit code for an error that ends a command."""
    match error:
        case TopicError() | ParseError() | WhereError() | FormatError() | UnsupportedValue() | MessageTooLarge():
            return USAGE
        case WaitTimeout() | NotDurable() | NoResponders() | RequestTimeout():
            return TIMED_OUT
        case GapError():
            return LOST
        case AuthError():
            return NO_PERMISSION
        case SubscriptionTaken():
            return TAKEN
        case JournalCorrupt() | LogUnavailable(code="corrupt"):
            return DATA_ERROR
        case JournalUnavailable() | JournalVersion():
            return NO_INPUT
        case JournalLocked():
            return IN_USE
        case JournalFailed() | NoSpace():
            return IO_ERROR
        case _:
            return FAILED


class Group(click.Group):
    """A group of commands, listed in the order of use."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's; without any arguments, say what there is."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(USAGE)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Not in that of the alphabet."""
        return list(self.commands)


# --- failing -----------------------------------------------------------------------------------


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
    except Stopped as stop:
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
    """What could not be written would fail once more, noisily, when the interpreter exits."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
