"""What there is to do of one queue, or for one group: what of it is loaded, and how far it has come. Pure bookkeeping.

    the journal's offsets  →
    ──── settled ────┬── loaded: some of it settled ──┬── unread ──
                     place                            next          the end on disk

A backlog is **live** when nothing of it is unread: then what is appended next need not be read from the disk.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque

from zmqbus.forwarder.queues.kept import (
    Kept,
    Run,
    cursor_name,
    encode,
    pack_runs,
    pack_tried,
    unpack_runs,
    unpack_tried,
)
from zmqbus.journal import Cursor
from zmqbus.protocol.frames import Batch
from zmqbus.protocol.queues.work import Line, Team, Work, ones
from zmqbus.protocol.topics import Matcher

MESSAGES_MAX = 65_536  # loaded of one backlog, and not settled
PATTERNS_BYTES_MAX = 4096  # of one group, together
WORK_BYTES = 600  # what Python spends on a work beside its bytes
# What a cursor says of what is loaded has to fit in 64 KiB, however scattered that is when others have been settled:
# with the piece that a read may add, of some 1800 batches or 65,000 messages, with `tried`, and the patterns.
SCATTER_BYTES_MAX = 40 * 1024

EVERYWHERE = 1 << 63  # beyond every offset


class Backlog:
    """One queue or group."""

    def __init__(self, kept: Kept, place: int) -> None:
        self.name = cursor_name(kept)
        self.topic = kept.topic
        self.team = None if kept.topic else Team(" ".join((kept.group, *kept.patterns)), tuple(kept.patterns))
        self.matches = Matcher(kept.patterns or [kept.topic]).matches
        self.since_ns = kept.since_ns
        self.committed = place
        """The offset of its cursor on disk."""
        self.next = place
        """All of ours before this is loaded or settled."""
        self.live = False
        self.known_from = place
        """What is appended from this offset on, the tail knows of."""
        self.works: OrderedDict[int, Work] = OrderedDict()
        """Loaded, and not settled as a whole: by offset, in order."""
        self.bytes = self.messages = 0
        """Of `works`; bytes are of memory."""
        self.lines: Counter[Line] = Counter()
        """In how many works there is something for each line."""
        self.parked: list[Work] = []
        """Of `works`: those that are not to be given out for now."""
        self.unread = 0
        """Messages that are neither settled nor loaded, of those counted so far: before `counted_to`."""
        self.counted_to = place
        self.first_unread: tuple[int, int] | None = None
        """Where the first of these is, and its time; None: not known."""
        self.wanted = False
        """There are workers for it."""
        self.rival = ""
        """Who gives it out in our place."""
        self.busy = False
        """A read is under way."""
        self.broken = False
        """It cannot be read."""
        self._kept = kept
        self._end = place + kept.reach  # before it all is settled but what is loaded, or left from an earlier life
        self._left = deque(unpack_runs(place, kept.left))
        self._tried = unpack_tried(place, kept.tried)

    @property
    def group(self) -> str:
        """Its name, of a group."""
        return self._kept.group

    @property
    def patterns(self) -> list[str]:
        """What it is about."""
        return self._kept.patterns or [self.topic]

    @property
    def oldest_ns(self) -> int:
        """When the first that is not settled was sent, ns since 1970; 0: there is none, or it is not known."""
        if self.works:
            return next(iter(self.works.values())).batch.time_ns
        return 0 if self.first_unread is None else self.first_unread[1]

    # --- in and out --------------------------------------------------------------------------------

    def concerns(self, batch: Batch) -> bool:
        """Whether a batch, on a topic of ours, is ours. Groups care only for what was published since they exist."""
        return batch.time_ns >= self.since_ns

    def load(self, offset: int, batch: Batch) -> list[Work]:
        """Take in the next batch of ours. Returns the work it makes, if it is not behind us, or settled."""
        if offset + batch.count <= self.next:
            return []
        self.next = offset + batch.count
        done = self._settled_before(offset, batch.count)
        todo = batch.count - done.bit_count()
        if offset < self.counted_to:
            self.unread -= todo
        self.first_unread = None
        if not todo:
            return []
        work = Work(batch, self.line(batch.topic), offset, done)
        if self._tried:
            tried = {i: self._tried.pop(offset + i) for i in range(batch.count) if offset + i in self._tried}
            work.attempts = tried or work.attempts
        self.works[offset] = work
        self.lines[work.line] += 1
        self.bytes += batch.size + WORK_BYTES
        self.messages += batch.count
        return [work]

    def skip(self, offset: int, batch: Batch) -> None:
        """Leave a batch of ours where it is."""
        todo = self.todo(offset, batch.count)
        if todo and not self.unread:
            self.first_unread = offset, batch.time_ns
        self.unread += todo

    def line(self, topic: bytes) -> Line:
        """Of the dispatcher."""
        return (None, self.topic) if self.team is None else (self.team.group, topic.decode(errors="replace"))

    def settled(self, work: Work) -> None:
        """All of a work is settled, if it is one of ours."""
        if self.works.get(work.position) is not work:
            return
        del self.works[work.position]
        self.lines[work.line] -= 1
        if not self.lines[work.line]:
            del self.lines[work.line]
        self.bytes -= work.batch.size + WORK_BYTES
        self.messages -= work.batch.count
        self._end = max(self._end, work.position + work.batch.count)

    # --- on disk -----------------------------------------------------------------------------------

    def place(self, end: int) -> int:
        """Everything of ours before it is settled; the journal is on disk up to `end`."""
        if self.works:
            return next(iter(self.works))
        for run in self._left:
            if run.end > self.next:
                return max(run.start, self.next)
        if self.live:
            return end
        return max(self.next, self._end)

    def cursor(self, end: int) -> Cursor:
        """What to write down."""
        place = self.place(end)
        reach = self._end
        for offset, work in self.works.items():
            if work.done or work.attempts:
                reach = max(reach, offset + work.batch.count)
        runs = []
        tried: list[tuple[int, int]] = []
        for offset, work in self.works.items():
            if offset >= reach:
                break
            count = work.batch.count
            done = work.done if count <= MESSAGES_MAX else 0  # who sends batches that large has them done as a whole
            runs.append(Run(offset, offset + count, done))
            if work.attempts:
                tried += [(offset + index, count) for index, count in sorted(work.attempts.items())]
        for run in self._left:
            if run.start >= self.next:
                runs.append(run)
            elif run.end > self.next:
                runs.append(Run(self.next, run.end, run.done >> self.next - run.start))
        tried += sorted(item for item in self._tried.items() if item[0] >= self.next)
        kept = self._kept
        state = Kept(
            kept.topic, kept.group, kept.patterns, kept.since_ns, max(0, reach - place), pack_runs(place, runs),
            pack_tried(place, tried),
        )  # fmt: skip
        return Cursor(place, encode(state))

    @property
    def scatter(self) -> int:
        """Bytes that a cursor needs at most for what is loaded, whatever of it is settled in which order."""
        number = len(self.works) + len(self._left)
        if not number:
            return 0
        apart = (max(self._end, self.next) - self.place(0)) // number
        return number * (4 + apart.bit_length() // 7) + self.messages // 8

    def todo(self, offset: int, count: int) -> int:
        """How many messages of a batch that is not loaded an earlier life has left."""
        done = self._settled_before(offset, count, forget=False)
        return count - done.bit_count()

    def _settled_before(self, offset: int, count: int, forget: bool = True) -> int:
        """Bits of what an earlier life has settled, or a start in the middle of a batch has passed over."""
        if offset >= self._end:
            return 0
        done, end = ones(min(self._end - offset, count)), offset + count
        while forget and self._left and self._left[0].end <= offset:
            self._left.popleft()
        for run in self._left:
            if run.start >= end:
                break
            low, high = max(run.start, offset), min(run.end, end)
            if low < high:
                done &= ~((ones(high - low) & ~(run.done >> low - run.start)) << low - offset)
        return done
