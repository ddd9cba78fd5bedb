"""What a command sends: values given as arguments, or the lines of standard input, at some rate. Sends nothing.

Reading never waits for longer than a moment without looking whether the command was asked to stop.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedIOBase
from itertools import repeat
from typing import Any, cast

import click

from zmqbus.cli.messages.forms import parse_value
from zmqbus.cli.shell import stopping
from zmqbus.errors import ParseError
from zmqbus.net.clock import now
from zmqbus.protocol.frames import MESSAGE_BYTES_MAX

READ_BYTES = 64 * 1024  # of standard input at a time
PAUSE_MAX = 1.0  # behind its schedule by more than this, `--rate` starts a new one: there was no input
SPIN = 0.001  # waits below this are left out, and made up for by the next one


class Pacer:
    """When to send, for a rate per second: message i at start + i / rate, so that errors do not add up."""

    def __init__(self, rate: float) -> None:
        self._period = 1 / rate
        self._due: float | None = None

    def delay(self, now: float) -> float:
        """Seconds to wait before sending the next message. Call it once for each."""
        if self._due is None or now - self._due > PAUSE_MAX:
            self._due = now
        delay = max(0.0, self._due - now)
        self._due += self._period
        return delay


def blocks(stream: BufferedIOBase) -> Iterator[bytes]:
    """What comes in, as it comes. Raises Stopped soon after the command was asked to stop."""
    poll = select.poll()
    is_file = True
    try:
        poll.register(stream.fileno(), select.POLLIN)
    except OSError:  # of a test, and always ready
        is_file = False
    while True:
        stopping.check()
        if not is_file or poll.poll(stopping.PEEK * 1000):
            block = stream.read1(READ_BYTES)
            if not block:
                return
            yield block


def lines(source: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends, as they come. Raises ParseError for one that no message can carry."""
    rest = bytearray()
    number = 0
    for block in source:
        *ended, last = block.split(b"\n")
        for end in ended:
            number += 1
            rest += end
            _check_length(rest, number)
            yield bytes(rest).removesuffix(b"\r")
            rest.clear()
        rest += last
        _check_length(rest, number + 1)
    if rest:
        yield bytes(rest).removesuffix(b"\r")


def _check_length(line: bytearray, number: int) -> None:
    if len(line) > MESSAGE_BYTES_MAX:
        begin = line[:80].decode(errors="replace")
        reason = (
            f"line {number} of standard input is longer than a message may be ({MESSAGE_BYTES_MAX:,} bytes); split it"
        )
        raise ParseError("message", begin, reason)


def line_values(source: Iterable[bytes], as_json: bool) -> Iterator[Any]:
    """What to publish for each line: its text; its bytes, where it is not UTF-8; with `as_json` what it stands for."""
    for number, line in enumerate(lines(source), 1):
        if not as_json:
            try:
                yield line.decode()
            except UnicodeDecodeError:
                yield line
        elif line.strip():
            try:
                yield parse_value(line.decode("utf-8", "surrogateescape"), as_json=True)
            except ParseError as error:
                raise ParseError(error.what, error.text, f"{error.reason} (line {number} of standard input)") from None


def parse_headers(pairs: Sequence[str]) -> dict[str, str] | None:
    """Headers from `key=value` texts."""
    headers = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--headers")
        parse_value(pair, as_json=False)  # UTF-8?
        headers[key] = value
    return headers or None


def values_of(values: Sequence[str], as_json: bool, count: int | None, *, verb: str = "publish") -> Iterator[Any]:
    """What to send, in order, for the VALUEs of a command. `verb`: what it does with them."""
    if "-" in values and len(values) > 1:
        raise click.UsageError(
            "- stands for the lines of standard input, and for nothing beside it: leave out the rest"
        )
    if values and values[0] != "-":
        parsed = [parse_value(value, as_json) for value in values]
        return (value for again in repeat(parsed, count or 1) for value in again)
    if sys.stdin is None or (not values and sys.stdin.isatty()):
        raise click.UsageError(f"give a VALUE, or - (or a pipe) to {verb} the lines of standard input")
    if count is not None:
        raise click.UsageError("--count repeats values given as arguments, not standard input")
    return line_values(blocks(cast(BufferedIOBase, sys.stdin.buffer)), as_json)


def paced(values: Iterator[Any], rate: float | None) -> Iterator[Any]:
    """The same, each when it is due. Raises Stopped soon after the command was asked to stop."""
    pacer = Pacer(rate) if rate is not None else None
    for value in values:
        stopping.check()
        if pacer is not None and (delay := pacer.delay(now())) > SPIN:
            stopping.rest(delay)
        yield value
