"""The engine's end of subscriptions to the log: READ, CREDIT and COMMIT, to whichever forwarders there are.

Where a reading goes on is `Reading`'s to decide, what comes of it is `Replay`'s; here it is done, by links. All of it
runs on the engine's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from zmqbus.errors import (
    LogUnavailable,
    NodeClosed,
    RemoteProtocolError,
    SetupError,
    SubscriptionTaken,
    TopicError,
    WaitTimeout,
    ZmqbusError,
)
from zmqbus.net.clock import now, time_ns
from zmqbus.node.events import Event, ForwarderDown, ForwarderUp, Warned
from zmqbus.node.peers.links import Link
from zmqbus.node.peers.peering import Peering
from zmqbus.node.receiving.replay import Piece, Replay
from zmqbus.protocol import commands
from zmqbus.protocol.commands import PATTERNS_MAX, SUBSCRIPTIONS_MAX, Command, Error, Log
from zmqbus.protocol.members.peers import Peer
from zmqbus.protocol.starts import Start, check_cursor_name, parse_start
from zmqbus.protocol.streams.reading import LOST, OPEN, Reading
from zmqbus.protocol.topics import check_pattern

READ_TIMEOUT = 8.0  # `subscribe` waits no longer for forwarders that do not answer
ROUND = 1.0  # seconds between two commits, and between looks for readings that have fallen silent
COMMIT_TIMEOUT = 5.0  # for one COMMIT; then it is asked again. And what `close` waits for the last ones
PASSING = ("journal", "reading", "hello")  # codes of errors after which a reading may be asked for again


class Host(Protocol):
    """What is needed of the engine."""

    peering: Peering

    def emit(self, event: Event) -> None:
        """Something happened."""

    def garbage(self, error: RemoteProtocolError) -> None:
        """A peer sent something undecodable."""

    def soon(self, work: Callable[..., object], *arguments: object) -> None:
        """Do this on the loop. Any thread."""


class Line:
    """One reading's way to its forwarder."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.origin = 0
        self.link: Link | None = None
        self.request = 0  # at the link; 0: nothing is asked
        self.goal = 0  # what is to be committed
        self.committing = False
        self.trouble = ""  # the last that was warned of

    def unfollow(self) -> None:
        if self.link is not None:
            self.link.unfollow(self.request)
        self.request = 0


class Run:
    """One subscription to the log, and its readings by the number of their journal."""

    def __init__(self, number: int, replay: Replay, start: Start, cursor: str) -> None:
        self.number = number
        self.replay = replay
        self.start = start
        self.cursor = cursor
        self.begun_ns = time_ns()
        self.lines: dict[int, Line] = {}
        self.failure: ZmqbusError | None = None


