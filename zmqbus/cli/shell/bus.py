"""What commands share that join a bus: options, the node they are, what happens on it, and messages as they come."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from zmqbus.cli.messages.forms import human_bytes, parse_duration, parse_size, parse_time_ns
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.output import on_terminal
from zmqbus.cli.shell.stopping import PEEK, check, rest, suspended
from zmqbus.errors import AuthError, ParseError, WaitTimeout
from zmqbus.net.clock import now, time_ns
from zmqbus.protocol.starts import OFFSET_MAX

if TYPE_CHECKING:
    from zmqbus.node.events import EventStream
    from zmqbus.node.faces.node import Node

One = TypeVar("One")
SETTLE = "1.5s"  # nodes on one machine or LAN have found each other well within this
PAUSE_EVERY = 0.1  # seconds: how often output is let out while more and more comes
_EPOCH = datetime.fromtimestamp(0, UTC)

# --- options -----------------------------------------------------------------------------------


class Duration(click.ParamType):  # type: ignore[type-arg]
    """`10`, `500ms`, `10s`, `1h30m`: seconds, within bounds."""

    name = "duration"

    def __init__(self, least: float = 0.0, most: float = math.inf) -> None:
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        try:
            seconds = float(value) if isinstance(value, int | float) else parse_duration(value)
        except ParseError as error:
            self.fail(str(error), param, ctx)
        if not self._least <= seconds <= self._most:
            self.fail(f"{value!r} is not between {self._least:g}s and {self._most:g}s", param, ctx)
        return seconds


class Moment(click.ParamType):  # type: ignore[type-arg]
    """`2026-07-31T03:00`, `03:00`, `-1h`: Unix ns. With `ago`, a plain duration, `10m`, is that long ago as well."""

    name = "time"

    def __init__(self, *, ago: bool = False) -> None:
        self._ago = ago

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Unix ns."""
        if isinstance(value, int):
            return value
        if self._ago:
            with contextlib.suppress(ParseError):
                return time_ns() - round(parse_duration(value) * 1e9)
        try:
            return parse_time_ns(value, time_ns())
        except ParseError as error:
            self.fail(str(error), param, ctx)


