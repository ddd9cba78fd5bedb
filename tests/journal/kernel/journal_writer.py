"""A program that drives a journal as a forwarder does, and records what it was promised. It runs until it is killed.

    python journal_writer.py DIRECTORY HISTORY [--seed N] [--batches N] [--age N] [--sabotage NAME]

Batches of several streams are appended, written, and synced in a worker thread while the next ones gather; segments
change every 32 KiB; a reader follows the tail as the durable consumer `indexer` and commits its cursor. What happened
goes to the file HISTORY (tests/forwarder/history.py), an ack as soon as `finish` returns. With `--batches` it ends by
itself after so many, closing the journal; with `--age`, segments that were full so many turns ago are removed.

A value is `<<topic/origin/seq>>` and some padding, so that it can be recognised in a system call; the payload of a
batch is its values, separated by commas. `stored` reads them back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / "forwarder"), str(Path(__file__).parents[3])]

from history import Acked, Committed, Consumed, Journaled, Opened, Recorder, Sent, digest

from zmqbus.journal import Appended, Batch, Cursor, Journal, Reader, Retention, Ticket, positions, storage
from zmqbus.journal.segment import SegmentWriter

SEGMENT_BYTES = 32 << 10
CURSOR_FILE_BYTES = 4 << 10
CONSUMER = "indexer"
TOPICS = ("logs.a", "logs.b", "metrics.cpu")


def mark(topic: str, origin: int, seq: int) -> bytes:
    """What a message can be recognised by, in a file or in a system call."""
    return b"<<%s/%d/%d>>" % (topic.encode(), origin, seq)


def cursor_mark(offset: int) -> bytes:
    """The same for a committed cursor."""
    return b"<<%s/%d>>" % (CONSUMER.encode(), offset)


def messages(batch: Batch) -> Iterator[tuple[int, str, int, int, str]]:
    """(offset, topic, origin, seq, digest of the value) of each message in a batch."""
    for n, value in enumerate(bytes(batch.payload).split(b",")):
        yield batch.offset + n, batch.topic.decode(), batch.origin, batch.first_seq + n, digest(value)


def stored(journal: Journal) -> list[Journaled]:
    """Everything that a journal holds."""
    reader, found = Reader(journal, journal.first_offset), []
    while not reader.caught_up:
        found += [Journaled(*message) for batch in reader.read() for message in messages(batch)]
    reader.close()
    return found


class Writer:
    """One life of a forwarder, publishers and a consumer included. One thread, and one more for the disk calls."""

    def __init__(self, directory: str, recorder: Recorder, rng: Random, age: int | None = None) -> None:
        self.recorder = recorder
        self.rng = rng
        self.now_ns = 1
        retention = Retention(age_max_ns=age)  # a turn of the loop counts as a nanosecond
        self.journal = Journal.open(directory, now_ns=1, segment_bytes=SEGMENT_BYTES, retention=retention)
        self.worker = ThreadPoolExecutor(1)
        self.flying: tuple[Ticket, Future[None]] | None = None
        self.committing: tuple[int, Future[None]] | None = None
        self.reader = Reader(self.journal, self.journal.cursors.all().get(CONSUMER, Cursor(0)).offset)
        self.batches = 0
        recorder.record(Opened(CONSUMER))

    def step(self) -> None:
        """What a loop does in one turn."""
        self.now_ns += 1
        for _ in range(self.rng.randint(1, 6)):
            self.publish(self.rng.choice(TOPICS), self.rng.choice((7, 8)))
        if self.flying is not None and (self.rng.random() < 0.5 or self.flying[1].done()):
            self.finish()
        if self.flying is None and (ticket := self.journal.write(self.now_ns)) is not None:
            self.flying = ticket, self.worker.submit(self.journal.sync, ticket)
        if self.rng.random() < 0.3:
            self.consume()

    def publish(self, topic: str, origin: int) -> None:
        first, count = self.journal.expected(topic.encode(), origin), self.rng.randint(1, 3)
        values = [
            mark(topic, origin, seq) + b"x" * self.rng.choice((0, 9, 200, 1500)) for seq in range(first, first + count)
        ]
        self.recorder.record(*[Sent(topic, origin, first + n, digest(value)) for n, value in enumerate(values)])
        got = self.journal.append(topic.encode(), origin, first, count, self.now_ns, b",".join(values))
        assert got is Appended.ACCEPTED
        self.batches += 1

    def finish(self) -> None:
        assert self.flying is not None
        ticket, done = self.flying
        done.result()
        commit = self.journal.finish(ticket)
        assert not commit.refused
        self.recorder.record(
            *[Acked(topic.decode(), origin, seq, 1) for topic, origin, seq in commit.acked]
        )  # cumulative, as a forwarder's acks are
        self.flying = None

    def consume(self) -> None:
        if self.committing is not None:
            offset, done = self.committing
            done.result()
            self.recorder.record(Committed(CONSUMER, offset))
            self.committing = None
        found = [message for batch in self.reader.read(8192) for message in messages(batch)]
        if found:
            self.recorder.record(*[Consumed(CONSUMER, *message) for message in found])
            offset = self.reader.offset
            changes = {CONSUMER: Cursor(offset, cursor_mark(offset))}
            self.committing = offset, self.worker.submit(self.journal.commit_cursors, changes)

    def close(self) -> None:
        while self.flying is not None or self.committing is not None or not self.reader.caught_up:
            if self.flying is not None:
                self.finish()
            self.consume()
        self.worker.shutdown()
        self.reader.close()
        self.journal.close(self.now_ns)


# --- deliberate bugs, for the tests of the tests ---------------------------------------------------------


def ack_before_sync() -> None:
    SegmentWriter.sync = lambda self, position: setattr(self, "synced", position)  # type: ignore[method-assign]


def names_not_synced() -> None:
    storage.Disk.sync_directory = lambda self, path: None  # type: ignore[method-assign]


def new_file_not_synced() -> None:
    storage.Disk.fsync = lambda self, fd: None  # type: ignore[method-assign]


SABOTAGES: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (ack_before_sync, names_not_synced, new_file_not_synced)
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("history")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batches", type=int, default=1 << 40)
    parser.add_argument("--age", type=int)
    parser.add_argument("--sabotage", choices=SABOTAGES)
    options = parser.parse_args()
    positions.CURSOR_FILE_BYTES = CURSOR_FILE_BYTES  # so that it is changed now and then
    if options.sabotage:
        SABOTAGES[options.sabotage]()
    writer = Writer(options.directory, Recorder(options.history), Random(options.seed), options.age)
    while writer.batches < options.batches:
        writer.step()
    writer.close()


if __name__ == "__main__":
    main()
