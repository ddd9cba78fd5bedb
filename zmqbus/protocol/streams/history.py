"""The publisher's history: recent batches of all its streams, to repair from, and those that nobody has acknowledged.

Sans-IO. Batches are kept whole and verbatim; the oldest of any stream leave first. One that a forwarder is to
acknowledge and has not stays when its time has come: it is *pinned*. Both kinds are bounded, each by its own bytes.

    a stream's shelf   | pinned … | recent … |
                         ▲          ▲
                         │          └ leave when `bytes` exceeds its bound, if `keep_from` is beyond them; else pinned
                         └ leave when `release` puts `keep_from` beyond them
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

HISTORY_BYTES_MAX = 64 * 1024 * 1024
BUFFER_BYTES_MAX = 64 * 1024 * 1024  # what may be pinned before publishers wait
ENTRY_BYTES = 280  # what Python spends on a batch beside its bytes; keeps the bound honest for tiny batches
NOTHING = 2**64  # as `keep_from`: no message is to be kept until it is acknowledged

Entry = tuple[int, int, tuple[bytes, ...], int]  # first, end, parts, cost in bytes


class Fetched(NamedTuple):
    """An answer to FETCH. What is in no batch up to `last` is not held."""

    parts: list[bytes]
    last: int


class Shelf:
    """One stream's part of the history."""

    __slots__ = ("entries", "keep_from", "pinned")

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        self.keep_from = NOTHING
        """Messages from this seq on are to be kept until they are acknowledged."""
        self.pinned = 0
        """How many of the first entries are there for that reason only."""


class History:
    """Keeps what was sent, up to `bytes_max` bytes, and beside that up to `buffer_bytes_max` which must be kept."""

    def __init__(self, bytes_max: int = HISTORY_BYTES_MAX, buffer_bytes_max: int = BUFFER_BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self.buffer_bytes_max = buffer_bytes_max
        self.bytes = 0
        self.pinned_bytes = 0
        self.full = False
        """Whether more is pinned than should be: then streams that somebody is to acknowledge have to wait."""
        self._order: deque[Shelf] = deque()  # of every batch that is not pinned, oldest first: where it is

    def append(self, shelf: Shelf, first: int, end: int, parts: tuple[bytes, ...]) -> None:
        """Keep a batch of a stream; each stream's batches must come in order, without holes."""
        cost = ENTRY_BYTES + sum(map(len, parts))
        shelf.entries.append((first, end, parts, cost))
        self._order.append(shelf)
        self.bytes += cost
        while self.bytes > self.bytes_max:
            self._retire()

    def _retire(self) -> None:
        shelf = self._order.popleft()
        _, end, _, cost = shelf.entries[shelf.pinned]
        self.bytes -= cost
        if end > shelf.keep_from:
            shelf.pinned += 1
            self.pinned_bytes += cost
            self.full = self.pinned_bytes > self.buffer_bytes_max
        else:
            shelf.entries.popleft()  # none is pinned: those before it were acknowledged before it

    def release(self, shelf: Shelf, keep_from: int) -> None:
        """All before `keep_from` is acknowledged, or NOTHING is to be."""
        shelf.keep_from = keep_from
        entries = shelf.entries
        while shelf.pinned and entries[0][1] <= keep_from:
            shelf.pinned -= 1
            self.pinned_bytes -= entries.popleft()[3]
        self.full = self.pinned_bytes > self.buffer_bytes_max


def fetch(stream: deque[Entry], first: int, last: int, bytes_max: int) -> Fetched:
    """What `stream` still holds of first..last, at least one batch if any, then up to `bytes_max` bytes.

    `Fetched.last` tells how far the answer goes; the rest, if any, can be asked for anew.
    """
    if not stream or stream[0][0] > last or stream[-1][1] <= first:
        return Fetched([], last)
    low, high = 0, len(stream)
    while low < high:  # find the first batch that ends behind `first`
        middle = (low + high) // 2
        if stream[middle][1] <= first:
            low = middle + 1
        else:
            high = middle
    parts: list[bytes] = []
    size = 0
    reached = first
    for index in range(low, len(stream)):
        begin, end, own, cost = stream[index]
        if begin > last or (parts and size + cost > bytes_max):
            break
        parts.extend(own)
        size += cost
        reached = end - 1
    return Fetched(parts, min(reached, last))
