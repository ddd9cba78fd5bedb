"""A bus around one Tracker, simulated: publishers with real histories, a store with a past of its own, and every
trouble between them and the subscriber. `simulate(random)` plays one life and checks it at every step:

- of every stream each seq comes once and in order, with the right content, or is inside exactly one Gap;
- `lost` and `repaired` are exact; what is held and what is in flight is bounded; the timer never asks for nothing;
- once the trouble ends, everything owed is accounted for within bounded time, and nothing stays unsettled;
- where all sources answer truthfully, a Gap holds only what none of them has.

`random` is whatever has the methods of random.Random: a seed replays a run, hypothesis shrinks one.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from random import Random

import msgspec

from zmqbus.protocol.frames import DATA, HEAD, Batch, decode_batches, encode_frame, encode_values, parse_header
from zmqbus.protocol.streams.history import History, Shelf, fetch
from zmqbus.protocol.streams.stream import ASKED, PARKED, QUEUED, SETTLED, Fetch, Gap, Stream
from zmqbus.protocol.streams.tracking import BATCH_BYTES, FETCHES_MAX, PATIENCE, Tracker

LIVE, FETCHED = 1, 2  # time_ns of a batch: where it came from
STORE = 0xF0  # the origin of the second source
TOPICS = (b"t.a", b"t.b", b"t.c")
UNWANTED = b"x.a"
Key = tuple[bytes, int]


def value(topic: bytes, origin: int, seq: int) -> str:
    return f"{topic.decode()}/{origin}/{seq}"


def frame(topic: bytes, origin: int, first: int, count: int) -> bytes:
    values = encode_values([value(topic, origin, seq) for seq in range(first, first + count)])
    return encode_frame(topic + b"\0", DATA, 0, count, origin, first, LIVE, values)


class Publisher:
    """What `node/publishing.py` does, without sockets and clock."""

    def __init__(self, origin: int, history_bytes: int) -> None:
        self.origin = origin
        self.up = True
        self.history = History(history_bytes)
        self.shelves: dict[bytes, Shelf] = {}
        self.next: dict[bytes, int] = {}

    def publish(self, topic: bytes, count: int) -> bytes:
        first = self.next.setdefault(topic, 1)
        shelf = self.shelves.setdefault(topic, Shelf())
        made = frame(topic, self.origin, first, count)
        self.history.append(shelf, first, first + count, (made,))
        self.next[topic] = first + count
        return made

    def head(self, topic: bytes) -> bytes:
        return encode_frame(topic + b"\0", HEAD, 0, 0, self.origin, self.next[topic], LIVE)

    def has(self, topic: bytes, origin: int, seq: int) -> bool:
        entries = self.shelves.get(topic, Shelf()).entries
        return bool(entries) and origin == self.origin and entries[0][0] <= seq < entries[-1][1]

    def answer(self, asked: Fetch, bytes_max: int) -> tuple[list[Batch], int]:
        held = fetch(self.shelves.get(asked.topic, Shelf()).entries, asked.first, asked.last, bytes_max)
        return decode_batches(held.parts), held.last


class Store:
    """A second source: some messages of all streams, in batches cut anew for every answer."""

    def __init__(self, random: Random) -> None:
        self.up = True
        self.messages: set[tuple[bytes, int, int]] = set()
        self._random = random

    def has(self, topic: bytes, origin: int, seq: int) -> bool:
        return (topic, origin, seq) in self.messages

    def answer(self, asked: Fetch, bytes_max: int) -> tuple[list[Batch], int]:
        first = max(1, asked.first - self._random.randrange(3))
        last = asked.last + self._random.randrange(3)
        parts: list[bytes] = []
        seq = first
        while seq <= last:
            run = 0
            while run < 4 and seq + run <= last and self.has(asked.topic, asked.origin, seq + run):
                run += 1
            if run:
                run = self._random.randint(1, run)
                parts.append(frame(asked.topic, asked.origin, seq, run))
            seq += max(1, run)
            if seq > asked.first and sum(map(len, parts)) > bytes_max:
                break
        return decode_batches(parts), min(seq - 1, asked.last)


@dataclass
class Ledger:
    """What the consumer saw of one stream."""

    next: int  # the seq to be accounted for next
    owed: int  # before this, absence is no loss
    delivered: Counter[int] = field(default_factory=Counter)  # by where it came from
    gaps: list[tuple[int, int]] = field(default_factory=list)


class World:
    """Everything around the tracker. Methods that begin with `do_` are the steps a random life is made of."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.now = random.choice([0.0, 0.1, 1e5 / 3])
        self.honest = random.random() < 0.4  # sources always answer, and truthfully
        self.loss = random.choice([0.0, 0.1, 0.5])
        self.disorder = random.choice([0.0, 0.1, 0.5])
        self.history = random.choice([0, 0, 3, 1000])
        self.history_bytes = random.choice([0, 1500, 5000, 1 << 20])
        self.held_bytes_max = random.choice([0, 800, 3000, 1 << 20])
        self.answer_bytes = random.choice([1, 200, 1 << 20])
        self.store = Store(random)
        self.has_store = random.random() < 0.5
        self.publishers: dict[int, Publisher] = {}
        self.gone: set[int] = set()
        self.registered: set[int] = set()
        self.known: set[int] = set()  # registered at some time, and not to be treated as new since
        self.channel: list[bytes] = []  # frames under way
        self.control: dict[int, deque[tuple[list[tuple[bytes, int]], bool]]] = {}  # HEADS under way, by origin
        self.pending: list[Fetch] = []
        self.late: list[tuple[Fetch, int, list[Batch]]] = []  # answers to come a second time
        self.ledgers: dict[Key, Ledger] = {}
        self.closed_books: list[Ledger] = []
        self.fetches = 0
        self.origins = 0
        self.tracker = Tracker(["t.>"], self.sources, history=self.history, held_bytes_max=self.held_bytes_max)
        for _ in range(random.randint(1, 3)):
            self.do_start()

    def sources(self, topic: str, origin: int) -> list[int]:
        publisher = self.publishers.get(origin)
        found = [origin] if publisher is not None and publisher.up else []
        return [*found, STORE] if self.has_store and self.store.up else found

    # --- steps: the publishers' side -------------------------------------------------------------

    def do_start(self) -> None:
        """A new publisher, or an old one under a new origin."""
        if len(self.publishers) < 4:
            self.origins += 1
            self.publishers[self.origins] = Publisher(self.origins, self.history_bytes)
            self.control[self.origins] = deque()

    def do_publish(self) -> None:
        publisher = self.any_publisher()
        topic = UNWANTED if self.random.random() < 0.05 else self.random.choice(TOPICS)
        count = self.random.choice([1, 1, 2, 5])
        made = publisher.publish(topic, count)
        first = publisher.next[topic] - count
        for seq in range(first, first + count):
            if self.random.random() < 0.7:
                self.store.messages.add((topic, publisher.origin, seq))
        self.send(publisher, made)

    def do_burst(self) -> None:
        for _ in range(self.random.randint(2, 8)):
            self.do_publish()

    def do_head(self) -> None:
        publisher = self.any_publisher()
        if publisher.next:
            self.send(publisher, publisher.head(self.random.choice(list(publisher.next))))

    def do_heads(self) -> None:
        """A publisher answers SUBSCRIBE, in pieces."""
        self.answer_heads(self.any_publisher())

    def do_partition(self) -> None:
        if not self.honest:
            publisher = self.any_publisher()
            publisher.up = not publisher.up
            if publisher.up:
                self.tracker.sources_changed(self.now)

    def do_store_leaves(self) -> None:
        if not self.honest:
            self.store.up = not self.store.up
            if self.store.up:
                self.tracker.sources_changed(self.now)

    def do_restart(self) -> None:
        """A publisher leaves for good, and another may come."""
        if not self.honest and len(self.publishers) > 1:
            origin = self.any_publisher().origin
            self.retire(origin)
            if self.random.random() < 0.5:
                self.do_start()

    def do_forget(self) -> None:
        """A publisher is silent for so long that it is no longer awaited; it may return."""
        if not self.honest:
            self.forget(self.any_publisher().origin)

    # --- steps: the network and the subscriber ---------------------------------------------------

    def do_receive(self) -> None:
        for _ in range(min(len(self.channel), self.random.choice([1, 1, 5, 20]))):
            at = 0
            if self.random.random() < self.disorder:
                at = self.random.randrange(len(self.channel))
            self.receive(self.channel.pop(at))

    def do_control(self) -> None:
        waiting = [origin for origin, queue in self.control.items() if queue]
        if waiting:
            origin = self.random.choice(waiting)
            self.take_heads(origin, *self.control[origin].popleft())

    def do_time(self) -> None:
        while self.honest and self.pending:  # in time
            self.do_answer()
        self.now += self.random.choice([0.001, 0.05, 0.3, 1.0, 2.0, 9.0])
        self.repair(drained=not self.channel)

    def do_drain(self) -> None:
        while self.channel:
            self.do_receive()
        self.repair(drained=True)

    def do_answer(self) -> None:
        """One of the questions under way is answered, more or less."""
        if not self.pending:
            return
        asked = self.pending.pop(self.random.randrange(len(self.pending)))
        trouble = 0.0 if self.honest else self.random.random()
        if trouble > 0.8:  # never arrives
            return
        if trouble > 0.7 or not self.reachable(asked.source):
            self.tracker.refused(asked, self.now)
        elif trouble > 0.65:  # nonsense
            self.tracker.fetched(asked, self.random.choice([1, asked.first - 1]), [], self.now)
        else:
            self.answer(asked)
        self.repair(drained=False)

    def do_answer_again(self) -> None:
        if self.late:
            asked, last, batches = self.late.pop(self.random.randrange(len(self.late)))
            self.tracker.fetched(asked, last, batches, self.now)

    # --- how ------------------------------------------------------------------------------------

    def any_publisher(self) -> Publisher:
        return self.publishers[self.random.choice(list(self.publishers))]

    def reachable(self, source: int) -> bool:
        publisher = self.publishers.get(source)
        return self.store.up if source == STORE else publisher is not None and publisher.up

    def send(self, publisher: Publisher, made: bytes) -> None:
        if publisher.up and self.random.random() >= self.loss:
            self.channel.append(made)
            if self.random.random() < self.disorder:
                self.channel.append(made)

    def answer_heads(self, publisher: Publisher) -> None:
        heads = [(topic, following) for topic, following in publisher.next.items() if topic != UNWANTED]
        self.random.shuffle(heads)
        cuts = sorted(self.random.randint(0, len(heads)) for _ in range(self.random.choice([0, 0, 1])))
        pieces = [heads[low:high] for low, high in zip([0, *cuts], [*cuts, len(heads)], strict=True)]
        for number, piece in enumerate(pieces):
            self.control[publisher.origin].append((piece, number < len(pieces) - 1))

    def take_heads(self, origin: int, heads: list[tuple[bytes, int]], more: bool) -> None:
        for topic, following in heads:
            if (topic, origin) not in self.ledgers:
                start = 1 if origin in self.known else max(1, following - self.history)
                self.ledgers[topic, origin] = Ledger(start, 1 if origin in self.known else following)
        if not more:
            self.registered.add(origin)
            self.known.add(origin)
        self.tracker.heads(origin, heads, more, self.now)
        assert self.tracker.knows(origin) == (origin in self.registered)
        self.consume()

    def receive(self, received: bytes) -> None:
        """What `node/receiving/intake.py` does with a frame."""
        cut, kind, flags, count, origin, first, time_ns = parse_header(received)
        key = (received[:cut], origin)
        if kind == HEAD:
            self.tracker.observe_head(*key, first, self.now)
        else:
            batch = Batch(key[0], flags, count, origin, first, time_ns, (received,))
            stream = self.tracker.streams.get(key)
            if stream is not None and stream.place == SETTLED and stream.next == first:
                stream.next = stream.target = first + count
                self.delivered(stream, batch, 0)
            else:
                self.tracker.observe(batch, self.now)
        self.consume()
        self.repair(drained=False)

    def repair(self, drained: bool) -> None:
        for asked in self.tracker.repairs(self.now, drained):
            self.fetches += 1
            stream = self.tracker.streams[asked.topic, asked.origin]
            assert stream is not None
            assert asked.source in self.sources(stream.topic, asked.origin)
            assert stream.next == asked.first <= asked.last < stream.target
            self.pending.append(asked)
        due = self.tracker.timer()
        assert due is None or due > self.now, f"timer {due} is not after {self.now}"
        self.consume()
        audit(self.tracker, self.held_bytes_max)

    def answer(self, asked: Fetch) -> None:
        source = self.store if asked.source == STORE else self.publishers[asked.source]
        batches, last = source.answer(asked, self.answer_bytes)
        for batch in batches:
            batch.time_ns = FETCHED
        self.random.shuffle(batches)
        if self.random.random() < 0.2:
            self.late.append((asked, last, batches))
        self.tracker.fetched(asked, last, batches, self.now)
        self.consume()

    def retire(self, origin: int) -> None:
        del self.publishers[origin]
        del self.control[origin]
        self.gone.add(origin)
        if self.random.random() < 0.8:
            self.tracker.origin_gone(origin, self.now)
        self.consume()
        self.forget(origin)

    def forget(self, origin: int) -> None:
        self.channel = [f for f in self.channel if parse_header(f)[4] != origin]  # its PUB is disconnected
        self.registered.discard(origin)
        if origin in self.control:
            self.control[origin].clear()
        self.tracker.forget(origin)
        self.consume()
        assert self.tracker.behind(origin) == []
        if origin not in self.known:  # it had not registered: should it return, it is new
            for key in [key for key in self.ledgers if key[1] == origin]:
                ledger = self.ledgers.pop(key)
                self.closed_books.append(ledger)

    def consume(self) -> None:
        ready = self.tracker.ready
        while ready:
            item = ready.popleft()
            if isinstance(item, Gap):
                self.missed(item)
            else:
                self.delivered(*item)

    def delivered(self, stream: Stream, batch: Batch, skip: int) -> None:
        assert 0 <= skip < batch.count
        ledger = self.ledger(stream.key)
        first = batch.first + skip
        assert first == ledger.next or ledger.next < first <= ledger.owed, f"{stream.key}: #{first}, {ledger}"
        values = msgspec.msgpack.decode(batch.parts[0][len(batch.topic) + 33 :])[skip:]
        assert values == [value(*stream.key, seq) for seq in range(first, batch.end)]
        ledger.next = batch.end
        ledger.delivered[batch.time_ns] += batch.count - skip

    def missed(self, gap: Gap) -> None:
        key = (gap.topic.encode(), gap.origin)
        ledger = self.ledger(key)
        assert gap.first == ledger.next or ledger.next < gap.first <= ledger.owed, f"{gap}, {ledger}"
        assert gap.first >= ledger.owed
        assert gap.first <= gap.last
        if gap.origin in self.publishers:
            assert gap.last < self.publishers[gap.origin].next[key[0]]
        if self.honest:
            sources = [self.publishers[gap.origin], *([self.store] if self.has_store else [])]
            assert not any(source.has(*key, seq) for source in sources for seq in range(gap.first, gap.last + 1)), gap
        ledger.gaps.append((gap.first, gap.last))
        ledger.next = gap.last + 1

    def ledger(self, key: Key) -> Ledger:
        if key not in self.ledgers:
            assert key[1] in self.known, f"{key} is owed nothing yet"
            self.ledgers[key] = Ledger(1, 1)
        return self.ledgers[key]

    # --- the end --------------------------------------------------------------------------------

    def end(self) -> None:
        """The trouble is over, or for good: all that is owed is to be accounted for, in bounded time."""
        random = self.random
        self.loss = self.disorder = 0.0
        silent = not self.honest and random.random() < 0.3  # nobody answers any more
        self.store.up = self.store.up or not silent
        for publisher in self.publishers.values():
            publisher.up = publisher.up or not silent
            self.answer_heads(publisher)
            while self.control[publisher.origin]:
                self.take_heads(publisher.origin, *self.control[publisher.origin].popleft())
            for topic in publisher.next:
                self.send(publisher, publisher.head(topic))
        self.tracker.sources_changed(self.now)
        self.do_drain()
        ends_at = self.now + 10 * PATIENCE
        for _ in range(5000):
            while self.pending and not silent:
                asked = self.pending.pop(0)
                if self.reachable(asked.source):
                    self.answer(asked)
                self.repair(drained=True)
            due = self.tracker.timer()
            if due is None:
                break
            self.now = max(self.now, due)
            self.repair(drained=True)
        else:
            raise AssertionError(f"never settled: {self.tracker.unsettled}")
        assert self.now <= ends_at
        assert not self.tracker.unsettled
        assert self.tracker._held_bytes == 0
        for publisher in self.publishers.values():
            assert self.tracker.behind(publisher.origin) == []
            for topic, following in publisher.next.items():
                if topic != UNWANTED:
                    ledger = self.ledgers[topic, publisher.origin]
                    assert ledger.next == following or ledger.next < ledger.owed == following, f"{topic!r}: {ledger}"
        self.count()

    def count(self) -> None:
        ledgers = [*self.ledgers.values(), *self.closed_books]
        assert self.tracker.lost == sum(last - first + 1 for ledger in ledgers for first, last in ledger.gaps)
        assert self.tracker.repaired == sum(ledger.delivered[FETCHED] for ledger in ledgers)