class Replays:
    """All subscriptions to the log of one node."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop) -> None:
        self.present: dict[int, Peer] = {}
        """The forwarders that are there, by the number of their journal."""
        self._host = host
        self._loop = loop
        self._runs: dict[Replay, Run] = {}
        self._numbers = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def messages(self) -> int:
        """Read by all that are open."""
        return sum(replay.messages for replay in self._runs)

    @property
    def lost(self) -> int:
        """Known to be lost to them."""
        return sum(replay.lost for replay in self._runs)

    # --- life ----------------------------------------------------------------------------------------

    async def subscribe(
        self,
        patterns: Sequence[str],
        *,
        value_type: Any,
        start: Any,
        durable: str | None,
        on_gap: str,
        wake: Callable[[], None] | None = None,
        abandoned: Callable[[Hashable], bool] = lambda token: False,
    ) -> Replay:
        """Begin to read; done when every forwarder that is there has said from where on.

        Raises:
            SetupError, TopicError: see `Node.subscribe`.
            LogUnavailable: a forwarder cannot read from there.
        """
        if on_gap not in ("skip", "raise"):
            raise SetupError(f"on_gap={on_gap!r}: use 'skip' or 'raise'")
        if not patterns:
            raise TopicError("", "give at least one pattern; '>' is everything")
        if len(patterns) > PATTERNS_MAX or len(self._runs) >= SUBSCRIPTIONS_MAX:
            raise SetupError(
                f"at most {PATTERNS_MAX} patterns to a subscription, and {SUBSCRIPTIONS_MAX} subscriptions to a node"
            )
        for pattern in patterns:
            check_pattern(pattern)
        cursor = "" if durable is None else check_cursor_name(durable)
        begin = parse_start(start, time_ns())
        replay = Replay(
            list(patterns), self, value_type=value_type, raise_gaps=on_gap == "raise", wake=wake, abandoned=abandoned
        )
        self._numbers += 1
        run = self._runs[replay] = Run(self._numbers, replay, begin, cursor)
        if self._timer is None:
            self._timer = self._loop.call_later(ROUND, self._round)
        what = f"{' '.join(patterns[:5])}{f' as {durable!r}' if durable else ''}"
        if not self.present:
            self.emit(Warned(f"nothing to read yet for {what}: it begins when a forwarder is on the bus"))
        self._attend(run, late=False)
        registry = self._host.peering.registry
        try:
            answered = await registry.until(lambda: run.failure is not None or not self._awaited(run), READ_TIMEOUT)
            if run.failure is not None and self._awaited(run):  # else what came before it is handed out first
                raise run.failure
        except BaseException:  # nobody will read it
            self._dispose(run, NodeClosed("the subscription is closed"))
            raise
        if not answered:
            names = ", ".join(peer.name for peer in self._awaited(run))
            self.emit(Warned(f"no answer to READ {what} within {READ_TIMEOUT:g} s: {names}"))
        return replay

    async def close(self, replay: Replay) -> None:
        """The end of a subscription; what has been dealt with is committed. Commits that fail are warned of."""
        run = self._runs.get(replay)
        replay.stop(NodeClosed("the subscription is closed"))
        if run is None:
            return
        try:
            if run.cursor and run.failure is None and not await self._commit(run, COMMIT_TIMEOUT):
                self.emit(Warned(f"the cursor {run.cursor!r} may be behind: not committed in {COMMIT_TIMEOUT:g} s"))
        except NodeClosed:
            pass
        finally:
            self._dispose(run, NodeClosed("the subscription is closed"))

    def abandon(self, replay: Replay) -> None:
        """The same, for one that nobody refers to any more."""
        if replay in self._runs:
            task = self._loop.create_task(self.close(replay))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def leave(self, reason: Exception, timeout: float) -> None:
        """The node is about to close: no more messages; what has been dealt with is committed, within `timeout`."""
        runs = list(self._runs.values())
        for run in runs:
            run.replay.stop(reason)
        durable = [self._commit(run, timeout) for run in runs if run.cursor and run.failure is None]
        if durable:
            await asyncio.gather(*durable)
        for run in runs:
            self._hang_up(run)

    def end(self, reason: Exception) -> None:
        """The node closes."""
        if self._timer is not None:
            self._timer.cancel()
        for run in list(self._runs.values()):
            self._dispose(run, reason)

    def forked(self, reason: Exception) -> None:
        """In a forked child: it is all the parent's."""
        for replay in self._runs:
            replay.forked(reason)

    # --- what replays want -----------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Tell every listener. Any thread."""
        self._host.emit(event)

    def garbage(self, error: RemoteProtocolError) -> None:
        """A forwarder sent something undecodable. Any thread."""
        self._host.garbage(error)

    def grant(self, reading: Reading) -> None:
        """Give a forwarder more credit, soon. Any thread."""
        self._host.soon(self._grant, reading)

    def _grant(self, reading: Reading) -> None:
        lines = (run.lines.get(reading.journal) for run in self._runs.values() if run.number == reading.number)
        line = next(lines, None)
        if line is not None and line.link is not None and line.request and (more := reading.grant()):
            line.link.say(commands.Credit(reading.number, more), line.request)

    async def commit(self, replay: Replay, timeout: float | None) -> None:
        """Have on disk what has been dealt with so far.

        Raises:
            SetupError: there is no cursor to move.
            SubscriptionTaken, LogUnavailable: it has ended.
            WaitTimeout: not all forwarders have confirmed it within `timeout`.
        """
        run = self._runs.get(replay)
        if run is None:
            raise replay.closed or NodeClosed("the subscription is closed")
        if not run.cursor:
            raise SetupError("there is no cursor to commit: give the subscription a name, subscribe(…, durable='name')")
        if run.failure is None and not await self._commit(run, timeout):
            done = sum(line.reading.committed >= line.goal for line in run.lines.values())
            raise WaitTimeout("cursor(s) on the forwarders' disks", done, len(run.lines), timeout or 0.0)
        if run.failure is not None:
            raise run.failure

    # --- forwarders --------------------------------------------------------------------------------------

    def forwarders(self, present: Iterable[Peer]) -> None:
        """These are there, or said something new; also after each WELCOME of one."""
        before = self.present
        # A forwarder that was killed and started again may be there twice, until its first life is found out.
        self.present = {peer.journal: peer for peer in sorted(present, key=lambda peer: peer.epoch)}
        for journal, peer in before.items():
            if journal not in self.present:
                self.emit(ForwarderDown(peer))
        for journal, peer in self.present.items():
            if journal not in before or before[journal].origin != peer.origin:
                if journal in before:
                    self.emit(ForwarderDown(before[journal]))
                self.emit(ForwarderUp(peer))
        for run in self._runs.values():
            self._attend(run, late=True)

    def _attend(self, run: Run, late: bool) -> None:
        """See to it that every forwarder that is there is read."""
        if run.failure is not None:
            return
        for journal, peer in self.present.items():
            line = run.lines.get(journal)
            if line is None:
                replay = run.replay
                reading = Reading(run.number, replay.patterns, run.cursor, run.start, journal, run.begun_ns, late)
                line = run.lines[journal] = Line(reading)
                replay.readings.append(reading)
            line.origin, line.reading.name = peer.origin, peer.name
            link = self._host.peering.links.get(peer.origin)
            if link is not None and (link is not line.link or line.reading.place == LOST):
                self._read(run, line, link)
            elif link is not None:
                self._ping(line)
        with run.replay.bell:
            run.replay.merging.present(self.present)

    def _awaited(self, run: Run) -> list[Peer]:
        """The forwarders that have not said where their reading begins."""
        return [
            peer
            for journal, peer in self.present.items()
            if (line := run.lines.get(journal)) is None or line.reading.next is None
        ]

    def _read(self, run: Run, line: Line, link: Link) -> None:
        line.unfollow()
        line.link = link
        line.request = link.follow(line.reading.read(now()), partial(self._answered, run, line))
        if not line.request:
            line.reading.lost(now())

    def _ping(self, line: Line) -> None:
        """Who knows nothing of the reading says so."""
        if line.link is not None and line.request:
            line.link.say(commands.Credit(line.reading.number, 0), line.request)

    def _answered(self, run: Run, line: Line, command: Command | None) -> None:
        reading = line.reading
        body = command.body if command is not None else None
        if isinstance(body, Log):
            assert command is not None
            part = command.batches[0] if command.batches else b""
            begins = reading.next is None
            try:
                floor = reading.received(body, len(part), now())
            except RemoteProtocolError as error:
                self._fail(run, line, LogUnavailable(reading.name, "protocol", str(error)))
                return
            run.replay.put(Piece(reading, body, part, floor))
            if begins:
                self._host.peering.registry.changed()
        elif not isinstance(body, Error) or body.code in PASSING:  # no body: the link was closed
            line.unfollow()
            reading.lost(now())
            if isinstance(body, Error) and body.code == "reading" and line.link is not None:
                self._read(run, line, line.link)
            elif isinstance(body, Error) and body.code == "journal":
                self._warn(line, body.reason)
        elif body.code == "taken":
            self._taken(run)
        else:
            self._fail(run, line, LogUnavailable(reading.name, body.code, body.reason))

    def _round(self) -> None:
        """Once a second, while there is anything to read."""
        self._timer = self._loop.call_later(ROUND, self._round) if self._runs else None
        for run in list(self._runs.values()):
            if run.failure is not None:
                continue
            if run.cursor:
                self._set_goals(run)
            for line in run.lines.values():
                if line.reading.journal in self.present and line.reading.silent(now()):
                    link = self._host.peering.links.get(line.origin)
                    if line.reading.place == LOST and link is not None:
                        self._read(run, line, link)
                    else:
                        self._ping(line)

    # --- commits -----------------------------------------------------------------------------------------

    async def _commit(self, run: Run, timeout: float | None) -> bool:
        goals = self._set_goals(run)
        return await self._host.peering.registry.until(
            lambda: run.failure is not None or all(line.reading.committed >= goal for line, goal in goals), timeout
        )

    def _set_goals(self, run: Run) -> list[tuple[Line, int]]:
        """Send COMMITs where there is something to commit. Returns how far each reading is to be committed."""
        with run.replay.bell:
            goals = [
                (line, run.replay.dealt_with(line.reading))
                for line in run.lines.values()
                if line.reading.next is not None
            ]
        for line, goal in goals:
            line.goal = max(line.goal, goal)
            self._send_commit(run, line)
        return goals

    def _send_commit(self, run: Run, line: Line) -> None:
        """One at a time; `_round` comes back to what did not work."""
        reading = line.reading
        if line.goal > reading.committed and not line.committing and reading.place == OPEN and line.link is not None:
            body = commands.Commit(run.cursor, line.goal, reading.number)
            line.committing = line.link.ask(body, partial(self._committed, run, line), COMMIT_TIMEOUT)

    def _committed(self, run: Run, line: Line, command: Command | None) -> None:
        line.committing = False
        body = command.body if command is not None else None
        if isinstance(body, commands.Commit):
            line.trouble = ""
            line.reading.committed = max(line.reading.committed, body.offset)
            self._send_commit(run, line)
            self._host.peering.registry.changed()
        elif isinstance(body, Error) and body.code == "taken":
            self._taken(run)
        elif isinstance(body, Error) and body.code not in ("hello", "reading"):
            self._warn(line, f"cursor {run.cursor!r} is not committed: {body.reason}")
        elif isinstance(body, Error):
            self._ping(line)  # which gets the same answer, and has it asked for again

    # --- ends ----------------------------------------------------------------------------------------------

    def _taken(self, run: Run) -> None:
        if run.failure is None:
            run.failure = SubscriptionTaken(run.cursor)
            run.replay.stop(run.failure)
            self._hang_up(run)
            self._host.peering.registry.changed()

    def _fail(self, run: Run, line: Line, error: LogUnavailable) -> None:
        if run.failure is None:
            run.failure = error
            self._warn(line, error.reason)
            run.replay.fail(error)
            self._hang_up(run)
            self._host.peering.registry.changed()

    def _hang_up(self, run: Run) -> None:
        for line in run.lines.values():
            if line.request and line.link is not None:
                line.link.send(commands.Unread(line.reading.number))
            line.unfollow()

    def _dispose(self, run: Run, reason: Exception) -> None:
        run.replay.stop(reason)
        if self._runs.pop(run.replay, None) is not None:
            self._hang_up(run)

    def _warn(self, line: Line, reason: str) -> None:
        if line.trouble != reason:
            line.trouble = reason
            self.emit(Warned(f"{line.reading.name}: {reason}"))
