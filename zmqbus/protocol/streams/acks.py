"""A publisher's account with the forwarders: who claims which of its streams, what they have acknowledged, who waits.

Sans-IO; callers hold the publishers' lock. The rules:

1. A forwarder is known by the number of its journal, which survives its restarts. What it once claimed, it claims
   until it says otherwise: while it is away, what it has not acknowledged is kept, and publishers wait when the buffer
   is full.
2. An acknowledgement is cumulative: everything of the stream up to that seq is on that journal's disk, for ever.
3. A message is durable when as many journals as are wanted have acknowledged it. Any one may, whether or not it claims
   the topic at the moment.
4. A waiter is told once: when its message is durable, or that no journal that claims the stream has room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from heapq import heappop, heappush
from typing import Protocol

from zmqbus.protocol.streams.history import NOTHING, History, Shelf
from zmqbus.protocol.topics import Matcher


class Waiter(Protocol):
    """Somebody who wants to know when a message is durable."""

    def done(self, problem: str | None) -> None:
        """It is, or why it will not be for now. Must not block."""


class Account:
    """One stream's acknowledgements."""

    __slots__ = ("claimants", "durable", "heads", "holds", "shelf", "topic", "waiting")

    def __init__(self, topic: str, shelf: Shelf) -> None:
        self.topic = topic
        self.shelf = shelf
        self.claimants: set[int] = set()
        self.heads: dict[int, int] = {}  # by journal: all up to this seq is there
        self.holds = 0  # who is about to wait for a message: until it is durable it must not be lost
        self.durable = 0
        """Everything up to this seq is on as many disks as are wanted."""
        self.waiting: list[tuple[int, int, Waiter]] = []  # a heap by seq


class Ledger:
    """All accounts of one node. `acks`: how many journals have to have a message."""

    def __init__(self, history: History, acks: int) -> None:
        self.accounts: dict[str, Account] = {}
        """By topic: of streams that are claimed, or that somebody waits for."""
        self._history = history
        self._acks = acks
        self._claims: dict[int, Callable[[str], bool]] = {}
        self._full: set[int] = set()
        self._number = 0

    # --- what forwarders say -----------------------------------------------------------------------

    def claimed(self, journal: int, patterns: Iterable[str], streams: Mapping[str, Shelf]) -> None:
        """A forwarder says which topics it journals: of our `streams`, by topic, and of those to come."""
        matches = self._claims[journal] = Matcher(patterns).matches
        self._full.discard(journal)
        for topic, shelf in streams.items():
            if matches(topic):
                self.claim(self.account(topic, shelf), journal)
            elif (account := self.accounts.get(topic)) is not None:
                account.claimants.discard(journal)
                self._keep(account)

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
            durable = seq if self._acks == 1 else self._common(account)
            if durable > account.durable:
                account.durable = durable
                self._keep(account)
                while account.waiting and account.waiting[0][0] <= durable:
                    heappop(account.waiting)[2].done(None)
        if not full:
            self._full.discard(journal)
        elif journal not in self._full:
            self._full.add(journal)
            for account in self.accounts.values():
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

    def wait(self, account: Account, seq: int, waiter: Waiter) -> None:
        """Tell `waiter` when the message is durable; perhaps at once."""
        if seq <= account.durable:
            waiter.done(None)
            return
        self._number += 1
        heappush(account.waiting, (seq, self._number, waiter))
        self._refuse(account)

    def forget(self, waiter: Waiter) -> None:
        """It no longer waits."""
        for account in self.accounts.values():
            if any(entry[2] is waiter for entry in account.waiting):
                account.waiting = sorted(entry for entry in account.waiting if entry[2] is not waiter)

    # --- inside ------------------------------------------------------------------------------------

    def _keep(self, account: Account) -> None:
        self._history.release(account.shelf, account.durable + 1 if account.claimants or account.holds else NOTHING)

    def _common(self, account: Account) -> int:
        """The seq that as many journals as are wanted have reached."""
        heads = sorted(account.heads.values(), reverse=True)
        return heads[self._acks - 1] if len(heads) >= self._acks else 0

    def _refuse(self, account: Account) -> None:
        """Nobody needs to wait where no claimant takes anything."""
        if account.waiting and account.claimants and account.claimants <= self._full:
            waiting, account.waiting = account.waiting, []
            for _, _, waiter in waiting:
                waiter.done("the journal has no room: it takes nothing more until there is")