def since(time_ns: int) -> datetime:
    """Unix ns as `subscribe(start=…)` takes it; not later, in whole microseconds."""
    return _EPOCH + timedelta(microseconds=time_ns // 1000)


class Start(click.ParamType):  # type: ignore[type-arg]
    """`first`, `last`, an offset, or a time: as `Node.subscribe` takes it."""

    name = "start"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int | datetime:
        """For `subscribe(start=…)`."""
        text = str(value).strip()
        if text in ("first", "last"):
            return text
        if text.isascii() and text.isdigit():
            if int(text) > OFFSET_MAX:
                self.fail(f"{text} is no offset: no journal gets that far", param, ctx)
            return int(text)
        try:
            return since(Moment().convert(text, param, ctx))
        except click.BadParameter as error:
            self.fail(f"first, last, an offset, or a time: {error.message}", param, ctx)


class Size(click.ParamType):  # type: ignore[type-arg]
    """`4096`, `64K`, `1.5MiB`, `10G`: bytes, so many at least."""

    name = "size"

    def __init__(self, least: int = 0) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        try:
            size = parse_size(str(value))
        except ParseError as error:
            self.fail(str(error), param, ctx)
        if size < self._least:
            self.fail(f"{value!r} is too small: {human_bytes(self._least)} is the least", param, ctx)
        return size


class Whole(click.ParamType):  # type: ignore[type-arg]
    """A whole number within bounds."""

    name = "number"

    def __init__(self, least: int, most: int | None = None) -> None:
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        try:
            number = int(value)
        except ValueError:
            self.fail(f"{value!r} is not a whole number", param, ctx)
        if number < self._least:
            self.fail(f"{number} is too small: {self._least} is the least", param, ctx)
        if self._most is not None and number > self._most:
            self.fail(f"{number} is too large: {self._most} is the most", param, ctx)
        return number


class Rate(click.ParamType):  # type: ignore[type-arg]
    """Messages per second: above 0, and finite."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The rate."""
        try:
            rate = float(value)
        except ValueError:
            rate = math.nan
        if not 1e-9 <= rate < math.inf:  # so that its period is a time that can be waited for
            self.fail(f"{value!r} is not a rate: write messages per second, such as 100 or 0.5", param, ctx)
        return rate


# --- the node that a command is ----------------------------------------------------------------


class Bus(msgspec.Struct, frozen=True):
    """The global options: which bus, and how to get there."""

    name: str
    key_file: str | None
    interface: str | None
    peers: tuple[str, ...]

    @contextlib.contextmanager
    def join(self, command: str) -> Iterator[tuple[Node, Watch]]:
        """A node for as long as a command runs, named after it, and what happens on it.

        Raises:
            AuthError: in the end, nobody was there but those who refused us because of the key.
        """
        from zmqbus.node.faces.node import Node

        with Node(
            f"{command}-{os.getpid()}",
            bus=self.name,
            key=self.key_file,
            interface=self.interface,
            peers=self.peers,
        ) as node:
            check()
            watch = Watch(node)
            try:
                yield node, watch
            except WaitTimeout:
                watch.conclude()
                raise
            watch.conclude()


def greet(patterns: Sequence[str], bus: Bus) -> None:
    """On a terminal: say that the command waits, for what, and how to end it."""
    if on_terminal() and sys.stderr.isatty():
        remark(f"{' '.join(patterns)} on bus {bus.name!r}; Ctrl-C ends")


class Watch:
    """What else happens on a node: warnings are passed on to stderr, and names of peers kept, also after they left."""

    def __init__(self, node: Node) -> None:
        self._events: EventStream = node.events()
        self.names = {peer.origin: peer.name for peer in node.peers()}
        self.refused = ""
        """Why nobody lets us in: the last of those who said so, as long as nobody else was there."""

    def name(self, origin: int) -> str:
        """The name of the node with this origin; "" when it is not known."""
        if origin not in self.names:
            self.poll()
        return self.names.get(origin, "")

    def poll(self) -> None:
        """Take note of what has happened."""
        from zmqbus.cli.messages.render import escape
        from zmqbus.node.events import KeyMismatch, Warned
        from zmqbus.protocol.members.peers import PeerJoined

        while (event := self._events.get(0)) is not None:
            match event:
                case PeerJoined(peer=peer):
                    self.names[peer.origin] = peer.name
                case Warned(reason=reason):
                    remark(f"warning: {escape(reason)}")
                    if isinstance(event, KeyMismatch):
                        self.refused = escape(reason)
        if self.names:
            self.refused = ""

    def conclude(self) -> None:
        """If nobody let us in because of the key, that is the last word. Raises AuthError."""
        self.poll()
        if self.refused:
            raise AuthError(f"nobody was reached: {self.refused}; use the key file of that bus (--key-file)")


def settle(node: Node, watch: Watch, seconds: float) -> None:
    """Let discovery settle, passing on what it warns of."""
    until = now() + seconds
    while (left := until - now()) > 0:
        rest(min(left, PEEK))
        watch.poll()


def messages(
    take: Callable[[float], Sequence[One]], until: float, pause: Callable[[], object]
) -> Iterator[tuple[One, float]]:
    """Messages or jobs as they come, each with the wall-clock time, until it is `until` by the monotonic one, or Ctrl-Z
    came.

    `take` returns some that are here, or come within a time. `pause` is called whenever there are none at the moment,
    and a few times a second.
    """
    pause_at = 0.0
    while not suspended():
        check()
        time = now()
        if time >= until:
            return
        some = take(0.0)
        if not some or time >= pause_at:
            pause()
            pause_at = time + PAUSE_EVERY
        if not some:
            some = take(max(0.0, min(PEEK, until - time)))
        at = time_ns() / 1e9
        for message in some:
            yield message, at
