"""What a worker has in hand: jobs that came and wait, jobs that were begun, and what is to be said of them.

A job's way in: the engine's thread puts a JOB into `queue`, as it came; whoever consumes takes it out, one C call
decodes a batch of it, and a slice of that becomes jobs, `items`, of which each consumer takes the next without a lock:
an iterator that is all C hands out each of its items once. The lock is held by whoever gets the next slice.

And out: what is acknowledged is one entry in a list of its delivery. The first entry sees to it that it is collected
and said (`stir`): at once, if nothing waits here, and by who acknowledged it, if that was all there is; else by the
engine, some milliseconds later, or when somebody sleeps or there is enough of it. `Workers` sends what is said.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from math import inf
from operator import length_hint
from threading import Condition, Lock, RLock
from typing import Any, Protocol
from weakref import ref

import msgspec

from zmqbus.errors import RemoteProtocolError
from zmqbus.net.clock import give_way, now
from zmqbus.node.events import Event, Warned
from zmqbus.node.work.queues.delivery import Delivery, Loaded, Parcel, ranges_of
from zmqbus.node.work.queues.job import REASON_MAX, Job
from zmqbus.node.work.queues.tie import Fail, Tie
from zmqbus.node.work.queues.window import START, WAIT, Window
from zmqbus.protocol.frames import Batch, ValueDecoder, decode_batches

SLICE = 128  # jobs of a batch that are handed out without a look at what there is to say
DIRTY_MAX = 64  # deliveries with something to say, before that is said at once
PATIENCE = 0.5  # of a lease, for which a job may wait here: who begins it has at least the other half
TOO_LONG = 1.0  # seconds for which a job waited: then too much of what came after it goes to others
NOT, LATER, NOW = range(3)  # when the engine comes to collect


class Driver(Protocol):
    """What a hand needs of its node. Any thread may call any of it."""

    def emit(self, event: Event) -> None:
        """Something happened."""

    def garbage(self, error: RemoteProtocolError) -> None:
        """A peer sent something undecodable."""

    def soon(self, work: Callable[..., object], *arguments: object) -> None:
        """Do this on the loop."""

    def report(self, hand: Hand) -> None:
        """Collect, and say it to the owners. On the loop."""

    def report_here(self, hand: Hand) -> bool:
        """The same, on this thread, for most owners. False: not now."""

    def report_later(self, hand: Hand) -> None:
        """The same, in some milliseconds. On the loop."""

    def extend(self, delivery: Delivery, seconds: float) -> None:
        """Have the lease run for so long from now on. On the loop."""


class Hand:
    """Of one worker. Call with the lock held, unless it says otherwise."""

    def __init__(
        self, lease: float, credit: int | None, value_type: Any, driver: Driver, wake: Callable[[], None] | None
    ) -> None:
        """`wake`: to be called when there is something to take; None: consumers sleep here."""
        self.driver = driver
        self.window = Window(credit)
        self.patience = lease * PATIENCE
        self.ties: dict[int, Tie] = {}
        """By the origin of the owner. The engine's."""
        self.closed: Exception | None = None
        """Why there is no more."""
        self.forked: Exception | None = None
        self.lock = RLock()
        """Of what came. Whoever sleeps, sleeps on its bell."""
        self.saying = Lock()
        """Held by whoever is at what is said to owners, and what they answer. Taken before the other."""
        self.queue: deque[Parcel] = deque()
        self.items: Iterator[Job] = iter(())
        """Without the lock: the rest of the slice that is being handed out."""
        self.dirty: deque[Delivery] = deque()
        self.failures: deque[tuple[Tie, Fail, tuple[int, int, int]]] = deque()
        self.stuck = False
        """Jobs waited here until it was too late: there are to be no more until somebody asks for one."""
        self.jobs = self.refused = self.lost = self.unreported = 0
        self.is_awaited: Callable[[], bool] = lambda: self._asleep > 0
        """Whether somebody waits here for a job. Not so where `wake` is called: whoever passes that replaces this."""
        self._wake = wake
        self._decoder = ValueDecoder(value_type)
        self._bell = Condition(self.lock)
        self._asleep = 0
        self._due = NOT
        self._source: Iterator[Any] = iter(())
        self._loaded: Loaded | None = None
        self._batches: deque[tuple[Delivery, Batch]] = deque()
        self._waiting = 0  # jobs that came, as far as they are counted, and are in no slice
        self._latest = -inf  # when the last of them came
        self._grown = False  # and not yet told
        self._deliveries: set[ref[Delivery]] = set()  # those that somebody refers to

    # --- settling: without the lock, from any thread -----------------------------------------------

    def check(self) -> None:
        """Raises ForkedProcess in a forked child."""
        if self.forked is not None:
            raise self.forked

    def stir(self, delivery: Delivery) -> None:
        """A delivery has something to be said of it."""
        if self.forked is not None:
            raise self.forked
        self.dirty.append(delivery)
        if self._due == NOW:
            return
        if not (self._waiting or self.queue or length_hint(self._source)):  # `empty`
            is_all = delivery.tie.received - delivery.tie.finished == 1  # else more may be acknowledged just now
            if not (is_all and self.driver.report_here(self)):
                self.hasten()
        elif len(self.dirty) >= DIRTY_MAX:
            self.hasten()
        elif self._due == NOT:
            self._due = LATER
            self.driver.soon(self.driver.report_later, self)

    def hasten(self) -> None:
        """Say it at once."""
        if self._due != NOW:
            self._due = NOW
            self.driver.soon(self.driver.report, self)

    def extend(self, delivery: Delivery, seconds: float) -> None:
        """Its owner is to wait longer."""
        self.driver.soon(self.driver.extend, delivery, seconds)

    @property
    def empty(self) -> bool:
        """Whether nothing waits here."""
        return not (self._waiting or self.queue or length_hint(self._source))

    # --- the other side: without the lock ------------------------------------------------------------

    def put(self, parcel: Parcel) -> None:
        """A JOB came."""
        parcel.tie.last_job = parcel.received
        self.queue.append(parcel)
        if self.closed is not None:
            self.stop(self.closed)
        elif self._wake is not None:
            self._wake()
        elif self._asleep:
            with self.lock:
                self._bell.notify()
            give_way()

    def collect(self) -> set[Tie]:
        """What there is to say goes to the ties, which are returned. By who holds `saying`."""
        self._due = NOT
        self._grown = False
        touched = set()
        while self.dirty:
            delivery = self.dirty.popleft()
            delivery.clean = True
            size = len(delivery.acked)  # more may come any time
            seqs = delivery.acked[:size]
            del delivery.acked[:size]
            if seqs:
                ranges = ranges_of(seqs)
                delivery.settled += ranges
                delivery.tie.add([(delivery, first, last) for first, last in ranges])
                touched.add(delivery.tie)
        while self.failures:
            tie, fail, job = self.failures.popleft()
            tie.fail(fail, job)
            touched.add(tie)
        return touched

    @property
    def owners(self) -> int:
        """How many have jobs: they sent some within the last second."""
        recent = now() - 1.0
        return sum(tie.last_job > recent and not tie.gone for tie in list(self.ties.values()))

    def credit(self, tie: Tie, owners: int) -> int:
        """How much one of so many owners may have sent in all, if that is more than it was told; else 0."""
        if self.stuck or self.closed is not None:
            return 0
        credit = tie.finished + self.window.share(owners)
        if credit <= tie.granted:
            return 0
        tie.was_short = tie.received >= tie.granted
        tie.granted = credit
        return credit

    def first_credit(self, tie: Tie) -> int:
        """The same for one that has just been found. It need not have any jobs."""
        tie.granted = min(START, self.window.size) if self.window.adapts else self.window.size
        return tie.granted

    @property
    def unfinished(self) -> int:
        """Jobs that were begun and are not settled, or that wait; exact when nothing is to be collected."""
        return sum(tie.received - tie.finished for tie in list(self.ties.values()) if not tie.gone)

    def lose(self, tie: Tie) -> None:
        """An owner is gone: what came from it and was not begun is no more."""
        with self.lock:
            tie.gone = True
            if self._loaded is not None and self._loaded.delivery.tie is tie:
                list(self.items)  # somebody may be drawing from it
                self._waiting -= len(self._loaded.values) - self._loaded.at
                self._loaded = None
            gone = [entry for entry in self._batches if entry[0].tie is tie]
            if gone:
                self._batches = deque(entry for entry in self._batches if entry[0].tie is not tie)
                self._waiting -= sum(batch.count for _, batch in gone)

    def expire(self) -> float | None:
        """Give back what waited too long. Returns when to look again; None: when something has come."""
        with self.lock:
            time = now()
            while (deadline := self._next_deadline()) is not None and deadline <= time:
                self.stuck = True
                if not self._give_back_slice():
                    self._give_back(*self._batches.popleft())
            if self.failures:
                self.hasten()
            return deadline

    def stop(self, reason: Exception) -> None:
        """No more jobs: what was not begun is given back."""
        with self.lock:
            self.closed = reason
            while self._give_back_slice() or self._batches or self._split():
                while self._batches:
                    self._give_back(*self._batches.popleft())
            self.items = iter(())
            self.hasten()
            self._bell.notify_all()
        if self._wake is not None:
            self._wake()

    def state(self) -> str:
        """For people. Without the lock."""
        in_hand = f"{self.jobs} came, {self.unfinished} not finished, credit {self.window.size}"
        return in_hand if self.closed is None else f"{in_hand}, closed"

    def fork(self, reason: Exception) -> None:
        """In a forked child: it is all the parent's."""
        self.lock = RLock()  # the old one may be held by a thread that is not here
        self._bell = Condition(self.lock)
        self.items = iter(())
        self.queue.clear()
        self._batches.clear()
        self._loaded = None
        self.closed = self.forked = reason
        for delivery in self._in_use():
            delivery.tie.gone = delivery.clean = True

    def give_up(self, reason: str) -> None:
        """What is still in hand when the worker ends."""
        for delivery in self._in_use():
            for first, last in delivery.open if not delivery.tie.gone else ():
                delivery.fail(first, last, "nack", -1, reason)

    def _in_use(self) -> list[Delivery]:
        return [delivery for known in list(self._deliveries) if (delivery := known()) is not None]

    # --- the consumer's side -----------------------------------------------------------------------

    def take(self) -> Job | None:
        """The next job; others may be in `items` then. None: there is none now, or no more (see `closed`)."""
        while True:
            for job in self.items:
                if self._asleep:  # one was woken for all that came
                    if self.empty:
                        self.dry(now())
                    else:
                        self._bell.notify()
                return job
            if self.closed is not None or not self._next_slice():
                return None

    def dry(self, time: float) -> None:
        """Somebody waits, and there is nothing left. Perhaps that is because no more may be sent."""
        if self._grown:
            return
        ties = list(self.ties.values())
        short = [tie for tie in ties if not tie.gone and (tie.received >= tie.granted or tie.was_short)]
        if not short:
            return
        owners = max(1, self.owners)
        share = self.window.share(owners)
        if any(tie.finished + share > tie.granted for tie in short):
            self.hasten()
            return
        least = (max(tie.received - tie.finished for tie in short) + 1) * owners if self._busy >= share else 0
        if self.window.dry(time - self._latest, least):
            self._grown = True
            self.hasten()

    def sleep(self, timeout: float | None) -> None:
        """Wait until there may be something to take. Lets go of the lock meanwhile."""
        self._asleep += 1  # before looking: what comes later wakes us
        try:
            self.rest()
            if not self.queue and self.closed is None:
                self._bell.wait(timeout)
        finally:
            self._asleep -= 1

    def rest(self) -> None:
        """A consumer found nothing: it may look elsewhere, and what it has done is not to wait for it."""
        if self.dirty:
            self.hasten()

    # --- inside ------------------------------------------------------------------------------------

    def _next_slice(self) -> bool:
        """Make jobs of what comes next. False: there is nothing."""
        time = now()
        size = min(SLICE, max(1, self.window.size // 2))
        if self.stuck:
            self.stuck = False
            self.hasten()
        elif self._due != NOW and self.dirty and sum(len(delivery.acked) for delivery in list(self.dirty)) >= size:
            self.hasten()
        loaded = self._loaded
        if loaded is not None and not loaded.at and loaded.delivery.deadline <= time:
            self._give_back_slice()
            self.hasten()
            loaded = None
        while loaded is None or loaded.at == len(loaded.values):
            if not self._batches and not self._split():
                self.items = self._source = iter(())  # they would keep their delivery alive
                self._loaded = None
                self.dry(time)
                return False
            delivery, batch = self._batches.popleft()
            if delivery.deadline <= time:
                self._give_back(delivery, batch)
                self.hasten()
                continue
            loaded = self._loaded = self._load(delivery, batch)
        waited = time - loaded.delivery.received
        before = loaded.at
        self.items, self._source = loaded.jobs(size)
        self._waiting -= loaded.at - before
        if waited > WAIT and self.window.waited(waited, self._busy) and waited > TOO_LONG:
            self._trim()
        return True

    def _load(self, delivery: Delivery, batch: Batch) -> Loaded | None:
        flawed = False
        try:
            try:
                values, headers = self._decoder.decode(batch)
            except msgspec.ValidationError:
                values, headers = self._decoder.decode_each(batch)
                flawed = True
        except RemoteProtocolError as error:
            self._waiting -= batch.count
            self.driver.garbage(error)
            delivery.fail(batch.first, batch.end - 1, "reject", -1, str(error)[:REASON_MAX])
            self.hasten()
            return None
        self.jobs += batch.count
        if flawed:
            for seq, value in enumerate(values, batch.first):
                if isinstance(value, msgspec.ValidationError):
                    reason = f"it does not fit the type that its worker asks for: {value}"[:REASON_MAX]
                    delivery.fail(seq, seq, "reject", -1, reason)
                    name = f"{delivery.topic} {delivery.origin:016x}#{seq}"
                    self.driver.emit(Warned(f"job {name} was rejected: {reason}"))
            self.hasten()
        return Loaded(delivery, batch, values, headers, flawed)

    def _split(self) -> bool:
        """Take in the next JOB. False: there is none, or nothing in it."""
        while self.queue:
            parcel = self.queue.popleft()
            if parcel.tie.gone:
                continue
            try:
                batches = decode_batches(parcel.parts)
                if len(batches) != len(parcel.deliveries):
                    raise RemoteProtocolError(f"JOB: {len(parcel.deliveries)} deliveries of {len(batches)} batches")
                for (number, attempt), batch in zip(parcel.deliveries, batches, strict=True):
                    delivery = Delivery(self, parcel, number, attempt, batch, batch.topic.decode())
                    self._deliveries.add(ref(delivery, self._deliveries.discard))
                    self._batches.append((delivery, batch))
                    self._waiting += batch.count
                    parcel.tie.received += batch.count
                parcel.tie.was_short = False
            except (RemoteProtocolError, UnicodeDecodeError) as error:
                self.driver.garbage(RemoteProtocolError(str(error)))
                continue
            self._latest = parcel.received
            if batches:
                self.window.weigh(sum(map(len, parcel.parts)), sum([batch.count for batch in batches]))
                return True
        return False

    @property
    def _busy(self) -> int:
        """Jobs that were handed out and are not settled."""
        pending = sum(len(delivery.acked) for delivery in list(self.dirty))
        pending += sum(last - first + 1 for _, _, (_, first, last) in list(self.failures))
        return max(0, self.unfinished - self._waiting - length_hint(self._source) - pending)

    def _trim(self) -> None:
        """Give back what would have to wait too long."""
        while self.queue and self._split():
            pass
        while self._batches and self._waiting - self._batches[-1][1].count >= 2 * self.window.size:
            self._give_back(*self._batches.pop())
        if self.failures:
            self.hasten()

    def _give_back(self, delivery: Delivery, batch: Batch) -> None:
        self._waiting -= batch.count
        if not delivery.tie.gone:
            delivery.fail(batch.first, batch.end - 1, "return", -1, "")

    def _give_back_slice(self) -> bool:
        """Of the batch that is being handed out, what nobody has. False: there is nothing of it."""
        loaded, self._loaded = self._loaded, None
        jobs = list(self.items)
        if loaded is None:
            return False
        self._source = iter(())
        delivery = loaded.delivery
        self._waiting -= len(loaded.values) - loaded.at
        seqs = [job.seq for job in jobs]
        seqs += [
            delivery.first + at
            for at in range(loaded.at, len(loaded.values))
            if not (loaded.flawed and isinstance(loaded.values[at], msgspec.ValidationError))
        ]
        for first, last in ranges_of(seqs):
            delivery.fail(first, last, "return", -1, "")
        return True

    def _next_deadline(self) -> float | None:
        """When it is too late for the first of those that wait. None: there are none."""
        loaded = self._loaded
        if loaded is not None and (length_hint(self._source) or loaded.at < len(loaded.values)):
            return loaded.delivery.deadline
        self._loaded = None
        if not self._batches and not self._split():
            return None
        return self._batches[0][0].deadline
