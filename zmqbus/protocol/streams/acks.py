"""A publisher's account with the forwarders: who claims which of its streams, what they have acknowledged, who waits.

Sans-IO; callers hold the publishers' lock. The rules:

1. A forwarder is known by the number of its journal, which survives its restarts. What it once claimed, it claims
   until it says otherwise: while it is away, what it has not acknowledged is kept, and publishers wait when the buffer
   is full.
2. An acknowledgement is cumulative: everything of the stream up to that seq is on that journal's disk, for ever.
3. A message is durable when as many journals as are wanted have acknowledged it. Any one may, whether or not it claims
   the topic at the moment. What the publisher of a queue gives out itself, though, it did not hand to any journal: for
   who waits for that, it is durable when it is done, and not when what follows it is acknowledged.
4. A waiter is told once: when its message is durable, or that it cannot be for now: the journals that claim the stream
   have no room, or it needed one that claims the stream no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from heapq import heappop, heappush
from typing import Protocol

from zmqbus.protocol.streams.history import NOTHING, History, Shelf
from zmqbus.protocol.topics import Matcher

NO_ROOM = "the journal has no room: it takes nothing more until there is"
UNCLAIMED = "a forwarder no longer claims the topic, and not as many others do as are to have it"


class Waiter(Protocol):
    """Somebody who wants to know when a message is durable."""

    def done(self, problem: str | None) -> None:
        """It is, or why it will not be for now. Must not block."""


class Account:
    """One stream's acknowledgements."""

    __slots__ = ("claimants", "durable", "heads", "holds", "own", "settled", "shelf", "topic", "waiting")

    def __init__(self, topic: str, shelf: Shelf) -> None:
        self.topic = topic
        self.shelf = shelf
        self.claimants: set[int] = set()
        self.heads: dict[int, int] = {}  # by journal: all up to this seq is there
        self.holds = 0  # who is about to wait for a message: until it is durable it must not be lost
        self.settled = -1
        """Of a queue: everything up to this seq was done by workers. Else -1."""
        self.own = -1
        """Of a queue handed to a forwarder: what its publisher gives out itself ends with this seq. Else -1."""
        self.durable = 0
        """Everything up to this seq is on as many disks as are wanted."""
        self.waiting: list[tuple[int, int, Waiter]] = []  # a heap by seq

    @property
    def unacked(self) -> int:
        """Messages that are kept for somebody to acknowledge. What had left the history before anybody claimed it will
        never be, nor what is the publisher's own, and so nobody is to wait for it."""
        entries = self.shelf.entries
        return max(0, entries[-1][1] - max(entries[0][0], self.durable + 1, self.own + 1)) if entries else 0


