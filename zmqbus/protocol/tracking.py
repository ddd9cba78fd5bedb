"""What a subscriber knows of each stream: in order, duplicate, gap, held, repaired or lost.

Sans-IO: knows no sockets, threads or clock; callers pass `now` (monotonic seconds). The rules:

1. A stream is owed from the seq its publisher named in HEADS when the subscription was registered (earlier by
   `history`); a stream that begins after that, from 1.
2. Of every stream the next expected seq is known. That one is delivered. Older ones are duplicates. Newer ones
   are held, and what lies between is fetched: from the publisher, then from whoever else may have it.
3. What nobody has is a `Gap`, exact, delivered in its place in the stream. Nothing is skipped without one.
4. What is held is bounded by bytes. Beyond that newer batches are let go, to be fetched when their turn comes.

A driver feeds `observe`, `observe_head`, `heads` and `fetched`, takes what is ready from `ready` in order, and sends
what `repairs(now)` says. The ordinary case, the next batch of a known stream, is so cheap that a driver may do it
itself: see `Stream.next`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush

import msgspec

from zmqbus.protocol.frames import Batch
from zmqbus.protocol.topics import Matcher

HELD_BYTES_MAX = 16 * 1024 * 1024  # per subscription: a few round trips' worth of repair
EARLY_BYTES_MAX = 4 * 1024 * 1024  # frames that arrive before their publisher's HEADS
FETCHES_MAX = 8  # in flight per subscription: no storm after a partition
FETCH_TIMEOUT = 1.0  # for the first try, doubled for each further one
FETCH_TRIES = 4  # per source: 1 + 2 + 4 + 8 s
ORPHAN_PATIENCE = 15.0  # how long a gap waits for a source that is away to come back
SOFT_DELAY = 0.05  # news that came beside the data path: the data may still be on its way


class Gap(msgspec.Struct, frozen=True, gc=False):
    """Messages `first` to `last` of a stream are lost to this subscription: no history that answers has them."""

    topic: str
    origin: int
    first: int
    last: int

    @property
    def count(self) -> int:
        """How many messages."""
        return self.last - self.first + 1


class Fetch(msgspec.Struct, frozen=True, gc=False):
    """Ask node `source` for messages `first` to `last` of (topic, origin)."""

    source: int
    topic: bytes
    origin: int
    first: int
    last: int


# A stream with a hole is in exactly one of these places; a settled one in none.
SETTLED = 0
QUEUED = 1  # to be asked for as soon as there is room in flight
ASKED = 2  # a Fetch is on its way; `due` is when to stop waiting
PARKED = 3  # waits until `due`: for data that may still arrive, for a source to come back, or before a new try


class Stream(msgspec.Struct, gc=False, eq=False):
    """One stream, as one subscription sees it. While `place` is SETTLED, `target` equals `next`."""

    topic: str
    key: tuple[bytes, int]
    next: int
    """The seq to be delivered next."""
    target: int
    """One past the highest seq known to exist."""
    place: int = SETTLED
    held: deque[Batch] = msgspec.field(default_factory=deque)
    tried: list[int] = []  # sources that do not have what is next
    asked: Fetch | None = None
    due: float = 0.0
    tries: int = 0
    since: float = 0.0  # when the hole was noticed, or last grew smaller
    soft: bool = False  # the hole is known only from beside the data path


Ready = tuple[Stream, Batch, int] | Gap


class Tracker:
    """All streams of one subscription.

    `sources(topic, origin)` names the nodes to ask for a repair, best first, of those that can be reached now.
    """

    def __init__(
        self,
        patterns: Iterable[str],
        sources: Callable[[str, int], Sequence[int]],
        *,
        history: int = 0,
        held_bytes_max: int = HELD_BYTES_MAX,
    ) -> None:
        self.ready: deque[Ready] = deque()
        """What to deliver now, in order: (stream, batch, how many of its first messages to skip), or a Gap."""
        self.streams: dict[tuple[bytes, int], Stream | None] = {}
        """By (topic, origin); None for those that the prefix let through but the patterns do not want."""
        self.lost = 0
        self.repaired = 0
        self.duplicates = 0
        self._matches = Matcher(patterns).matches
        self._sources = sources
        self._history = history
        self._registered: set[int] = set()  # origins whose HEADS are complete
        self._early: deque[Batch] = deque()
        self._early_bytes = 0
        self._held_bytes = 0
        self._held_bytes_max = held_bytes_max
        self._unsettled: dict[tuple[bytes, int], Stream] = {}
        self._queue: deque[Stream] = deque()
        self._asked: list[Stream] = []
        self._parked: list[tuple[float, int, Stream]] = []
        self._parkings = 0  # breaks ties in the heap

    # --- what the world says ---------------------------------------------------------------------

    def observe(self, batch: Batch, now: float) -> None:
        """A batch came by the live socket and was not simply the next one of a settled stream."""
        stream = self._find(batch.topic, batch.origin)
        if stream is not None:
            if batch.end > stream.target:
                stream.target = batch.end
            if batch.first <= stream.next:
                self._deliver(stream, batch)
            else:
                self._hold(stream, batch)
            self._review(stream, now)
        elif batch.origin not in self._registered and (batch.topic, batch.origin) not in self.streams:
            if self._early_bytes + batch.size <= EARLY_BYTES_MAX:  # else it is a hole later, and fetched
                self._early.append(batch)
                self._early_bytes += batch.size

    def observe_head(self, topic: bytes, origin: int, following: int, now: float) -> None:
        """The live socket says: all before `following` has been sent before this."""
        stream = self._find(topic, origin)
        if stream is not None and following >= stream.target:
            stream.target = following
            self._review(stream, now)

    def heads(self, origin: int, heads: Iterable[tuple[bytes, int]], more: bool, now: float) -> None:
        """A publisher named the next seq of its streams: on registering the subscription (again), or on leaving."""
        registered = origin in self._registered
        for topic, following in heads:
            key = (topic, origin)
            stream = self.streams.get(key)
            if stream is None:
                if key in self.streams:
                    continue
                stream = self._open(key, 1 if registered else max(1, following - self._history))
                if stream is None:
                    continue
            if following > stream.target:
                stream.target = following
                self._review(stream, now, soft=registered)
        if not registered and not more:
            self._registered.add(origin)
            early, self._early = self._early, deque()
            self._early_bytes = 0
            for batch in early:
                self.observe(batch, now)

    def fetched(self, asked: Fetch, last: int, batches: Iterable[Batch], now: float) -> None:
        """The answer to a Fetch, which accounts for all up to `last`: what is in no batch, the source lacks."""
        stream = self.streams.get((asked.topic, asked.origin))
        if stream is None or stream.asked != asked:
            return  # too late: it was asked for anew
        before = stream.next
        self._landed(stream)
        for batch in batches:
            if (batch.topic, batch.origin) != stream.key or batch.first > asked.last or batch.end <= stream.next:
                continue
            if batch.first > stream.next:
                self._absent(stream, batch.first - 1, asked.source)
            self.repaired += batch.end - max(batch.first, stream.next)
            if batch.first <= stream.next:
                self._deliver(stream, batch)
            else:
                self._hold(stream, batch)
        if stream.next <= min(last, asked.last):
            self._absent(stream, min(last, asked.last), asked.source)
        if stream.next > before:
            stream.since = now
            stream.tries = 0
        self._review(stream, now)

    def refused(self, asked: Fetch, now: float) -> None:
        """A Fetch could not be sent, or was answered by an error: ask another source, or later again."""
        stream = self.streams.get((asked.topic, asked.origin))
        if stream is not None and stream.asked == asked:
            self._failed(stream, now)

    def sources_changed(self, now: float) -> None:
        """A node came (back) that may be asked: holes that wait for one need wait no longer."""
        for stream in self._unsettled.values():
            if stream.place == PARKED and not stream.soft:
                self._enqueue(stream)

    def origin_gone(self, origin: int, now: float) -> None:
        """A publisher left for good: what only it had is lost now, not after a wait."""
        for stream in [s for s in self._unsettled.values() if s.key[1] == origin]:
            if stream.asked is not None and stream.asked.source == origin:
                self._landed(stream)
            stream.since = now - ORPHAN_PATIENCE
            if stream.place != ASKED:
                self._enqueue(stream)

    def forget(self, origin: int) -> None:
        """Drop all that is known of an origin that will not come back; holes that remain are reported as lost."""
        self._registered.discard(origin)
        for key in [key for key in self.streams if key[1] == origin]:
            stream = self.streams[key]
            if stream is not None:
                while stream.next < stream.target:
                    self._lose(stream, self._hole(stream))
                self._settle(stream)
            del self.streams[key]

    # --- what to do ------------------------------------------------------------------------------

    def repairs(self, now: float, drained: bool) -> list[Fetch]:
        """Fetches to send now; holes that nobody can fill become `ready`. `drained`: the live socket is empty."""
        for stream in [s for s in self._asked if s.due <= now]:
            self._failed(stream, now)
        while self._parked and self._parked[0][0] <= now:
            due, _, stream = heappop(self._parked)
            if stream.place == PARKED and stream.due == due:
                if stream.soft and not drained:
                    self._park(stream, now + SOFT_DELAY)
                else:
                    self._enqueue(stream)
        out = []
        while self._queue and len(self._asked) < FETCHES_MAX:
            stream = self._queue.popleft()
            if stream.place == QUEUED and (fetch := self._ask(stream, now)) is not None:
                out.append(fetch)
        return out

    def timer(self) -> float | None:
        """When `repairs` has something to do next, if nothing happens before."""
        dues = [stream.due for stream in self._asked]
        if self._queue and len(dues) < FETCHES_MAX:
            return 0.0
        if self._parked:
            dues.append(self._parked[0][0])
        return min(dues, default=None)

    def behind(self, origin: int) -> list[tuple[str, int, int]]:
        """Streams of `origin` not ready to the end that is known: (topic, next, one past the last)."""
        return [(s.topic, s.next, s.target) for s in self._unsettled.values() if s.key[1] == origin]

    def knows(self, origin: int) -> bool:
        """Whether the origin has answered with all its HEADS."""
        return origin in self._registered

    # --- inside: streams -------------------------------------------------------------------------

    def _find(self, topic: bytes, origin: int) -> Stream | None:
        key = (topic, origin)
        stream = self.streams.get(key)
        if stream is None and key not in self.streams and origin in self._registered:
            stream = self._open(key, 1)
        return stream

    def _open(self, key: tuple[bytes, int], start: int) -> Stream | None:
        try:
            topic = key[0].decode()
        except UnicodeDecodeError:
            return None
        stream = Stream(topic, key, start, start) if self._matches(topic) else None
        self.streams[key] = stream
        return stream

    def _deliver(self, stream: Stream, batch: Batch) -> None:
        """Make a batch ready that begins at or before `next`, and what was held behind it."""
        if batch.end <= stream.next:
            self.duplicates += batch.count
            return
        held = stream.held
        while True:
            if batch.end > stream.next:
                self.ready.append((stream, batch, stream.next - batch.first))
                stream.next = batch.end
            if not held or held[0].first > stream.next:
                break
            batch = held.popleft()
            self._held_bytes -= batch.size
        stream.tried = []

    def _hold(self, stream: Stream, batch: Batch) -> None:
        held = stream.held
        place = len(held)
        while place and held[place - 1].first >= batch.first:
            place -= 1
        if place < len(held) and held[place].first == batch.first:
            self.duplicates += batch.count
        elif self._held_bytes + batch.size <= self._held_bytes_max:
            held.insert(place, batch)
            self._held_bytes += batch.size

    def _hole(self, stream: Stream) -> int:
        """The last seq of the first hole, which begins at `stream.next`."""
        return (stream.held[0].first if stream.held else stream.target) - 1

    def _absent(self, stream: Stream, last: int, source: int) -> None:
        """`source` does not have next..last. Another may; with none left it is lost."""
        if source not in stream.tried:
            stream.tried = [*stream.tried, source]
        if all(other in stream.tried for other in self._sources(stream.topic, stream.key[1])):
            self._lose(stream, min(last, self._hole(stream)))

    def _lose(self, stream: Stream, last: int) -> None:
        self.ready.append(Gap(stream.topic, stream.key[1], stream.next, last))
        self.lost += last - stream.next + 1
        stream.next = last + 1
        stream.tried = []
        if stream.held and stream.held[0].first <= stream.next:
            batch = stream.held.popleft()
            self._held_bytes -= batch.size
            self._deliver(stream, batch)

    # --- inside: repair --------------------------------------------------------------------------

    def _review(self, stream: Stream, now: float, soft: bool = False) -> None:
        """After any change: is there a hole, and is somebody looking after it?"""
        if stream.next >= stream.target:
            self._settle(stream)
        elif stream.place == SETTLED:
            self._unsettled[stream.key] = stream
            stream.since = now
            stream.soft = soft
            stream.tries = 0
            if soft:
                self._park(stream, now + SOFT_DELAY)
            else:
                self._enqueue(stream)
        elif stream.soft and not soft:
            stream.soft = False
            self._enqueue(stream)

    def _settle(self, stream: Stream) -> None:
        if stream.place != SETTLED:
            if stream.asked is not None:
                self._landed(stream)
            stream.place = SETTLED
            stream.soft = False
            stream.tried = []
            del self._unsettled[stream.key]

    def _enqueue(self, stream: Stream) -> None:
        if stream.place != QUEUED:
            stream.place = QUEUED
            self._queue.append(stream)

    def _park(self, stream: Stream, due: float) -> None:
        stream.place = PARKED
        stream.due = due
        self._parkings += 1
        heappush(self._parked, (due, self._parkings, stream))

    def _ask(self, stream: Stream, now: float) -> Fetch | None:
        candidates = self._sources(stream.topic, stream.key[1])
        source = next((s for s in candidates if s not in stream.tried), None)
        if source is not None:
            stream.asked = Fetch(source, stream.key[0], stream.key[1], stream.next, self._hole(stream))
            stream.place = ASKED
            stream.due = now + FETCH_TIMEOUT * 2**stream.tries
            stream.tries += 1
            stream.soft = False
            self._asked.append(stream)
        elif stream.tried or now - stream.since >= ORPHAN_PATIENCE:
            stream.place = PARKED
            self._lose(stream, self._hole(stream))
            if stream.next >= stream.target:
                self._settle(stream)
            else:
                self._enqueue(stream)
        else:
            self._park(stream, stream.since + ORPHAN_PATIENCE)
        return stream.asked

    def _landed(self, stream: Stream) -> None:
        """The Fetch is over; whoever calls this decides what is next, by default to ask for the rest."""
        stream.asked = None
        self._asked.remove(stream)
        self._enqueue(stream)

    def _failed(self, stream: Stream, now: float) -> None:
        """No answer, or a refusal. A source that is there and keeps failing has had its chance."""
        assert stream.asked is not None
        source, pause = stream.asked.source, stream.due <= now
        self._landed(stream)
        if stream.tries >= FETCH_TRIES:
            stream.tries = 0
            if source in self._sources(stream.topic, stream.key[1]):
                stream.tried = [*stream.tried, source]
        elif not pause:  # refused at once: do not insist at once
            self._park(stream, now + FETCH_TIMEOUT)
