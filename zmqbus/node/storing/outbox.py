"""The outbox: a publisher's own small journal, from which its durable messages survive it, under the same ids.

A stream is kept in it from its first durable message on, whole, and with what the history has of it until then: who
acknowledges a message does so for all before it. Being on this disk is as good as being on that of a forwarder: the
outbox acknowledges like one. What it holds is handed over when a forwarder is there: of this run in the ordinary way,
live and by FETCH; of earlier runs by an OFFER, after which the forwarder fetches. What forwarders have acknowledged
leaves it, oldest first: a cursor stands before the first message that they have not.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable

from zmqbus.errors import JournalError, NoSpace
from zmqbus.journal import Batch, Commit, Cursor, Journal, Reader, Retention
from zmqbus.net.clock import time_ns
from zmqbus.node.config import Config
from zmqbus.node.peers.links import Inbox
from zmqbus.node.publishing.outlet import Outlet
from zmqbus.node.publishing.publisher import Publisher
from zmqbus.node.storing.committer import Committer
from zmqbus.node.storing.fetching import answer_fetch
from zmqbus.node.storing.worker import Worker
from zmqbus.protocol import commands
from zmqbus.protocol.commands import HEADS_PER_COMMAND, Command, Offer

DELIVERED = "delivered"  # the cursor before which all is acknowledged
OFFER_PERIOD = 5.0  # seconds between two offers of what is left, for as long as it is
TRIM_PERIOD = 0.5  # seconds between two moves of the cursor

Key = tuple[bytes, int]


class Outbox:
    """On the engine's loop, but for `add` and `keep`."""

    def __init__(
        self,
        journal: Journal,
        outlet: Outlet,
        acks: int,
        loop: asyncio.AbstractEventLoop,
        offer: Callable[[Offer], None],
        warn: Callable[[str], None],
    ) -> None:
        self.journal = journal
        self._outlet = outlet
        self._loop = loop
        self._origin = outlet.origin
        self._acks = acks
        self._offer = offer
        self._warn = warn
        self._writing = Worker(loop, "zmqbus outbox")
        self._reading = Worker(loop, "zmqbus outbox log")
        self._committer = Committer(journal, loop, self._writing, self._committed, self._room, self._failed)
        self._fresh: deque[tuple[Publisher, int, int, int, tuple[bytes, ...]]] = deque()
        self._stirred = False
        self._heads: dict[Key, dict[int, int]] = {}  # by stream and journal: what forwarders have acknowledged
        self._left: dict[Key, int] = {}  # of earlier runs, not acknowledged: one past the last seq
        start = journal.cursors.all().get(DELIVERED, Cursor(0)).offset
        self._reader = Reader(journal, start)
        self._ahead: deque[Batch] = deque()
        self._moved = asyncio.Event()
        self._position = start  # before it all is delivered
        self._tasks = [loop.create_task(self._trim()), loop.create_task(self._offer_again(start))]
        self._answers: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls,
        config: Config,
        outlet: Outlet,
        loop: asyncio.AbstractEventLoop,
        offer: Callable[[Offer], None],
        warn: Callable[[str], None],
    ) -> Outbox:
        """Recover the outbox that `config` names. Raises what `Journal.open` does."""
        assert config.outbox is not None
        retention = Retention(config.outbox_bytes, age_max_ns=0)  # it goes when it is delivered
        journal = await asyncio.to_thread(Journal.open, config.outbox, now_ns=time_ns(), retention=retention)
        try:
            if DELIVERED not in journal.cursors.all():  # before anything is in it, so that nothing goes undelivered
                await asyncio.to_thread(journal.commit_cursors, {DELIVERED: Cursor(journal.first_offset)})
        except BaseException:
            journal.close(time_ns())
            raise
        outbox = outlet.outbox = cls(journal, outlet, config.acks, loop, offer, warn)
        return outbox

    async def close(self) -> None:
        """Commit what has been added, and let go of the journal."""
        for task in (*self._tasks, *self._answers):
            task.cancel()
        await asyncio.wait(self._tasks)
        self._append_fresh()
        with contextlib.suppress(JournalError):  # then it is delivered twice, and stored once
            await self._advance()
        await self._committer.close()
        self._reader.close()
        # By threads that are there: at the end of the interpreter there are no new ones.
        await self._reading.end()
        try:
            await self._writing.do(self.journal.close, time_ns())
        finally:
            await self._writing.end()

    def counters(self) -> dict[str, int | float]:
        """Its size, and messages that no forwarder is known to have."""
        journal = self.journal
        left = journal.durable_offset - journal.cursors.all()[DELIVERED].offset
        return {"outbox_bytes": journal.bytes_used, "outbox_undelivered": left}

    # --- from publishers, under their lock -----------------------------------------------------------

    def keep(self, publisher: Publisher) -> None:
        """From now on this stream is kept, and what came before and not enough forwarders are known to have."""
        if not publisher.kept:
            publisher.kept = True
            ledger = self._outlet.ledger
            account = ledger.account(publisher.topic, publisher.shelf)
            ledger.claim(account, self.journal.number)
            for first, end, parts, _ in publisher.shelf.entries:
                if end > account.durable + 1:
                    self.add(publisher, first, end - first, time_ns(), parts)

    def add(self, publisher: Publisher, first: int, count: int, time: int, parts: tuple[bytes, ...]) -> None:
        """A batch of a stream that is kept was sent."""
        if self._committer.full:
            return  # it is pinned in the history, and taken from there when there is room
        self._fresh.append((publisher, first, count, time, parts))
        if not self._stirred:
            self._stirred = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._stir)

    # --- onto the disk -------------------------------------------------------------------------------

    def _stir(self) -> None:
        self._append_fresh()
        self._committer.pump()

    def _append_fresh(self) -> None:
        self._stirred = False  # first: who adds from here on calls again
        try:
            while self._fresh and not self._committer.full:
                publisher, first, count, time, parts = self._fresh.popleft()
                self._append(publisher, first, count, time, parts)
        except NoSpace:
            self._committer.check_room()
        except JournalError as error:
            self._failed(error)

    def _append(self, publisher: Publisher, first: int, count: int, time: int, parts: tuple[bytes, ...]) -> None:
        topic = publisher.prefix[:-1]
        frame, *external = parts
        payload = memoryview(frame)[len(publisher.prefix) :]
        begins = (topic, self._origin) not in self.journal.known
        account = self._outlet.ledger.accounts[publisher.topic]
        spared = account.durable >= first - 1  # while there was no room, forwarders have taken what is missing here
        self.journal.append(topic, self._origin, first, count, time, payload, *external, allow_gap=begins or spared)

    def _committed(self, commit: Commit) -> None:
        heads = [(topic.decode(), seq) for topic, origin, seq in commit.acked if origin == self._origin]
        with self._outlet.lock:
            self._outlet.ledger.acked(self.journal.number, heads, self._committer.full)

    def _room(self, full: bool) -> None:
        """There is no room, or again. What was not taken meanwhile is still in the history: it is not acknowledged."""
        outlet, number = self._outlet, self.journal.number
        with outlet.lock:
            outlet.ledger.acked(number, [], full)
            if full:
                self._fresh.clear()
                self._warn(f"{self.journal.full}: durable messages wait until a forwarder has taken others")
                return
            try:
                for publisher in [publisher for publisher in outlet.publishers.values() if publisher.kept]:
                    topic = publisher.prefix[:-1]
                    for first, end, parts, _ in publisher.shelf.entries:
                        if first >= self.journal.expected(topic, self._origin):
                            self._append(publisher, first, end - first, time_ns(), parts)
            except NoSpace:
                self._loop.call_soon(self._committer.check_room)
        self._committer.pump()

    def _failed(self, error: BaseException) -> None:
        self._warn(f"the outbox takes nothing more: {error}")
        with self._outlet.lock:
            self._outlet.ledger.acked(self.journal.number, [], True)

    # --- to forwarders -------------------------------------------------------------------------------

    def delivered(self, journal: int, origin: int, heads: Iterable[tuple[bytes, int]]) -> None:
        """A forwarder has all of these streams up to these seqs."""
        for topic, seq in heads:
            key = topic, origin
            if origin != self._origin and key not in self.journal.known:
                continue  # it was never in here
            by_journal = self._heads.setdefault(key, {})
            by_journal[journal] = max(seq, by_journal.get(journal, 0))
            if key in self._left and self._left[key] <= self._delivered(key) + 1:
                del self._left[key]
        self._moved.set()

    def offer(self) -> None:
        """Tell forwarders what is left of earlier runs."""
        by_origin: dict[int, list[tuple[bytes, int]]] = {}
        for (topic, origin), following in self._left.items():
            by_origin.setdefault(origin, []).append((topic, following))
        for origin, heads in by_origin.items():
            for at in range(0, len(heads), HEADS_PER_COMMAND):
                self._offer(Offer(origin, heads[at : at + HEADS_PER_COMMAND]))

    def serve(self, inbox: Inbox, identity: bytes, command: Command, upto: int) -> bool:
        """Answer a FETCH from the disk, if what it begins with is there. Nothing is said of messages beyond `upto`."""
        body = command.body
        if not isinstance(body, commands.Fetch):
            return False
        upto = min(upto, self.journal.head(body.topic, body.origin).durable)
        if upto < body.first:
            return False
        answer = answer_fetch(self.journal, self._reading, inbox, identity, command.request, body, upto)
        task = self._loop.create_task(answer)
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)
        return True

    def _delivered(self, key: Key) -> int:
        """All up to this seq is on as many forwarders' disks as are wanted."""
        heads = sorted(self._heads.get(key, {}).values(), reverse=True)
        return heads[self._acks - 1] if len(heads) >= self._acks else 0

    async def _offer_again(self, start: int) -> None:
        try:
            left = await self._reading.do(_leftovers, self.journal, start, self._origin)
        except JournalError as error:
            self._warn(f"what earlier runs have left in the outbox is not handed over: {error}")
            return
        for key, following in left.items():
            if self._delivered(key) + 1 < following:
                self._left[key] = following
        while self._left:
            self.offer()
            await asyncio.sleep(OFFER_PERIOD)

    async def _trim(self) -> None:
        """Move the cursor behind what is delivered, again and again."""
        try:
            while True:
                await self._moved.wait()
                self._moved.clear()
                try:
                    await self._advance()
                except NoSpace:  # for the cursor, on a disk that is full
                    self._moved.set()
                await asyncio.sleep(TRIM_PERIOD)
        except JournalError as error:
            self._failed(error)

    async def _advance(self) -> None:
        reader, ahead = self._reader, self._ahead
        while ahead or not reader.caught_up:
            if not ahead:  # nothing that was read is dropped, should whoever waits for it here be cancelled
                await self._reading.do(lambda: ahead.extend(reader.read()))
                continue
            batch = ahead[0]
            if batch.last_seq > self._delivered((batch.topic, batch.origin)):
                break
            self._position = ahead.popleft().next_offset
        if self._position > self.journal.cursors.all()[DELIVERED].offset:
            await self._committer.commit_cursors({DELIVERED: Cursor(self._position)})


def _leftovers(journal: Journal, start: int, own: int) -> dict[Key, int]:
    """What other runs have left from an offset on: by stream, one past the last seq."""
    reader = Reader(journal, start)
    left: dict[Key, int] = {}
    try:
        while not reader.caught_up:
            for batch in reader.read():
                if batch.origin != own:
                    left[batch.topic, batch.origin] = batch.last_seq + 1
    finally:
        reader.close()
    return left
