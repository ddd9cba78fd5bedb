"""The synchronous face: `Node` and what it hands out.

The engine runs on one background thread; publishing and consuming happen on the caller's own thread, on sockets that
the engine only connects. Calls that concern the bus as a whole (subscribing, peers, waiting) are carried out by the
engine's thread while the caller waits.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Coroutine, Iterable, Sequence
from datetime import datetime
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from zmqbus.errors import NodeClosed, SetupError
from zmqbus.net.adapter import new_loop
from zmqbus.net.keys import BusKey
from zmqbus.node.config import Config
from zmqbus.node.engine import Engine
from zmqbus.node.events import EventStream, TopicInfo, Undelivered
from zmqbus.node.faces.requests.sync import Requesting
from zmqbus.node.faces.subscription import LogSubscription, Subscription
from zmqbus.node.faces.worker import Worker
from zmqbus.node.publishing.durability import publish_durably, wait_for_room, wait_until_all_durable
from zmqbus.node.publishing.publisher import SMALL, Publisher
from zmqbus.node.receiving.intake import Intake
from zmqbus.node.work.queues.owner import delayed
from zmqbus.protocol.members.peers import Peer

T = TypeVar("T")
CLOSE_TIMEOUT = 2.0
NOT_LIVE = (
    "start= and durable= read the log, which has all there is; history= and observe= are for live messages: "
    "use the ones or the others"
)
_nodes: weakref.WeakSet[Node] = weakref.WeakSet()


class Node(Requesting):
    """One participant of a bus: publishes, subscribes, and finds the others by itself.

    Args:
        name: for people; default is the host's name and the process id. Need not be unique.
        bus: nodes see only nodes of the same bus.
        key: a bus key, or the path of its file. Without one the node stays on this machine.
        interface: with a key, the address or name of the network interface to use; default: all.
        peers: inboxes of nodes to join, "tcp://host:port"; one that can be reached is enough to find the rest.
        discovery: "mdns", "static" (only `peers` and whom they know), or "both".
        history_bytes: how much of what was published is kept in memory for repairs.
        buffer_bytes: how much more, of what forwarders have yet to acknowledge, before publishers wait.
        acks: the number of forwarders that must have a message on disk before it is durable.
        outbox: a directory for durable messages, this node's own. They are durable when they are there, and are handed
            to a forwarder whenever one appears, in this run or a later one.
        outbox_bytes: its bound; default 1 GiB.

    Raises:
        SetupError: it cannot be opened as asked; says what to change.
        KeyFileError, AuthError: the key cannot be used.
        JournalError: the outbox cannot be used; says why.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        bus: str = "default",
        key: str | Path | BusKey | None = None,
        interface: str | None = None,
        peers: Sequence[str] = (),
        discovery: Literal["mdns", "static", "both"] = "both",
        history_bytes: int | None = None,
        buffer_bytes: int | None = None,
        acks: int = 1,
        outbox: str | Path | None = None,
        outbox_bytes: int | None = None,
    ) -> None:
        config = Config.make(
            name, bus, key, interface, peers, discovery, history_bytes, buffer_bytes, acks, outbox, outbox_bytes
        )
        self._closed = True  # until it is open
        self._loop = new_loop()
        self._engine = Engine(config, self._loop)
        self._thread = threading.Thread(target=self._run, name=f"zmqbus {config.name}", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._engine.open(), self._loop).result()
        except BaseException:
            self._stop(0.0)
            raise
        self._closed = False
        self._publishers = self._engine.outlet.publishers
        self._queues: dict[str, Publisher] = {}
        _nodes.add(self)

    # --- publish ---------------------------------------------------------------------------------

    def publish(
        self,
        topic: str,
        value: object,
        *,
        headers: dict[str, Any] | None = None,
        durable: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Send a value to every subscriber of a topic; returns its seq: 1, 2, 3 … for each topic of this node.

        At low rates it is sent at once; in a burst, messages gather for at most about a millisecond. Forwarders that
        claim the topic journal it; while they have too much to catch up with, this waits.

        Args:
            durable: return when the message is on a forwarder's disk, and not before.
            timeout: seconds to wait for that, or for room; None: no limit, except that a topic which no forwarder
                claims, or fewer than `acks`, is given 5 s to find them.

        Raises:
            TopicError: the topic breaks the grammar.
            UnsupportedValue: the value, or a header, cannot be carried by msgpack; names the type.
            MessageTooLarge: it is larger than 64 MiB.
            TooManyStreams: this node publishes on 100,000 topics already.
            BufferFull: there was no room within `timeout`; nothing was published.
            NotDurable: it was published, but is not known to be on disk. It is kept, and may yet come there.
            NodeClosed: the node has been closed.
        """
        try:
            publisher = self._publishers[topic]
        except KeyError:
            publisher = self._engine.outlet.publisher(topic)
        full = publisher.full
        if full and headers is None and timeout is None and not durable:
            # As in `Publisher.send`: one call less is a fifth less for the most frequent case.
            kind = type(value)
            if (kind is bytes or (kind is str and value.isascii())) and len(value) <= SMALL:  # type: ignore[attr-defined, arg-type]
                seq = next(publisher.seqs)
                if seq >= full:
                    return publisher.send_late(seq, value, 0)  # type: ignore[arg-type]
                publisher.ring[seq & publisher.mask] = value
                if not publisher.full:
                    publisher.flush_to(seq + 1)
                return seq
        if durable:
            return publish_durably(self._engine.outlet, publisher, value, headers, timeout)
        if timeout is not None:
            wait_for_room(self._engine.outlet, publisher, timeout)
            return publisher.send_without_wait(value, headers)
        return publisher.send(value, headers)

    def publisher(self, topic: str) -> Publisher:
        """A topic made ready for hot loops: `send(value)` is `publish(topic, value)` without the look-up."""
        return self._engine.outlet.publisher(topic)

    def flush(self, timeout: float | None = None) -> None:
        """Send at once what a burst is gathering, and wait until all that was published so far has left: to the socket,
        and, on topics that a forwarder claims, to its disk.

        Raises:
            NotDurable: some of it is not known to be on disk after `timeout` seconds.
            NodeClosed: the node has been closed.
        """
        if self._engine.refusal is not None:
            raise self._engine.refusal
        outlet = self._engine.outlet
        outlet.flush_all()
        outlet.make_room(timeout=inf if timeout is None else timeout)
        wait_until_all_durable(outlet, timeout)

    # --- queues ----------------------------------------------------------------------------------

    def push(
        self,
        queue: str,
        value: object,
        *,
        headers: dict[str, Any] | None = None,
        durable: bool = False,
        delay: float | None = None,
        timeout: float | None = None,
    ) -> int:
        """Send a value to one worker of a queue, which is a topic; returns its seq there.

        It is held until a worker has done it: by the forwarder that claims the topic, or else in this node's memory.
        While more waits there than fits (`buffer_bytes`), this waits. Subscriptions to the topic see it, too.

        Args:
            durable: return when it is on a forwarder's disk, and not before.
            delay: seconds before which no worker is to have it.
            timeout: seconds to wait for room, or for the disk; None: no limit.

        Raises:
            BufferFull: there was no room within `timeout`; nothing was pushed.
            SetupError: the delay is not a number of seconds.
            And what `publish` raises.
        """
        publisher = self._queues.get(queue)
        if publisher is None:
            publisher = self._queues[queue] = self._engine.jobs.publisher(queue)
        if delay is not None:
            headers = delayed(headers, delay)
        if durable:
            return publish_durably(self._engine.outlet, publisher, value, headers, timeout)
        if timeout is not None:
            wait_for_room(self._engine.outlet, publisher, timeout)
            return publisher.send_without_wait(value, headers)
        return publisher.send(value, headers)

    def push_many(self, queue: str, values: Iterable[object]) -> int:
        """Push many values, each as a job of its own; returns the seq of the last one, 0 if there is none.

        Raises:
            As `push`, of the first value that cannot be pushed. Those before it have been.
        """
        return self._engine.jobs.publisher(queue).send_many(values)

    # --- subscribe -------------------------------------------------------------------------------

    def subscribe(
        self,
        *patterns: str,
        type: Any = None,
        history: int = 0,
        start: str | int | datetime | None = None,
        durable: str | None = None,
        on_gap: Literal["skip", "raise"] = "skip",
        observe: bool = False,
    ) -> Subscription:
        """Receive every message whose topic fits a pattern: `*` is one token, a final `>` one or more.

        Live, it returns when every known publisher has registered it: what they publish from then on is owed. With
        `start` or `durable` the messages come out of the logs of all forwarders on the bus, once they are on disk: it
        returns when every known forwarder has said where it begins, and with none yet at once, with a Warned event. A
        forwarder that goes away is waited for; one that comes later is read from when this subscription began.

        Args:
            type: decode values into this type (a msgspec.Struct, dataclass, TypedDict, list[int], …).
            history: of each stream also deliver the last so many messages, as far as publishers still hold them.
            start: begin there in the log: "first", "last" (from now on), "-1h" (or s, m, d: that long ago), an ISO
                8601 time with its zone, a datetime with a tzinfo, or an offset. Times are those of the publishers'
                clocks. An offset is one journal's: with several forwarders each is read from its own.
            durable: a name, 1 to 255 bytes. The forwarders keep a cursor for it: the first time it begins at `start`,
                or at the end; afterwards where it left off, whatever `start` says. One consumer at a time has it, the
                last to come.
            on_gap: when messages cannot be repaired, "skip" them (see `lost`, `gaps`, `events()`) or "raise" GapError.
            observe: only look on: publishers neither count this subscription nor wait for it.

        Raises:
            TopicError: a pattern breaks the grammar.
            SetupError: `start`, `durable` or `type` is not understood, or together with what only live messages have.
            LogUnavailable: a forwarder cannot read from there.
        """
        if start is None and durable is None:
            return Subscription(self, patterns, type, history, on_gap, observe)
        if history or observe:
            raise SetupError(NOT_LIVE)
        return LogSubscription(self, patterns, type, start, durable, on_gap)

    def _unsubscribe(self, intake: Intake) -> None:
        if intake.closed is None and not self._closed:
            with contextlib.suppress(NodeClosed):
                self._call(self._engine.unsubscribe(intake))

    # --- queues ----------------------------------------------------------------------------------

    def pull(
        self,
        queue: str,
        *,
        group: str = "workers",
        credit: int | None = None,
        lease: float = 30.0,
        type: Any = None,
        start: str | int | datetime | None = None,
    ) -> Worker:
        """Take jobs: what was pushed on a topic, or on all that fit a pattern, each handed to one worker only; and of
        what is published there, the share of this member of its group. They come from all nodes and forwarders.

        Args:
            group: who pulls the same by the same name shares it.
            credit: how many unfinished jobs this worker may have, of each node that has jobs; if several have, they
                share it. None: as many as keep it busy, which is one if a job takes it a second.
            lease: seconds for which a job is this worker's. If it is not settled by then it goes to another.
            type: decode values into this type. A job whose value does not fit is rejected, with a Warned event.
            start: where a group begins in the logs of forwarders that do not know it yet; see `subscribe`. None: with
                what is published from now on.

        Raises:
            TopicError: the pattern breaks the grammar.
            SetupError: one of the others is not understood; says which, and what to give.
        """
        return Worker(self, queue, group, credit, lease, type, start)

    # --- the bus ---------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """For people."""
        return self._engine.config.name

    @property
    def origin(self) -> int:
        """The random 64-bit id of this node, new at every start."""
        return self._engine.origin

    @property
    def endpoints(self) -> dict[str, str]:
        """Where this node can be reached: {"inbox": "tcp://…", "pub": "tcp://…"}."""
        return self._engine.peering.endpoints

    def peers(self) -> list[Peer]:
        """The other nodes that are on the bus now."""
        return self._call(self._engine.peers())

    def wait_for_peers(self, n: int = 1, timeout: float | None = None) -> list[Peer]:
        """Wait until at least `n` other nodes are there.

        Raises:
            WaitTimeout: they were not within `timeout` seconds.
        """
        return self._call(self._engine.wait_for_peers(n, timeout))

    def wait_for_subscribers(
        self, topic: str, n: int = 1, timeout: float | None = None, *, observers: bool = False
    ) -> int:
        """Wait until `topic` has at least `n` subscriptions; returns how many. What is published next is owed to them.

        With `observers`, those that only look on count as well.

        Raises:
            WaitTimeout: it had not within `timeout` seconds.
        """
        return self._call(self._engine.peering.registry.wait_for_subscribers(topic, n, timeout, observers))

    def topics(self, *patterns: str, timeout: float = 2.0) -> list[TopicInfo]:
        """Every stream on the bus whose topic fits a pattern (none: all), by topic; each publisher is asked.

        Publishers that do not answer within `timeout` seconds are missing, and named by a Warned event.

        Raises:
            TopicError: a pattern breaks the grammar.
        """
        return self._call(self._engine.topics(patterns, timeout))

    def events(self) -> EventStream:
        """What happens from now on: PeerJoined, PeerLeft, ForwarderUp, ForwarderDown, DuplicateName, Gap, LogGap,
        CaughtUp, JobRefused, Warned."""
        if self._engine.refusal is not None:
            raise self._engine.refusal
        stream = EventStream(self._engine.forget_listener)
        self._engine.add_listener(stream)
        return stream

    def statistics(self) -> dict[str, int | float]:
        """Counters since start, by name."""
        return self._call(self._engine.statistics())

    # --- the end ---------------------------------------------------------------------------------

    def close(self, timeout: float = CLOSE_TIMEOUT) -> list[Undelivered]:
        """Leave the bus: send what is gathered, and answer repairs until all subscribers have all, or for `timeout`.

        Returns the subscribers that had not confirmed everything by then. May be called twice.
        """
        if self._closed:
            return []
        self._closed = True
        _nodes.discard(self)
        return self._stop(timeout)

    def _stop(self, timeout: float) -> list[Undelivered]:
        undelivered: list[Undelivered] = []
        if self._thread.is_alive():
            # Here and now: threads that publish without end hardly let the engine's thread have its turn.
            self._engine.refuse()
            future = asyncio.run_coroutine_threadsafe(self._engine.close(timeout), self._loop)
            try:
                undelivered = future.result(timeout + 5)
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(5)
        return undelivered

    def __enter__(self) -> Node:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            import warnings

            warnings.warn(f"node {self.name!r} was not closed", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        return f"<Node {self.name} {self.origin:016x} on bus {self._engine.config.bus}{' closed' * self._closed}>"

    # --- inside ----------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the engine's thread do this, and wait."""
        refusal = self._engine.refusal
        if refusal is None and self._closed:
            refusal = NodeClosed(f"node {self.name!r} is closed")
        if refusal is not None:
            work.close()
            raise refusal
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _forked(self) -> None:
        """In a forked child: the engine's thread is not there, and the sockets belong to the parent."""
        self._closed = True
        self._engine.forked()


def _after_fork() -> None:
    for node in list(_nodes):
        node._forked()
    _nodes.clear()


def _at_exit() -> None:
    for node in list(_nodes):
        node.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)  # a script that just ends has published what it published
