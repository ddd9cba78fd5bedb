"""What a node answers its peers: its messages again, and how it is. What more a forwarder says is an `Extension`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from zmqbus.node.events import Event
from zmqbus.node.peers.links import Inbox
from zmqbus.node.publishing.outlet import Outlet
from zmqbus.node.storing.fetching import FETCH_BYTES
from zmqbus.node.storing.outbox import Outbox
from zmqbus.node.work.queues.owner import Owner
from zmqbus.protocol import commands
from zmqbus.protocol.commands import HEADS_PER_COMMAND, QUEUES_PER_STATISTICS, Command, QueueFigures
from zmqbus.protocol.frames import SEQ_MAX

TOPICS_PER_STATS = 1000

Counters = dict[str, int | float | str]


def key_of(queue: QueueFigures) -> tuple[str, str]:
    """Where it is among the queues of a node."""
    return queue.topic, queue.group


class Extension(Protocol):
    """What makes a node more than a node. All of it on the engine's loop."""

    role: str
    claims: list[str]
    journal: int

    def serve(self, inbox: Inbox, identity: bytes, origin: int, command: Command) -> bool:
        """Answer a command. False: it is not one of ours."""

    def heard(self, event: Event) -> None:
        """Something has happened, perhaps to a peer."""

    def counters(self) -> Counters:
        """Figures beside those of every node."""

    def cursors(self) -> list[tuple[str, int, bool]]:
        """Name, offset, and whether somebody reads under it."""

    def queues(self) -> list[QueueFigures]:
        """What is to be done, by queue and group."""


class Service:
    """Answers commands that are not about peering."""

    def __init__(
        self,
        origin: int,
        outlet: Outlet,
        inbox: Inbox,
        jobs: Owner,
        counters: Callable[[], Counters],
        extension: Extension | None,
        outbox: Outbox | None,
    ) -> None:
        self.fetches = self.fetch_bytes = 0
        self._origin = origin
        self._outlet = outlet
        self._inbox = inbox
        self._jobs = jobs
        self._counters = counters
        self._extension = extension
        self._outbox = outbox

    def serve(self, identity: bytes, origin: int, command: Command) -> None:
        """Answer `command` of the node `origin`."""
        body = command.body
        match body:
            case commands.Fetch() if self._from_outbox(identity, command, body):
                pass
            case commands.Fetch(origin=whose) if whose == self._origin:
                first = max(body.first, self._jobs.floor(body.topic, origin))
                held = self._outlet.fetch(body.topic, first, body.last, min(body.bytes, FETCH_BYTES))
                self.fetches += 1
                self.fetch_bytes += sum(map(len, held.parts))
                answer = commands.Batches(body.topic, body.origin, body.first, held.last)
                self._inbox.answer(identity, answer, command.request, held.parts)
            case commands.Ack(origin=whose):
                if whose == self._origin:
                    self._outlet.acked(body.journal, body.heads, body.full)
                if self._outbox is not None:
                    self._outbox.delivered(body.journal, whose, body.heads)
            case commands.Stats():
                self._inbox.answer(identity, self._statistics(body), command.request)
            case _ if self._extension is not None and self._extension.serve(self._inbox, identity, origin, command):
                pass
            case _ if self._jobs.serve(identity, origin, command):
                pass
            case commands.Fetch(origin=whose):
                error = commands.Error("origin", f"this node does not keep messages of {whose:016x}")
                self._inbox.answer(identity, error, command.request)
            case commands.Read() | commands.Credit() | commands.Commit() | commands.Unread() | commands.Offer():
                self._inbox.answer(identity, commands.Error("journal", "this node has no journal"), command.request)
            case _:
                error = commands.Error("unexpected", f"{type(body).__name__} makes no sense here")
                self._inbox.answer(identity, error, command.request)

    def _from_outbox(self, identity: bytes, command: Command, body: commands.Fetch) -> bool:
        """What is no longer in memory, or never was, may be on our own disk. Each answers for its own part."""
        if self._outbox is None:
            return False
        oldest = self._outlet.oldest(body.topic) if body.origin == self._origin else SEQ_MAX
        return body.first < oldest and self._outbox.serve(self._inbox, identity, command, oldest - 1)

    def _statistics(self, body: commands.Stats) -> commands.Statistics:
        topics = self._outlet.topics(body.skip, TOPICS_PER_STATS) if body.topics else []
        cursors = self._extension.cursors()[:HEADS_PER_COMMAND] if self._extension is not None else []
        more = len(topics) == TOPICS_PER_STATS
        queues = self._queues((body.queue, body.group))
        page = queues[:QUEUES_PER_STATISTICS]
        return commands.Statistics(self._counters(), topics, more, cursors, page, len(queues) > len(page))

    def _queues(self, first: tuple[str, str]) -> list[QueueFigures]:
        """From this topic and group on, in their order, which stays while queues come and go."""
        there = self._jobs.figures() + (self._extension.queues() if self._extension is not None else [])
        return sorted((one for one in there if key_of(one) >= first), key=key_of)