def audit(tracker: Tracker, held_bytes_max: int) -> None:
    """The tracker's books are in order."""
    unsettled = tracker.unsettled
    held = 0
    for stream in filter(None, tracker.streams.values()):
        if stream.place == SETTLED:
            assert stream.next == stream.target
            assert not stream.held
            assert not stream.lacks
            assert stream.key not in unsettled
        else:
            assert unsettled[stream.key] is stream
            assert stream.next < stream.target
            firsts = [batch.first for batch in stream.held]
            assert firsts == sorted(firsts)
            assert not firsts or (firsts[0] > stream.next and max(b.end for b in stream.held) <= stream.target)
            held += sum(batch.size + BATCH_BYTES for batch in stream.held)
        assert (stream in tracker._queue) == (stream.place == QUEUED)
        assert (stream in tracker._asked) == (stream.place == ASKED) == (stream.asked is not None)
        if stream.place == PARKED:
            assert any(due == stream.due and parked is stream for due, _, parked in tracker._parked)
        assert not stream.soft or stream.place == PARKED
    assert len(unsettled) == sum(s is not None and s.place != SETTLED for s in tracker.streams.values())
    assert held == tracker._held_bytes <= held_bytes_max
    assert len(tracker._asked) <= FETCHES_MAX
    assert len(tracker._parked) <= 300
    assert tracker._forgotten_streams == sum(tracker._forgotten.values())
    assert tracker._early_bytes == sum(batch.size + BATCH_BYTES for batch in tracker._early)


STEPS = {
    World.do_publish: 20,
    World.do_burst: 3,
    World.do_receive: 20,
    World.do_drain: 3,
    World.do_head: 4,
    World.do_time: 12,
    World.do_answer: 15,
    World.do_answer_again: 2,
    World.do_heads: 4,
    World.do_control: 6,
    World.do_partition: 2,
    World.do_store_leaves: 2,
    World.do_restart: 1,
    World.do_forget: 1,
    World.do_start: 1,
}
_STEPS = [step for step, weight in STEPS.items() for _ in range(weight)]


def simulate(random: Random, steps: int) -> World:
    """One life. Raises AssertionError where the tracker breaks a promise."""
    world = World(random)
    for _ in range(steps):
        random.choice(_STEPS)(world)
        world.consume()
    world.end()
    return world
