"""Waiting for forwarders: until a message is on disk, until all are, until there is room. Both faces.

What is waited for is the `Ledger`'s to know; a `Tally` is who waits. The outlet's lock is held for both. Forwarders
take a little time to commit, unless they are asked: a HEAD says that somebody waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from threading import Lock
from typing import Any, Protocol

from zmqbus.errors import BufferFull, NotDurable
from zmqbus.net.clock import now, sleep
from zmqbus.node.publishing.publisher import TURN, Keeper, Publisher
from zmqbus.protocol.streams.acks import Ledger
from zmqbus.protocol.streams.history import History

CLAIM_PATIENCE = 5.0  # seconds that a durable publish waits for some forwarder to claim its topic: one may be starting
ROOM_POLL = 0.002  # seconds between looks for room in the buffer; it is a wait for a disk, or for somebody's repair


class Accounts(Protocol):
    """What is needed of the outlet."""

    lock: Lock
    ledger: Ledger
    history: History
    publishers: dict[str, Publisher]
    refusal: Exception | None
    pace: int
    outbox: Keeper | None

    def flush_all(self) -> None:
        """Send everything that has been gathered."""


class Tally:
    """Waits for one or many messages; calls `wake` once, when all are durable or one will not be for now."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.left = 1  # one more than are waited for, until all are known
        self.problem: str | None = None
        self._wake = wake

    def done(self, problem: str | None) -> None:
        """Of one message."""
        if self.left and self.problem is None:
            self.left -= 1
            self.problem = problem
            if not self.left or problem is not None:
                self._wake()


def hold(out: Accounts, publisher: Publisher, number: int = 1) -> None:
    """What is published next on this stream is kept until it is durable; -1: no longer for our sake."""
    with out.lock:
        if out.outbox is not None:
            out.outbox.keep(publisher)
        out.ledger.hold(out.ledger.account(publisher.topic, publisher.shelf), number)


def watch(out: Accounts, publisher: Publisher, seq: int, tally: Tally) -> bool:
    """Wait for one message. Returns whether as many forwarders claim it as are to have it."""
    with out.lock:
        if out.pace != TURN:
            publisher.flush()
            publisher.ask()
        elif not publisher.asks:  # others may be about to publish in this turn, and to wait together
            publisher.asks = True
            publisher.expect()
        account = out.ledger.account(publisher.topic, publisher.shelf)
        tally.left += 1
        out.ledger.wait(account, seq, tally)
        tally.done(None)
        return out.ledger.suffices(account)


def is_kept(out: Accounts, publisher: Publisher) -> bool:
    """Whether some forwarder is to acknowledge this stream, or workers are to do what is in it."""
    account = out.ledger.accounts.get(publisher.topic)
    return account is not None and (bool(account.claimants) or account.settled >= 0)


def can_be_durable(out: Accounts, publisher: Publisher) -> bool:
    """Whether as many forwarders as are to have it claim this stream."""
    account = out.ledger.accounts.get(publisher.topic)
    return account is not None and out.ledger.suffices(account)


def watch_all(out: Accounts, tally: Tally) -> None:
    """Wait for everything published so far on streams that are claimed."""
    out.flush_all()
    with out.lock:
        for topic, account in out.ledger.accounts.items():
            if account.claimants and account.unacked:
                publisher = out.publishers[topic]
                publisher.ask()
                tally.left += 1
                out.ledger.wait(account, publisher.sent, tally)
            if account.claimants and account.settled < account.own:
                tally.left += 1
                out.ledger.wait(account, account.own, tally)
        tally.done(None)


def unacked(out: Accounts) -> int:
    """Messages on claimed streams that are not known to be on disk."""
    with out.lock:
        return sum(account.unacked for account in out.ledger.accounts.values() if account.claimants)


def forget(out: Accounts, tally: Tally) -> None:
    """Nobody waits any more."""
    with out.lock:
        out.ledger.forget(tally)


def failure(out: Accounts, tally: Tally, publisher: Publisher, seq: int, timeout: float) -> NotDurable:
    """The error for one message whose waiting has ended in vain."""
    forget(out, tally)
    if tally.problem is not None:
        return NotDurable(1, tally.problem, seq)
    if not can_be_durable(out, publisher):
        wanted, start = out.ledger.acks, "zmqbus forwarder --journal DIR"
        reason = f"no forwarder on the bus claims {publisher.topic}; start one: {start}"
        if wanted > 1:
            found = len(out.ledger.accounts[publisher.topic].claimants)
            reason = f"{wanted} forwarders are to have it, and {found} on the bus claim {publisher.topic}: {start}"
        return NotDurable(1, reason, seq)
    return NotDurable(1, f"no acknowledgement within {timeout:g} s", seq)


