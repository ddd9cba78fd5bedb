"""One machine with publishers, a journal on a simulated disk, and bad luck; and the checks of what was promised.

Everything follows from one seed: `Simulation(seed).run()`. The checks are plain functions, raising `Broken` with the
name of the promise, so that the sabotage tests can show that each deliberate bug makes one of them fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from simulated_disk import PowerCut, SimulatedDisk

from zmqbus.errors import JournalCorrupt, JournalError, JournalFailed, NoSpace
from zmqbus.journal import Appended, Batch, Cursor, Journal, Reader, Retention, Ticket, fetch

PATH = "/data/journal"
TOPICS = [b"logs.a", b"logs.b", b"metrics.cpu"]


class Broken(AssertionError):
    """A promise was broken."""


class Publisher:
    """One stream: what was published, in whole batches, and how far the journal has acknowledged it."""

    def __init__(self, topic: bytes, origin: int) -> None:
        self.topic = topic
        self.origin = origin
        self.batches: dict[int, tuple[int, bytes, bytes | None]] = {}  # first seq → count, payload, external
        self.acked = 0

    def batch(self, first: int, rng: Random) -> tuple[int, bytes, bytes | None]:
        """The batch that starts at a seq: always the same one."""
        if first not in self.batches:
            count = rng.randint(1, 5)
            payload = b"%s/%d/%d:" % (self.topic, self.origin, first) + rng.randbytes(rng.choice((0, 9, 150, 700)))
            external = rng.randbytes(33) if rng.random() < 0.1 else None
            self.batches[first] = count, payload, external
        return self.batches[first]


def read_all(journal: Journal, start: int = 0) -> Iterator[Batch]:
    reader = Reader(journal, start)
    try:
        while not reader.caught_up:
            yield from reader.read(2000)
    finally:
        reader.close()


def check_log(journal: Journal, publishers: list[Publisher], seen: dict[int, tuple[bytes, int, int]]) -> None:
    """Nothing acknowledged is lost; nothing is repeated, reordered, altered or invented; offsets keep their meaning."""
    known = {(p.topic, p.origin): p for p in publishers}
    last: dict[tuple[bytes, int], int] = {}
    offset = journal.first_offset
    for batch in read_all(journal, journal.first_offset):
        if batch.offset != offset:
            raise Broken(f"offset {offset} is missing: {batch.offset} follows")
        offset = batch.next_offset
        key = batch.topic, batch.origin
        if key not in known or batch.first_seq not in known[key].batches:
            raise Broken(f"{key} #{batch.first_seq} was never published")
        count, payload, external = known[key].batches[batch.first_seq]
        stored = None if batch.external is None else bytes(batch.external)
        if (count, payload, external) != (batch.count, bytes(batch.payload), stored):
            raise Broken(f"{key} #{batch.first_seq} was altered")
        if key in last or journal.first_offset == 0:
            expected = last.get(key, 0) + 1
            if batch.first_seq != expected:
                raise Broken(f"{key} #{batch.first_seq} follows where #{expected} must")
        last[key] = batch.last_seq
        identity = batch.topic, batch.origin, batch.first_seq
        if seen.setdefault(batch.offset, identity) != identity:
            raise Broken(f"offset {batch.offset} was {seen[batch.offset]}, and now is {identity}")
    if offset != journal.durable_offset:
        raise Broken(f"the log ends at {offset}, not at {journal.durable_offset}")
    for key, publisher in known.items():
        head = journal.head(*key)
        if head.durable < publisher.acked:
            raise Broken(f"{key}: #{publisher.acked} was acknowledged, #{head.durable} is known")
        if journal.first_offset == 0 and last.get(key, 0) < publisher.acked:
            raise Broken(f"{key}: #{publisher.acked} was acknowledged, the log ends at #{last.get(key, 0)}")
        if key in last and head.durable != last[key]:
            raise Broken(f"{key}: the log ends at #{last[key]}, the dedup state at #{head.durable}")


def check_cursors(journal: Journal, committed: dict[str, int], uncertain: dict[str, int]) -> None:
    """A cursor is where it was committed, or where a commit that was under way would have put it."""
    for name, offset in committed.items():
        cursor = journal.cursors.all().get(name)
        if cursor is None or cursor.offset not in (offset, uncertain.get(name, offset)):
            raise Broken(f"cursor {name!r} was committed at {offset}, and now is {cursor}")


class Simulation:
    """Seeded lives of one machine. `plan`: what goes wrong at which file call, instead of what the seed says."""

    def __init__(
        self,
        seed: int,
        *,
        steps: int = 40,
        lives: int = 4,
        retention: bool | None = None,
        plan: dict[int, str] | None = None,
    ) -> None:
        self.seed = seed
        self.plan = plan
        self.rng = rng = Random(seed)
        self.steps = steps
        self.lives = lives
        self.disk = SimulatedDisk(rng)
        self.disk.mkdir("/data")
        self.disk.sync_directory("/")
        self.publishers = [Publisher(topic, origin) for topic in TOPICS for origin in (7, 8)]
        self.seen: dict[int, tuple[bytes, int, int]] = {}
        self.committed: dict[str, int] = {}
        self.uncertain: dict[str, int] = {}
        self.tickets: list[Ticket] = []
        self.now = 1000
        self.retention = Retention()
        if retention or (retention is None and rng.random() < 0.3):
            self.retention = Retention(bytes_max=rng.choice((6000, 12000)), age_max_ns=None)
        self.first_kept = 0

    def run(self) -> Simulation:
        """Live `lives` times; between two lives the process is killed or the power fails, anywhere."""
        for _ in range(self.lives):
            if self.plan is not None:  # told what goes wrong in the first life; the second must go well
                self.disk.plan, self.plan = self.plan, {}
            elif self.rng.random() < 0.8:
                self.disk.plan[self.disk.calls + self.rng.randint(1, 90)] = self.rng.choice(
                    ("cut", "cut", "cut", "cut", "short", "EIO", "ENOSPC")
                )
            try:
                journal = self.boot()
                for _ in range(self.steps):
                    self.step(journal)
                if self.rng.random() < 0.3:
                    self.absorb(journal)
                    journal.close(self.now)
            except PowerCut:
                self.disk = self.disk.power_cut()
                continue
            except (JournalFailed, NoSpace):
                pass  # the process ends, exit code 74, and is started again
            self.disk = self.disk.power_cut() if self.rng.random() < 0.5 else self.disk.killed()
        self.disk = self.disk.killed()
        self.boot()
        return self

    def boot(self) -> Journal:
        """Start, and check what is there."""
        self.tickets = []
        try:
            journal = Journal.open(
                PATH, now_ns=self.now, storage=self.disk, segment_bytes=2048, retention=self.retention
            )
        except JournalCorrupt as error:
            raise Broken(f"a crash was taken for damage: {error}") from error
        self.check(journal)
        self.uncertain = {}
        self.committed = {name: journal.cursors.all()[name].offset for name in self.committed}
        return journal

    def check(self, journal: Journal) -> None:
        slowest = min(self.committed.values(), default=1 << 63)
        if journal.first_offset > max(slowest, self.first_kept):
            raise Broken(f"messages before {journal.first_offset} were removed; a cursor is at {slowest}")
        self.first_kept = journal.first_offset
        check_log(journal, self.publishers, self.seen)
        check_cursors(journal, self.committed, self.uncertain)

    def step(self, journal: Journal) -> None:
        self.now += 1
        rng = self.rng
        choice = rng.random()
        if choice < 0.5:
            self.publish(journal, rng.choice(self.publishers))
        elif choice < 0.65:
            if (ticket := journal.write(self.now)) is not None:
                self.tickets.append(ticket)
        elif choice < 0.85:
            if self.tickets:  # the newest covers the older ones
                self.acknowledge(journal, self.tickets.pop(0) if rng.random() < 0.7 else self.tickets[-1])
        elif choice < 0.9:
            name = rng.choice("xyz")
            self.uncertain[name] = offset = rng.randint(
                max(self.committed.get(name, 0), journal.first_offset), journal.durable_offset
            )
            journal.commit_cursors({name: Cursor(offset, b"state")})
            self.committed[name] = offset
        elif choice < 0.93:
            if (ticket := journal.checkpoint(self.now)) is not None:
                self.tickets.append(ticket)
        elif choice < 0.95:
            self.absorb(journal)
            journal.delete(journal.retire(self.now))
            if journal.full is not None:
                journal.resume()
        elif choice < 0.97:
            self.check(journal)
        else:
            publisher = rng.choice(self.publishers)
            if journal.first_offset == 0 and publisher.acked:
                first = rng.randint(1, publisher.acked)
                found = fetch(journal, publisher.topic, publisher.origin, first, publisher.acked, 1 << 30)
                if not found or found[0].first_seq > first or found[-1].last_seq < publisher.acked:
                    raise Broken(f"fetch of #{first} to #{publisher.acked} found {found}")

    def publish(self, journal: Journal, publisher: Publisher) -> None:
        """Send a stream's next batch, or an old one again, or one too early."""
        expected = journal.expected(publisher.topic, publisher.origin)
        wanted, first = Appended.ACCEPTED, expected
        if self.rng.random() < 0.2:
            older = [first for first in publisher.batches if first < expected]
            if older:
                wanted, first = Appended.DUPLICATE, self.rng.choice(older)
        elif self.rng.random() < 0.1:
            wanted, first = Appended.GAP, expected + 1000
        count, payload, external = (1, b"", None) if wanted is Appended.GAP else publisher.batch(first, self.rng)
        half = len(payload) // 2
        parts = [payload[:half], memoryview(payload)[half:]] if self.rng.random() < 0.5 else payload
        try:
            got = journal.append(publisher.topic, publisher.origin, first, count, self.now, parts, external)
        except NoSpace:
            return
        if got is not wanted:
            raise Broken(f"{publisher.topic!r} #{first}: {got}, expected {wanted}")

    def acknowledge(self, journal: Journal, ticket: Ticket) -> None:
        if ticket in self.tickets:
            self.tickets.clear()
        journal.sync(ticket)
        while self.rng.random() < 0.3:  # what the loop does while the worker's result waits to be taken over
            self.publish(journal, self.rng.choice(self.publishers))
            if (another := journal.write(self.now)) is not None:
                self.tickets.append(another)
        commit = journal.finish(ticket)
        known = {(p.topic, p.origin): p for p in self.publishers}
        for topic, origin, seq in commit.acked:
            known[topic, origin].acked = max(known[topic, origin].acked, seq)

    def absorb(self, journal: Journal) -> None:
        while self.tickets:
            self.acknowledge(journal, self.tickets[-1])


__all__ = ["Broken", "JournalError", "Publisher", "Simulation", "check_cursors", "check_log", "read_all"]
