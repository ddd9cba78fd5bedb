"""The publisher's history: recent batches of all its streams, bounded by bytes, to repair from.

Sans-IO. Batches are kept whole and verbatim; the oldest of any stream leave first.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

HISTORY_BYTES_MAX = 64 * 1024 * 1024
ENTRY_BYTES = 280  # what Python spends on a batch beside its bytes; keeps the bound honest for tiny batches

Entry = tuple[int, int, tuple[bytes, ...], int]  # first, end, parts, cost in bytes


class Fetched(NamedTuple):
    """An answer to FETCH. What is in no batch up to `last` is not held."""

    parts: list[bytes]
    last: int


class History:
    """Keeps what was sent, up to `bytes_max` bytes."""

    def __init__(self, bytes_max: int = HISTORY_BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0
        self._order: deque[deque[Entry]] = deque()  # of every batch, oldest first: the stream it is in

    def append(self, stream: deque[Entry], first: int, end: int, parts: tuple[bytes, ...]) -> None:
        """Keep a batch of `stream`; each stream's batches must come in order, without holes."""
        cost = ENTRY_BYTES + sum(map(len, parts))
        stream.append((first, end, parts, cost))
        self._order.append(stream)
        self.bytes += cost
        while self.bytes > self.bytes_max:
            self.bytes -= self._order.popleft().popleft()[3]


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
