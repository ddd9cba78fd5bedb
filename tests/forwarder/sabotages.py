"""Deliberate bugs in the way of durable messages, each to be switched on by itself: `ack_before_sync(monkeypatch)`."""

from __future__ import annotations

from typing import Any

import pytest

from zmqbus.forwarder import ingest
from zmqbus.forwarder.ingest import JournalTracker
from zmqbus.forwarder.readings import Readings
from zmqbus.journal import Cursor, Journal
from zmqbus.journal.positions import Streams
from zmqbus.node.receiving.replay import Replay
from zmqbus.node.storing.committer import Committer
from zmqbus.node.storing.outbox import Outbox
from zmqbus.protocol.frames import Batch
from zmqbus.protocol.streams import acks
from zmqbus.protocol.streams.acks import Ledger
from zmqbus.protocol.streams.history import History, Shelf
from zmqbus.protocol.streams.tracking import Tracker

Patch = pytest.MonkeyPatch


def ack_before_sync(patch: Patch) -> None:
    def sync(self: Committer, ticket: Any) -> float:
        ticket.synced = True
        return 0.0

    patch.setattr(Committer, "_timed_sync", sync)


def ack_on_arrival(patch: Patch) -> None:
    """Of what the journal has accepted, as if that were as good as on its disk."""
    real = Streams.head
    patch.setattr(Streams, "head", lambda self, *key: (head := real(self, *key))._replace(durable=head.accepted))


def waiters_told_of_a_lower_seq(patch: Patch) -> None:
    real = Ledger.acked

    def acked(self: Ledger, journal: int, heads: Any, full: bool) -> None:
        heads = list(heads)
        real(self, journal, heads, full)
        for topic, _ in heads:
            if (account := self.accounts.get(topic)) is not None:
                waiting, account.waiting = account.waiting, []
                for *_, waiter in waiting:
                    waiter.done(None)

    patch.setattr(Ledger, "acked", acked)


def acks_given_once(patch: Patch) -> None:
    patch.setattr(JournalTracker, "observe_head", Tracker.observe_head)
    patch.setattr(JournalTracker, "heads", Tracker.heads)


def one_ack_is_enough(patch: Patch) -> None:
    patch.setattr(Ledger, "_common", lambda self, account: max(account.heads.values(), default=0))
    patch.setattr(Ledger, "suffices", lambda self, account: bool(account.claimants))


def dedup_forgotten_on_restart(patch: Patch) -> None:
    patch.setattr(Streams, "recover", lambda self, batch: None)


def holes_journaled(patch: Patch) -> None:
    """What comes next is taken, whatever is missing before it."""
    real = Tracker.observe

    def observe(self: Tracker, batch: Batch, now: float) -> None:
        stream = self.streams.get((batch.topic, batch.origin))
        if stream is not None and batch.first > stream.next:
            stream.next = batch.first
        real(self, batch, now)

    patch.setattr(Tracker, "observe", observe)


def impatient(patch: Patch) -> None:
    real = Tracker.__init__
    patch.setattr(
        ingest.Tracker, "__init__", lambda self, *args, **options: real(self, *args, **{**options, "patient": False})
    )


def history_evicts_what_is_not_acknowledged(patch: Patch) -> None:
    def append(self: History, shelf: Shelf, first: int, end: int, parts: tuple[bytes, ...]) -> None:
        shelf.keep_from = acks.NOTHING
        real(self, shelf, first, end, parts)

    real = History.append
    patch.setattr(History, "append", append)


def readers_not_held_back(patch: Patch) -> None:
    real = Journal.write

    def write(self: Journal, now_ns: int) -> Any:
        ticket = real(self, now_ns)
        if ticket is not None:
            ticket.writer.segment.durable_end, self.durable_offset = ticket.position, ticket.next_offset
        return ticket

    patch.setattr(Journal, "write", write)


def committed_ahead_of_consumption(patch: Patch) -> None:
    patch.setattr(Replay, "dealt_with", lambda self, reading: reading.next)


def committed_with_what_is_in_hand(patch: Patch) -> None:
    patch.setattr(Replay, "dealt_with", lambda self, reading: self._position(reading))


def commit_confirmed_at_once(patch: Patch) -> None:
    real = Readings._move

    async def move(self: Readings, inbox: Any, identity: bytes, request: int, body: Any) -> None:
        inbox.answer(identity, body, request)
        await real(self, inbox, identity, request, body)

    patch.setattr(Readings, "_move", move)


def stale_commits_accepted(patch: Patch) -> None:
    def commit(self: Readings, inbox: Any, identity: bytes, origin: int, request: int, body: Any) -> None:
        self._spawn(self._move(inbox, identity, request, body))

    patch.setattr(Readings, "_commit", commit)


def commits_taken_back(patch: Patch) -> None:
    real = Committer.commit_cursors
    patch.setattr(Committer, "commit_cursors", lambda self, cursors, forward=False: real(self, cursors))


def cursor_ignored(patch: Patch) -> None:
    real = Readings._start

    async def start(self: Readings, reading: Any, body: Any) -> int:
        begun = await real(self, reading, body)
        return body.offset if reading.cursor in self._journal.cursors.all() else begun

    patch.setattr(Readings, "_start", start)


def outbox_trimmed_before_delivery(patch: Patch) -> None:
    patch.setattr(Outbox, "_delivered", lambda self, key: 1 << 60)


def outbox_begins_at_its_end(patch: Patch) -> None:
    """As if a cursor that is there when it opens stood behind everything."""
    real = Outbox.__init__

    def init(self: Outbox, journal: Journal, *args: Any) -> None:
        journal.commit_cursors({"delivered": Cursor(journal.durable_offset)})
        real(self, journal, *args)

    patch.setattr(Outbox, "__init__", init)