def failure_of_all(out: Accounts, tally: Tally, timeout: float) -> NotDurable:
    """The same for all that was published."""
    forget(out, tally)
    with out.lock:
        own = sum(max(0, account.own - account.settled) for account in out.ledger.accounts.values())
    return NotDurable(unacked(out) + own, tally.problem or f"no acknowledgement within {timeout:g} s")


# --- for threads ---------------------------------------------------------------------------------


def wait_for_room(out: Accounts, publisher: Publisher, timeout: float) -> None:
    """Raises BufferFull if for `timeout` seconds there is none."""
    deadline = now() + timeout
    while out.history.full and out.refusal is None and is_kept(out, publisher):
        if now() >= deadline:
            raise BufferFull(publisher.topic, out.history.pinned_bytes, timeout)
        sleep(ROOM_POLL)


def publish_durably(
    out: Accounts, publisher: Publisher, value: object, headers: dict[str, Any] | None, timeout: float | None
) -> int:
    """Publish, when there is room, and wait until it is on disk. Raises BufferFull, NotDurable."""
    bell = Lock()
    bell.acquire()
    tally = Tally(bell.release)
    deadline = inf if timeout is None else now() + timeout
    wait_for_room(out, publisher, inf if timeout is None else timeout)
    hold(out, publisher)
    try:
        seq = publisher.send_without_wait(value, headers)
        claimed = watch(out, publisher, seq, tally)
        while not bell.acquire(timeout=_left(deadline, claimed)):
            if now() >= deadline or not (claimed or can_be_durable(out, publisher)):
                raise failure(out, tally, publisher, seq, timeout or CLAIM_PATIENCE)
            claimed = True
        if tally.problem is not None:
            raise failure(out, tally, publisher, seq, 0)
    finally:
        hold(out, publisher, -1)
    return seq


def wait_until_all_durable(out: Accounts, timeout: float | None) -> None:
    """Raises NotDurable."""
    bell = Lock()
    bell.acquire()
    tally = Tally(bell.release)
    watch_all(out, tally)
    if not bell.acquire(timeout=-1 if timeout is None else max(0.0, timeout)) or tally.problem is not None:
        raise failure_of_all(out, tally, timeout or 0.0)


def _left(deadline: float, claimed: bool) -> float:
    left = max(0.0, deadline - now())
    if not claimed:
        left = min(left, CLAIM_PATIENCE)
    return -1 if left == inf else left


# --- for asyncio ---------------------------------------------------------------------------------


async def room(out: Accounts, publisher: Publisher, timeout: float) -> None:
    """As `wait_for_room`."""
    deadline = now() + timeout
    while out.history.full and out.refusal is None and is_kept(out, publisher):
        if now() >= deadline:
            raise BufferFull(publisher.topic, out.history.pinned_bytes, timeout)
        await asyncio.sleep(ROOM_POLL)


async def durably_published(
    out: Accounts, publisher: Publisher, value: object, headers: dict[str, Any] | None, timeout: float | None
) -> int:
    """As `publish_durably`."""
    bell: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    tally = Tally(lambda: _ring(bell))
    deadline = inf if timeout is None else now() + timeout
    await room(out, publisher, inf if timeout is None else timeout)
    hold(out, publisher)
    try:
        seq = publisher.send_without_wait(value, headers)
        claimed = watch(out, publisher, seq, tally)
        while True:
            left = _left(deadline, claimed)
            done, _ = await asyncio.wait((bell,), timeout=None if left < 0 else left)
            if done:
                break
            if now() >= deadline or not (claimed or can_be_durable(out, publisher)):
                raise failure(out, tally, publisher, seq, timeout or CLAIM_PATIENCE)
            claimed = True
        if tally.problem is not None:
            raise failure(out, tally, publisher, seq, 0)
    except asyncio.CancelledError:
        forget(out, tally)
        raise
    finally:
        bell.cancel()
        hold(out, publisher, -1)
    return seq


async def all_durable(out: Accounts, timeout: float | None) -> None:
    """As `wait_until_all_durable`."""
    bell: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    tally = Tally(lambda: _ring(bell))
    watch_all(out, tally)
    try:
        done, _ = await asyncio.wait((bell,), timeout=timeout)
    except asyncio.CancelledError:
        forget(out, tally)
        raise
    if not done or tally.problem is not None:
        bell.cancel()
        raise failure_of_all(out, tally, timeout or 0.0)


def _ring(bell: asyncio.Future[None]) -> None:
    if not bell.done():
        bell.set_result(None)
