"""What a subscriber knows of each stream: in order, duplicate, gap, held, repaired or lost.

Sans-IO: knows no sockets, threads or clock; callers pass `now` (monotonic seconds). The rules:

1. A stream is owed from the seq its publisher named in HEADS when the subscription was registered; one that begins
   after that, from 1. `history` reaches back before that as far as publishers can, and what they cannot is no loss.
2. Of every stream the next expected seq is known. That one is delivered. Older ones are duplicates. Newer ones
   are held, and what lies between is fetched: from the publisher, then from whoever else may have it.
3. What nobody has is a `Gap`, exact, delivered in its place in the stream. Nothing is skipped without one.
   Nobody has it when the publisher and all who can be reached said so, or failed to answer for PATIENCE.
   For a `patient` tracker only the former holds. It is that of a forwarder, whose acknowledgement of later messages
   would be one of those before them too; of a publisher that is forgotten it drops what it holds, and awaits all anew.
4. News that came beside the data path is `soft`: what it tells of may still be in the socket, so wait a moment
   and until the socket is empty before fetching.
5. What is held is bounded by bytes. Beyond that newer batches are let go, to be fetched when their turn comes. What
   was fetched is delivered or dropped, never held.
6. A publisher that was forgotten and returns goes on where it was: what it published meanwhile is owed.

A driver feeds `observe`, `observe_head`, `heads` and `fetched`, takes what is ready from `ready` in order, and sends
what `repairs(now)` says. The ordinary case, the next batch of a known stream, is so cheap that a driver may do it
itself: see `Stream.next`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush

from zmqbus.protocol.frames import Batch
from zmqbus.protocol.streams.stream import (
    ASKED,
    NOBODY_LACKS,
    NOTHING_HELD,
    PARKED,
    QUEUED,
    SETTLED,
    Fetch,
    Gap,
    Stream,
)
from zmqbus.protocol.topics import Matcher

HELD_BYTES_MAX = 16 * 1024 * 1024  # per subscription: a few round trips' worth of repair
EARLY_BYTES_MAX = 4 * 1024 * 1024  # frames that arrive before their publisher's HEADS
BATCH_BYTES = 300  # what Python spends on a batch beside its bytes; keeps both bounds honest for tiny batches
FORGOTTEN_STREAMS_MAX = 20_000  # of publishers that may yet return, per subscription; about 500 bytes each
FETCHES_MAX = 8  # in flight per subscription: no storm after a partition
FETCH_TIMEOUT = 1.0  # for the first try; 2, 4 and then always 8 s for those that follow
FETCH_TRIES = 4  # a source that is given up has failed so often, 1 + 2 + 4 + 8 s,
PATIENCE = 15.0  # and for so long. Also how long a hole waits for somebody who can be asked to come back
SOFT_DELAY = 0.05  # news that came beside the data path: the data may still be on its way


Ready = tuple[Stream, Batch, int] | Gap


class Tracker:
    """All streams of one subscription.

    `sources(topic, origin)` names the nodes to ask for a repair, best first, of those that can be reached now.
    `resume(topic, origin)` names the seq to go on from in a stream that is met for the first time here, but has been
    tracked before; 1 where it has not.
    """

    def __init__(
        self,
        patterns: Iterable[str],
        sources: Callable[[str, int], Sequence[int]],
        *,
        history: int = 0,
        held_bytes_max: int = HELD_BYTES_MAX,
        resume: Callable[[bytes, int], int] | None = None,
        patient: bool = False,
    ) -> None:
        self.ready: deque[Ready] = deque()
        """What to deliver now, in order: (stream, batch, how many of its first messages to skip), or a Gap."""
        self.streams: dict[tuple[bytes, int], Stream | None] = {}
        """By (topic, origin); None for those that the prefix let through but the patterns do not want."""
        self.unsettled: dict[tuple[bytes, int], Stream] = {}
        """Those with a hole. While there are none, neither time nor an empty socket changes anything."""
        self.lost = 0
        """Messages in all Gaps."""
        self.repaired = 0
        """Messages delivered out of the answer to a Fetch."""
        self.duplicates = 0
        """Messages that came once more than they were delivered."""
        self._matches = Matcher(patterns).matches
        self._sources = sources
        self._history = history
        self._resume = resume
        self._patient = patient
        self.keepers: dict[int, int] = {}
        """Of publishers that are no more: who keeps their messages, and has the last word on what is lost of them."""
        self._registered: set[int] = set()  # origins whose HEADS are complete
        self._forgotten: dict[int, int] = {}  # origins that had registered, oldest first -> number of streams and 1
        self._forgotten_streams = 0  # the sum of that
        self._early: deque[Batch] = deque()
        self._early_bytes = 0
        self._held_bytes = 0
        self._held_bytes_max = held_bytes_max
        self._queue: OrderedDict[Stream, None] = OrderedDict()
        self._asked: list[Stream] = []
        self._parked: list[tuple[float, int, Stream]] = []  # a heap; entries of streams that moved on are void
        self._parkings = 0  # breaks ties in the heap

    # --- what the world says ---------------------------------------------------------------------

    def observe(self, batch: Batch, now: float) -> None:
        """A batch came by the live socket and was not simply the next one of a settled stream."""
        stream = self._find(batch.topic, batch.origin)
        if stream is not None:
            if batch.end > stream.target:
                stream.target = batch.end
            if batch.end <= stream.next:
                self.duplicates += batch.count
            elif batch.first <= stream.next:
                self._advance(stream, batch)
                stream.since = now
                stream.tries = 0
            else:
                self._hold(stream, batch)
            self._review(stream, now, soft=stream.soft and not stream.held)
        elif batch.origin not in self._registered and (batch.topic, batch.origin) not in self.streams:
            self._keep_early(batch)

    def observe_head(self, topic: bytes, origin: int, following: int, now: float) -> None:
        """The live socket says: all before `following` has been sent before this."""
        stream = self._find(topic, origin)
        if stream is not None and following >= stream.target:
            stream.target = following
            self._review(stream, now)

    def heads(self, origin: int, heads: Iterable[tuple[bytes, int]], more: bool, now: float) -> None:
        """A publisher named the next seq of its streams: on registering the subscription (again), or on leaving."""
        registered = origin in self._registered
        since_the_beginning = registered or origin in self._forgotten
        for topic, following in heads:
            key = (topic, origin)
            stream = self.streams.get(key)
            soft = True
            if stream is None and key not in self.streams:
                if since_the_beginning:
                    stream = self._open(key, 1, 1)
                else:
                    stream = self._open(key, max(1, following - self._history), following)
                    soft = False  # history is not on its way
            if stream is not None and following > stream.target:
                stream.target = following
                self._review(stream, now, soft)
        if not registered and not more:
            self._registered.add(origin)
            self._forgotten_streams -= self._forgotten.pop(origin, 0)
            early, self._early = self._early, deque()
            self._early_bytes = 0
            for batch in early:
                self.observe(batch, now)

    def fetched(self, asked: Fetch, last: int, batches: Iterable[Batch], now: float) -> None:
        """The answer to a Fetch, which accounts for all up to `last`: what is in no batch, the source lacks."""
        stream = self.streams.get((asked.topic, asked.origin))
        if stream is None or stream.asked != asked:
            return  # too late: it was asked for anew
        before, lacks = stream.next, stream.lacks
        for batch in sorted(batches, key=_first):
            if (batch.topic, batch.origin) != stream.key or batch.first > asked.last:
                continue
            if batch.first > stream.next:
                self._absent(stream, asked.source, batch.first)
                if batch.first > stream.next:
                    break  # another source may have what comes before; this one's turn comes again
            if batch.end > stream.next:
                self.repaired += batch.end - stream.next
                self._advance(stream, batch)
                stream.since = now
                stream.tries = 0
        else:
            self._absent(stream, asked.source, min(last, asked.last) + 1)
        if stream.next == before and stream.lacks is lacks:
            self._failed(stream, now)  # it says nothing about what was asked
        else:
            self._attend(stream)

    def refused(self, asked: Fetch, now: float) -> None:
        """A Fetch could not be sent, or was answered by an error: ask another source, or later again."""
        stream = self.streams.get((asked.topic, asked.origin))
        if stream is not None and stream.asked == asked:
            self._failed(stream, now)

    def sources_changed(self, now: float) -> None:
        """A node came (back) that may be asked: holes that wait for one need wait no longer."""
        for stream in self.unsettled.values():
            if stream.place == PARKED and not stream.soft:
                self._enqueue(stream)

    def origin_gone(self, origin: int, now: float) -> None:
        """A publisher left for good: what only it had is lost now, not after a wait."""
        if self._patient:
            return  # it may have left its messages to somebody
        for stream in [s for s in self.unsettled.values() if s.key[1] == origin]:
            if stream.soft:  # except for what may be in the socket
                stream.lacks = {**stream.lacks, origin: stream.target}
                continue
            self._absent(stream, origin, stream.target)
            if stream.asked is None or stream.asked.source == origin or stream.next >= stream.target:
                self._attend(stream)

    def forget(self, origin: int) -> None:
        """A publisher is not even awaited any more: its holes are lost. Its streams go on should it return."""
        if self._patient:
            self._registered.discard(origin)
            self._drop_streams({origin})
            return
        self._early = deque(batch for batch in self._early if batch.origin != origin)
        self._early_bytes = sum(map(_cost, self._early))
        for stream in [s for s in self.unsettled.values() if s.key[1] == origin]:
            self._give_up(stream, stream.target)
            self._settle(stream)
        if origin in self._registered:
            self._registered.discard(origin)
            self._forgotten[origin] = 1 + sum(key[1] == origin for key in self.streams)
            self._forgotten_streams += self._forgotten[origin]
            self._drop_streams(self._too_many_forgotten())
        elif origin not in self._forgotten:
            self._drop_streams({origin})

    # --- what to do ------------------------------------------------------------------------------

    def repairs(self, now: float, drained: bool) -> list[Fetch]:
        """Fetches to send now; holes that nobody can fill become `ready`. `drained`: the live socket is empty."""
        if not self.unsettled:
            return []
        for stream in [s for s in self._asked if s.due <= now]:
            self._failed(stream, now)
        while self._parked and self._parked[0][0] <= now:
            due, _, stream = heappop(self._parked)
            if stream.place == PARKED and stream.due == due:
                # Empty for a moment proves nothing while data still trickles in behind a queue that was full.
                if stream.soft and not (drained and now >= stream.since + SOFT_DELAY):
                    self._park(stream, now + SOFT_DELAY)
                    stream.soft = True
                else:
                    self._enqueue(stream)
        out = []
        while self._queue and len(self._asked) < FETCHES_MAX:
            stream = next(iter(self._queue))
            if (fetch := self._ask(stream, now)) is not None:
                out.append(fetch)
        return out

    def timer(self) -> float | None:
        """When `repairs` has something to do next, if nothing happens before; 0 is at once."""
        if not self.unsettled:
            return None
        if self._queue and len(self._asked) < FETCHES_MAX:
            return 0.0
        dues = [stream.due for stream in self._asked]
        if self._parked:
            dues.append(self._parked[0][0])
        return min(dues, default=None)

    def behind(self, origin: int) -> list[tuple[str, int, int]]:
        """Streams of `origin` not ready to the end that is known: (topic, next, one past the last)."""
        return [(s.topic, s.next, s.target) for s in self.unsettled.values() if s.key[1] == origin]

    def knows(self, origin: int) -> bool:
        """Whether the origin has answered with all its HEADS."""
        return origin in self._registered

    # --- inside: streams -------------------------------------------------------------------------

    def _find(self, topic: bytes, origin: int) -> Stream | None:
        key = (topic, origin)
        stream = self.streams.get(key)
        if stream is None and key not in self.streams and origin in self._registered:
            stream = self._open(key, 1, 1)
        return stream

    def _open(self, key: tuple[bytes, int], start: int, owed: int) -> Stream | None:
        try:
            topic = key[0].decode()
        except UnicodeDecodeError:
            return None
        if self._resume is not None and (known := self._resume(*key)) > 1:
            start = owed = known
        stream = Stream(topic, key, start, start, owed) if self._matches(topic) else None
        self.streams[key] = stream
        return stream

    def _keep_early(self, batch: Batch) -> None:
        """Of a publisher whose HEADS are not here yet."""
        if self._early_bytes + _cost(batch) <= EARLY_BYTES_MAX:  # else it is a hole later, and fetched
            self._early.append(batch)
            self._early_bytes += _cost(batch)

    def _too_many_forgotten(self) -> set[int]:
        """Forget for good who was forgotten first, as many as the bound demands."""
        dropped = set()
        while self._forgotten_streams > FORGOTTEN_STREAMS_MAX:
            oldest = next(iter(self._forgotten))
            self._forgotten_streams -= self._forgotten.pop(oldest)
            dropped.add(oldest)
        return dropped

    def _drop_streams(self, origins: set[int]) -> None:
        for key in [key for key in self.streams if key[1] in origins] if origins else ():
            stream = self.streams.pop(key)
            if stream is not None and stream.place != SETTLED:
                if self._patient:
                    self._let_go(stream)
                self._give_up(stream, stream.target)
                self._settle(stream)

    def _let_go(self, stream: Stream) -> None:
        """Drop what is held: it is as lost as what lies before it."""
        self._held_bytes -= sum(map(_cost, stream.held))
        stream.held = NOTHING_HELD

    def _advance(self, stream: Stream, batch: Batch) -> None:
        """Make a batch ready that reaches from `next` or before to beyond it, and what was held behind it."""
        while True:
            skip = min(stream.next - batch.first, batch.count)
            self.duplicates += skip
            if skip < batch.count:
                self.ready.append((stream, batch, skip))
                stream.next = batch.end
            if not stream.held or stream.held[0].first > stream.next:
                break
            batch = stream.held.popleft()
            self._held_bytes -= _cost(batch)
        if stream.next > stream.target:
            stream.target = stream.next

    def _hold(self, stream: Stream, batch: Batch) -> None:
        if not stream.held:
            stream.held = deque()
        held = stream.held
        place = len(held)
        while place and held[place - 1].first > batch.first:
            place -= 1
        if place and held[place - 1].end >= batch.end:
            self.duplicates += batch.count
        elif self._held_bytes + _cost(batch) <= self._held_bytes_max:
            held.insert(place, batch)
            self._held_bytes += _cost(batch)

    def _hole(self, stream: Stream) -> int:
        """The last seq of the first hole, which begins at `stream.next`."""
        return (stream.held[0].first if stream.held else stream.target) - 1

    def _lose(self, stream: Stream, last: int) -> None:
        """No longer wait for `next` to `last`, all of them in the first hole."""
        first = max(stream.next, stream.owed)
        if first <= last:
            self.ready.append(Gap(stream.topic, stream.key[1], first, last))
            self.lost += last - first + 1
        stream.next = last + 1
        if stream.held and stream.held[0].first == stream.next:
            batch = stream.held.popleft()
            self._held_bytes -= _cost(batch)
            self._advance(stream, batch)

    def _give_up(self, stream: Stream, end: int) -> None:
        """No longer wait for what is missing before `end`."""
        while stream.next < end:
            self._lose(stream, min(self._hole(stream), end - 1))

    # --- inside: repair --------------------------------------------------------------------------

    def _review(self, stream: Stream, now: float, soft: bool = False) -> None:
        """After news: is there a hole, and is somebody looking after it?"""
        if stream.next >= stream.target:
            self._settle(stream)
        elif stream.place == SETTLED:
            self.unsettled[stream.key] = stream
            stream.since = now
            stream.tries = 0
            if soft:
                self._park(stream, now + SOFT_DELAY)
                stream.soft = True
            else:
                self._enqueue(stream)
        elif (stream.soft and not soft) or (stream.asked is not None and stream.asked.last < stream.next):
            self._enqueue(stream)

    def _attend(self, stream: Stream) -> None:
        """After a repair: is there anything left to ask for?"""
        if stream.next >= stream.target:
            self._settle(stream)
        else:
            self._enqueue(stream)

    def _settle(self, stream: Stream) -> None:
        if stream.place != SETTLED:
            self._move(stream, SETTLED)
            stream.held = NOTHING_HELD
            stream.lacks = NOBODY_LACKS
            del self.unsettled[stream.key]

    def _enqueue(self, stream: Stream) -> None:
        if stream.place != QUEUED:
            self._move(stream, QUEUED)
            self._queue[stream] = None

    def _park(self, stream: Stream, due: float) -> None:
        if stream.place != PARKED:
            self._move(stream, PARKED)
        stream.due = due
        if len(self._parked) > 100 + 2 * len(self.unsettled):  # mostly void
            parked = [s for s in self.unsettled.values() if s.place == PARKED]
            self._parked = [(s.due, number, s) for number, s in enumerate(parked)]
            heapify(self._parked)
        else:
            self._parkings += 1
            heappush(self._parked, (due, self._parkings, stream))

    def _move(self, stream: Stream, place: int) -> None:
        if stream.place == ASKED:
            self._asked.remove(stream)
            stream.asked = None
        elif stream.place == QUEUED:
            del self._queue[stream]
        stream.place = place
        stream.soft = False

    def _ask(self, stream: Stream, now: float) -> Fetch | None:
        """Take a stream from the queue: ask somebody for its first hole, wait for somebody, or give up."""
        sources = self._sources(stream.topic, stream.key[1])
        able = [source for source in sources if stream.lacks.get(source, 0) <= stream.next]
        if able:  # the best; but for the patient a source that fails and fails is never given up
            source = able[stream.tries // FETCH_TRIES % len(able) if self._patient else 0]
            self._move(stream, ASKED)
            stream.asked = Fetch(source, stream.key[0], stream.key[1], stream.next, self._hole(stream))
            stream.due = now + FETCH_TIMEOUT * 2 ** min(stream.tries, FETCH_TRIES - 1)
            self._asked.append(stream)
            return stream.asked
        patient = self._patient or now < stream.since + PATIENCE
        end = self._lacking(stream) if patient else stream.target
        if end <= stream.next:
            if self._patient and stream.lacks:  # all but the publisher may get what they lack, meanwhile
                keeper = self.keepers.get(stream.key[1], stream.key[1])
                stream.lacks = {keeper: stream.lacks[keeper]} if keeper in stream.lacks else NOBODY_LACKS
            self._park(stream, max(stream.since, now if self._patient else 0.0) + PATIENCE)
        else:
            self._give_up(stream, end)
            self._attend(stream)
        return None

    def _lacking(self, stream: Stream) -> int:
        """Nobody who can be reached, nor the publisher, who may come back, has anything before this."""
        origin = stream.key[1]
        keeper = self.keepers.get(origin, origin)
        return min(stream.lacks.get(source, 0) for source in (keeper, *self._sources(stream.topic, origin)))

    def _absent(self, stream: Stream, source: int, end: int) -> None:
        """`source` has nothing from `next` to before `end`. Another may; with none left it is lost."""
        if end > stream.next:
            stream.lacks = {**stream.lacks, source: end}
            stream.tries = 0
            self._give_up(stream, self._lacking(stream))

    def _failed(self, stream: Stream, now: float) -> None:
        """No answer, or none of use. A source that is there and keeps failing has had its chance."""
        assert stream.asked is not None
        source, late = stream.asked.source, stream.due <= now
        stream.tries += 1
        if stream.tries >= FETCH_TRIES and now >= stream.since + PATIENCE and not self._patient:
            self._absent(stream, source, stream.target)
            self._attend(stream)
        elif late:
            self._enqueue(stream)
        else:  # refused at once: do not insist at once
            self._park(stream, now + FETCH_TIMEOUT)


def _cost(batch: Batch) -> int:
    """Bytes of memory."""
    return batch.size + BATCH_BYTES


def _first(batch: Batch) -> int:
    return batch.first
