"""Logs of several journals made one: each message once, by its id, and no loss without a word. Sans-IO.

Within one journal a stream's seqs only grow, each is there once, and where they jump something is missing. Between
journals nothing is certain: both may have a message, either may be ahead, and what one lacks the other may have. So:

1. Of every stream the ranges that were delivered are known. What is in them is a duplicate; what is not is delivered,
   even if it is late. The ranges are bounded, and so are the streams; what is forgotten may come again.
2. A jump within a journal is a hole. It is lost when no journal can have it any more: none of the others that can be
   reached now has the stream still to come to it, or is on its way to the end that it was told of.
3. After a range of offsets that is no more, jumps of that journal are explained, and not reported again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import msgspec

from zmqbus.protocol.streams.stream import Gap

STREAMS_MAX = 100_000  # what one node may publish; some 300 bytes each
SPANS_MAX = 64  # ranges of one stream
HOLES_MAX = 1000  # that wait for a journal that may fill them; beyond that the oldest are reported

Span = tuple[int, int]
"""From a seq to before another."""

_NO_SPANS: list[Span] = []
_NO_HEADS: dict[int, int] = {}


class Met(msgspec.Struct, gc=False, eq=False):
    """One stream as far as it has been met. The ordinary case, a batch of `journal` that begins at `next`, is so cheap
    that a driver may do it itself: set `next` to its end."""

    topic: str
    key: tuple[bytes, int]
    begin: int
    next: int
    """`begin` to before `next` is the last range that was delivered."""
    journal: int
    """The one that is exactly at `next`; 0: none, or it is not known."""
    before: list[Span] = msgspec.field(default_factory=lambda: _NO_SPANS)
    reported: list[Span] = msgspec.field(default_factory=lambda: _NO_SPANS)  # as lost
    heads: dict[int, int] = msgspec.field(default_factory=lambda: _NO_HEADS)  # of the other journals

    def add(self, first: int, end: int) -> list[Span]:
        """Deliver a range. Returns what of it is new."""
        spans = [*self.before, (self.begin, self.next)]
        fresh: list[Span] = []
        merged: list[Span] = []
        at, low, high = first, first, end
        for span in spans:
            if span[1] < first or span[0] > end:
                merged.append(span)
                continue
            if span[0] > at:
                fresh.append((at, span[0]))
            at = max(at, span[1])
            low, high = min(low, span[0]), max(high, span[1])
        if at < end:
            fresh.append((at, end))
        merged.append((low, high))
        merged.sort()
        self.begin, self.next = merged.pop()
        self.before = merged[-SPANS_MAX:] if merged else _NO_SPANS
        return fresh

    def lacking(self, first: int, end: int) -> list[Span]:
        """What of a range was neither delivered nor reported as lost; it is reported now."""
        spans = sorted([*self.before, (self.begin, self.next), *self.reported])
        found: list[Span] = []
        for start, stop in spans:
            if stop > first and start < end:
                if start > first:
                    found.append((first, start))
                first = max(first, stop)
        if first < end:
            found.append((first, end))
        if found:
            self.reported = [*self.reported, *found][-SPANS_MAX:]
        return found


class Merging:
    """All streams of one subscription to the log."""

    def __init__(self) -> None:
        self.lost: list[Gap] = []
        """To be reported, and taken out."""
        self.duplicates = 0
        """Messages that came once more than they were delivered."""
        self._streams: OrderedDict[tuple[bytes, int], Met] = OrderedDict()
        self._present: frozenset[int] = frozenset()
        self._holes: list[tuple[Met, int, int, set[int]]] = []  # stream, range, journals that may yet fill it

    def present(self, journals: Iterable[int]) -> None:
        """The journals that can be read now."""
        self._present = frozenset(journals)
        for *_, waits in self._holes:
            waits &= self._present
        self._review()

    def observe(self, journal: int, topic: bytes, origin: int, first: int, end: int) -> tuple[Met, list[Span]]:
        """A batch came out of a journal. Returns its stream, and what of it is to be delivered.

        Raises:
            UnicodeDecodeError: that is no topic.
        """
        key = (topic, origin)
        met = self._streams.get(key)
        if met is None:
            met = self._streams[key] = Met(topic.decode(), key, first, end, journal)
            if len(self._streams) > STREAMS_MAX:
                self._streams.popitem(last=False)
            return met, [(first, end)]
        expected = met.next if met.journal == journal else met.heads.get(journal)
        if met.journal not in (0, journal):
            met.heads = {**met.heads, met.journal: met.next}
        fresh = met.add(first, end)
        self.duplicates += end - first - sum(stop - start for start, stop in fresh)
        head = end if expected is None else max(expected, end)
        if head == met.next:
            met.journal = journal
            met.heads.pop(journal, None)
        else:
            met.journal = 0
            met.heads = {**met.heads, journal: head}
        if expected is not None and first > expected:
            self._hole(met, expected, first, journal)
        if self._holes:
            for hole, _, stop, waits in self._holes:
                if hole is met and head >= stop:
                    waits.discard(journal)
            self._review()
        return met, fresh

    def caught_up(self, journal: int) -> None:
        """All that a journal had when it last said so has come."""
        if self._holes:
            for *_, waits in self._holes:
                waits.discard(journal)
            self._review()

    def excuse(self, journal: int) -> None:
        """A part of a journal is no more, and reported."""
        for met in self._streams.values():
            if met.journal == journal:
                met.journal = 0
            elif journal in met.heads:
                met.heads = {other: head for other, head in met.heads.items() if other != journal}

    def _hole(self, met: Met, first: int, end: int, journal: int) -> None:
        waits = set(self._present - {journal})
        waits -= {other for other in waits if _head(met, other) >= end}
        self._holes.append((met, first, end, waits))
        if len(self._holes) > HOLES_MAX:
            self._holes[0][3].clear()

    def _review(self) -> None:
        """Report the holes that nobody will fill."""
        for met, first, end, waits in self._holes:
            if not waits:
                self.lost += [Gap(met.topic, met.key[1], start, stop - 1) for start, stop in met.lacking(first, end)]
        self._holes = [hole for hole in self._holes if hole[3]]


def _head(met: Met, journal: int) -> int:
    return met.next if met.journal == journal else met.heads.get(journal, 0)
