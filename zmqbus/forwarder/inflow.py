"""What comes in: takes batches off the socket into the journal, has them committed, and tells their publishers.

Two ways of going about it. Where somebody waits for an acknowledgement, as a HEAD may say, everything is done at once.
Where nobody does, live traffic comes first: what trickles in is looked at every few milliseconds, so that those who
publish and receive find a processor that is free, and the disk is not synced for every message.

A journal without room ends the subscription, so that publishers need not wait for us; what they have not been told is
safe they keep. When there is room again it is subscribed anew, and fetched from where the journal ends.

The first message of a queue waits, and all behind it, until the queue is written down: its place holds the journal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from zmqbus.errors import JournalError, NodeClosed, NoSpace, TopicError
from zmqbus.forwarder.acks import Acks
from zmqbus.forwarder.ingest import Ingest, JournalTracker
from zmqbus.forwarder.queues import Queues
from zmqbus.journal import Commit, Journal
from zmqbus.net.clock import now
from zmqbus.node.engine import Engine
from zmqbus.node.events import Warned
from zmqbus.node.peers.links import Link
from zmqbus.node.receiving.feed import Feed
from zmqbus.node.receiving.intake import Intake
from zmqbus.node.storing.committer import Committer
from zmqbus.protocol import commands

ATTENTIVE = 1.0  # seconds for which everything is done at once, after somebody has waited for something
RELAXED = 0.005  # seconds between two looks at the socket, when nobody does
RELAXED_BATCHES = 24  # more than that since the last look is no trickle: the queue holds 64 on either side
ACK_LINGER = 0.02  # seconds that an acknowledgement may take that nobody waits for
REFUSED_PERIOD = 30.0  # seconds after which a queue for which there was no cursor is tried once more
ROOM_PERIOD = 1.0  # seconds between two times of saying that there is no room: others come, and what was said gets lost
ACK_COMMITS = 4  # or so many commits, which then are of 1 MiB: publishers have a bound on what is not acknowledged


class Inflow:
    """Everything between the sockets of a node and the committer of a journal. On the loop."""

    def __init__(
        self,
        journal: Journal,
        engine: Engine,
        claims: list[str],
        loop: asyncio.AbstractEventLoop,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.committer: Committer  # set by whoever makes both
        self.queues: Queues  # likewise
        self._journal = journal
        self._engine = engine
        self._claims = claims
        self._loop = loop
        self._on_failure = on_failure
        self._acks = Acks(journal.number)
        self._tracker = self._new_tracker()
        self._ingest: Ingest | None = None
        self._opening: asyncio.Task[None] | None = None
        self._look: asyncio.Handle | None = None  # the next, if not when something arrives
        self._ack_timer: asyncio.TimerHandle | None = None
        self._room_timer: asyncio.TimerHandle | None = None
        self._founding: asyncio.Task[None] | None = None  # of a queue: nothing is taken meanwhile
        self._again: asyncio.TimerHandle | None = None  # for what was refused
        self._untold = 0  # commits since publishers were told
        self._attentive_until = 0.0
        self._urgent = False
        self._watching = False
        self._refuses_streams = False  # and has said so
        self._stopped = False  # until the disk has caught up

    def start(self) -> None:
        """Subscribe to what is claimed."""
        self._tracker = self._new_tracker()
        self._opening = self._loop.create_task(self._attach())

    def stop(self) -> None:
        """Take what has arrived, and then no more."""
        self._drain()
        self._detach()
        for handle in (self._look, self._ack_timer, self._room_timer, self._again, self._founding):
            if handle is not None:
                handle.cancel()

    def distrust(self) -> None:
        """Queues may be gone that were known."""
        if self._ingest is not None:
            self._ingest.distrust()

    def _detach(self) -> None:
        """Unsubscribe."""
        if self._opening is not None:
            self._opening.cancel()
        if (ingest := self._ingest) is not None:
            self._engine.dispose(ingest)
            self._ingest = None

    def committed(self, commit: Commit) -> None:
        """More is on disk."""
        for topic, origin, seq in commit.acked:
            self._acks.add(topic, origin, seq)
        self._untold += 1
        self._tell()
        if self._stopped:
            self._stopped = False
            self._drain()

    def room(self, full: bool) -> None:
        """The journal is full, or no longer. While it is, nobody should wait for us."""
        if self._room_timer is not None:
            self._room_timer.cancel()
        self._tell_room()
        if not full:
            self._engine.emit(Warned("the journal has room again"))
            self.start()
            return
        self._engine.emit(Warned(f"{self._journal.full}; nothing more is accepted until there is room"))
        self._detach()

    def offered(self, keeper: int, offer: commands.Offer) -> None:
        """A node has messages of one that is no more. They are fetched and acknowledged as if they were its own."""
        if self._ingest is not None and offer.origin not in self._engine.peering.links:
            self._tracker.keepers[offer.origin] = keeper
            self._ingest.heads(offer.origin, offer.heads, more=False)
            self._drain()

    # --- in ----------------------------------------------------------------------------------------

    def _new_tracker(self) -> JournalTracker:
        return JournalTracker(self._claims, self._sources, self._journal, self._acks.add)

    async def _attach(self) -> None:
        def make(number: int, feed: Feed) -> Intake:
            tail = self.queues.tail
            ingest = self._ingest = Ingest(number, self._claims, feed, self._engine, self._tracker, self._journal, tail)
            ingest.before_close = partial(self._watch, False)
            return ingest

        try:  # waits for the slowest peer; what others send is taken meanwhile
            await self._engine.attach(self._claims, make, self._look_now, internal=True)
        except NodeClosed:
            pass
        except Exception as error:  # no socket to be had, say: it takes nothing in, and must not seem to
            self._on_failure(error)

    def _sources(self, topic: str, origin: int) -> Sequence[int]:
        """Whom to ask for a repair."""
        sources = self._engine.sources(topic, origin)
        keeper = self._tracker.keepers.get(origin)
        return sources if keeper is None or not self._engine.peering.joined(keeper) else [keeper, *sources]

    def _look_now(self) -> None:
        """There is something to do beside the socket."""
        if self._look is not None:
            self._look.cancel()
        self._look = self._loop.call_soon(self._drain)

    def _watch(self, wanted: bool) -> None:
        """Whether to look as soon as something arrives."""
        if wanted != self._watching and self._ingest is not None:
            self._watching = wanted
            if wanted:
                self._loop.add_reader(self._ingest.fd, self._drain)
            else:
                self._loop.remove_reader(self._ingest.fd)

    def _drain(self) -> None:
        """Append what has arrived, and have it written; see to the next look."""
        ingest = self._ingest
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if ingest is None or ingest.closed is not None or self._stopped or self._founding is not None:
            return
        try:
            ingest.take(0)
        except NoSpace as error:
            self.committer.check_room()
            if not self.committer.full:  # for one stream more: with those that are known it goes on
                self._refuse_streams(error)
            return
        except JournalError as error:
            self._stopped = True  # for good: who is told of it stops us, and not one frame after the other
            self._on_failure(error)
            return
        if ingest.asked:
            ingest.asked = False
            self._attentive_until = now() + ATTENTIVE
        self._urgent = now() < self._attentive_until
        self.committer.pump(self._urgent)
        if ingest.unknown is not None:
            self._founding = self._loop.create_task(self._found(ingest, ingest.unknown))
            return
        self._stopped = ingest.is_behind  # the next commit goes on here
        pause = self._pause(ingest)
        delay, due = pause, ingest.timer()
        if pause is None and due is not None:  # a hole is to be seen to, perhaps much later than something arrives
            delay = max(RELAXED, due - now())
        if delay is not None and not self._stopped:
            self._look = self._loop.call_later(delay, self._drain)
        self._watch(pause is None and not self._stopped)
        self._tell()

    def _pause(self, ingest: Ingest) -> float | None:
        """Until the next look, whatever arrives; None: as soon as something does."""
        if ingest.has_more:
            return 0.0
        return RELAXED if 0 < ingest.taken <= RELAXED_BATCHES and not self._urgent else None

    async def _found(self, ingest: Ingest, topic: bytes) -> None:
        """Something was pushed on a topic for the first time."""
        try:
            refusal: Exception | None = None
            try:
                await self.queues.found(topic)
            except (NoSpace, ValueError, TopicError) as error:
                refusal = error
                self._refuse_queue(topic, error)
            finally:
                self._founding = None
            if self._ingest is ingest:
                ingest.met(refused=refusal is not None)
        except NoSpace:
            self.committer.check_room()
        except JournalError as error:
            self._on_failure(error)
            return
        self._drain()

    def _refuse_queue(self, topic: bytes, reason: Exception) -> None:
        name = topic.decode(errors="replace")
        self._engine.emit(Warned(f"nothing that is pushed on {name} is accepted: {reason}"))
        if self._again is None:
            self._again = self._loop.call_later(REFUSED_PERIOD, self._start_again)

    def _start_again(self) -> None:
        """Subscribed anew, what was refused comes once more, and may be accepted this time."""
        self._again = None
        if self._ingest is not None and self._founding is None:
            self._detach()
            self.start()

    def _refuse_streams(self, reason: NoSpace) -> None:
        if not self._refuses_streams:
            self._refuses_streams = True
            self._engine.emit(Warned(f"{reason}; nothing is accepted of others"))
        self.committer.pump(self._urgent)
        self._look_now()

    # --- back --------------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Tell publishers what is on disk, now or soon."""
        if not self._acks:
            return
        if self._urgent or self._untold >= ACK_COMMITS:
            self.tell_now()
        elif self._ack_timer is None:
            self._ack_timer = self._loop.call_later(ACK_LINGER, self.tell_now)

    def tell_now(self) -> None:
        """Tell publishers what they have not been told."""
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        self._untold = 0
        for origin, ack in self._acks.take(self.committer.full):
            if origin == self._engine.origin:
                self._engine.outlet.acked(ack.journal, ack.heads, ack.full)
            elif (link := self._link(origin)) is not None:
                link.send(ack)

    def _tell_room(self) -> None:
        """Tell everybody whether there is room; while there is none, again and again."""
        full = self.committer.full
        for origin, link in self._engine.peering.links.items():
            link.send(commands.Ack(self._journal.number, origin, [], full))
        self._room_timer = self._loop.call_later(ROOM_PERIOD, self._tell_room) if full else None

    def _link(self, origin: int) -> Link | None:
        """To a publisher, or to who keeps its messages."""
        return self._engine.peering.links.get(self._tracker.keepers.get(origin, origin))