class Ledger:
    """All accounts of one node."""

    def __init__(self, history: History, acks: int) -> None:
        self.accounts: dict[str, Account] = {}
        """By topic: of streams that are claimed, or that somebody waits for."""
        self._history = history
        self.acks = acks
        """How many journals are to have a message."""
        self._claims: dict[int, Callable[[str], bool]] = {}
        self._full: set[int] = set()
        self._number = 0

    # --- what forwarders say -----------------------------------------------------------------------

    def claimed(self, journal: int, patterns: Iterable[str], streams: Mapping[str, Shelf]) -> None:
        """A forwarder says which topics it journals: of our `streams`, by topic, and of those to come."""
        matches = self._claims[journal] = Matcher(patterns).matches
        self._full.discard(journal)
        for topic, shelf in streams.items():
            account = self.accounts.get(topic)
            if matches(topic):
                account = self.account(topic, shelf)
                self.claim(account, journal)
                self._refuse(account)
            elif account is not None and journal in account.claimants:
                account.claimants.discard(journal)
                self._keep(account)
                self._refuse(account, unclaimed=True)

    def opened(self, topic: str, shelf: Shelf) -> None:
        """A stream begins."""
        for journal, matches in self._claims.items():
            if matches(topic):
                self.claim(self.account(topic, shelf), journal)

    def acked(self, journal: int, heads: Iterable[tuple[str, int]], full: bool) -> None:
        """A forwarder acknowledges all of these streams up to these seqs; `full`: it takes nothing more for now."""
        for topic, seq in heads:
            account = self.accounts.get(topic)
            if account is None or seq <= account.heads.get(journal, 0):
                continue
            account.heads[journal] = seq
            durable = seq if self.acks == 1 else self._common(account)
            if durable > account.durable:
                account.durable = durable
                self._keep(account)
                self._tell(account)
            if self._full and self.acks > 1:
                self._refuse(account)  # it may be for the full ones alone now
        if not full:
            self._full.discard(journal)
        elif journal not in self._full:
            self._full.add(journal)
            for account in self.accounts.values():
                if journal in account.claimants:
                    self._refuse(account)

    # --- what publishers ask -----------------------------------------------------------------------

    def account(self, topic: str, shelf: Shelf) -> Account:
        """A stream's account, opened on first use."""
        account = self.accounts.get(topic)
        if account is None:
            account = self.accounts[topic] = Account(topic, shelf)
        return account

    def claim(self, account: Account, journal: int) -> None:
        """A stream is to be acknowledged by this journal, too."""
        account.claimants.add(journal)
        self._keep(account)

    def hold(self, account: Account, number: int) -> None:
        """So many more (or, if negative, fewer) are about to wait for a message on this stream."""
        account.holds += number
        self._keep(account)

    def settled(self, account: Account, seq: int) -> None:
        """It is a queue: what is neither done nor acknowledged is kept, and up to this seq it is done."""
        account.settled = seq
        self._keep(account)
        if account.own >= 0:
            self._tell(account)

    def handed(self, account: Account, own: int) -> None:
        """It is a queue, and forwarders are given it from behind this seq on."""
        account.own = own
        self._tell(account)

    def suffices(self, account: Account) -> bool:
        """Whether as many journals as are wanted claim the stream."""
        return len(account.claimants) >= self.acks

    def wait(self, account: Account, seq: int, waiter: Waiter) -> None:
        """Tell `waiter` when the message is durable; perhaps at once. While nobody claims the stream, somebody may."""
        if _is_durable(account, seq):
            waiter.done(None)
        elif self._full and self._lacks_room(account, seq):
            waiter.done(NO_ROOM)
        else:
            self._number += 1
            heappush(account.waiting, (seq, self._number, waiter))

    def forget(self, waiter: Waiter) -> None:
        """It no longer waits."""
        for account in self.accounts.values():
            if any(entry[2] is waiter for entry in account.waiting):
                account.waiting = sorted(entry for entry in account.waiting if entry[2] is not waiter)

    # --- inside ------------------------------------------------------------------------------------

    def _keep(self, account: Account) -> None:
        wanted = account.claimants or account.holds or account.settled >= 0
        self._history.release(account.shelf, max(account.durable, account.settled) + 1 if wanted else NOTHING)

    def _tell(self, account: Account) -> None:
        """Whoever waits for what is durable now."""
        waiting = account.waiting
        if account.settled < account.own:  # some that wait for less may have to wait for longer
            account.waiting = sorted(entry for entry in waiting if not _is_durable(account, entry[0]))
            for seq, _, waiter in waiting:
                if _is_durable(account, seq):
                    waiter.done(None)
            return
        while waiting and _is_durable(account, waiting[0][0]):
            heappop(waiting)[2].done(None)

    def _common(self, account: Account) -> int:
        """The seq that as many journals as are wanted have reached."""
        heads = sorted(account.heads.values(), reverse=True)
        return heads[self.acks - 1] if len(heads) >= self.acks else 0

    def _lacks_room(self, account: Account, seq: int) -> bool:
        """Whether it is for the full journals among the claimants that this message cannot be durable."""
        if seq <= account.own:
            return False
        there = self._there(account, seq)
        return len(there | (account.claimants - self._full)) < self.acks <= len(there | account.claimants)

    def _there(self, account: Account, seq: int) -> set[int]:
        """The journals that have a message."""
        return {journal for journal, head in account.heads.items() if head >= seq}

    def _refuse(self, account: Account, unclaimed: bool = False) -> None:
        """Nobody needs to wait for what will not be."""
        waiting, account.waiting = sorted(account.waiting), []
        for entry in waiting:  # in order, so that what is left is a heap
            seq, _, waiter = entry
            if unclaimed and len(self._there(account, seq) | account.claimants) < self.acks:
                waiter.done(UNCLAIMED)
            elif self._lacks_room(account, seq):
                waiter.done(NO_ROOM)
            else:
                account.waiting.append(entry)


def _is_durable(account: Account, seq: int) -> bool:
    return seq <= (account.settled if seq <= account.own else account.durable)
