"""Deliberate bugs, switched on one at a time: each must make a check fail, or the checks are worth nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import checks
import pytest
from simulated_disk import SimulatedDisk
from simulation import Broken

from zmqbus.errors import JournalError
from zmqbus.journal import index, journal, reader, segment, storage
from zmqbus.journal.journal import Journal
from zmqbus.journal.positions import Cursors, Retention, Streams
from zmqbus.journal.records import encode_head
from zmqbus.journal.segment import Scanner, SegmentWriter

Patch = pytest.MonkeyPatch
flips = partial(checks.flips, step=5)
crashes = partial(checks.crash_simulations, range(300))
crashes_with_retention = partial(checks.crash_simulations, range(100_000, 100_200), retention=True, steps=60)


def ack_before_sync(patch: Patch) -> None:
    patch.setattr(SegmentWriter, "sync", lambda self, position: setattr(self, "synced", position))


def no_directory_sync(patch: Patch) -> None:
    patch.setattr(SimulatedDisk, "sync_directory", lambda self, path: None)


def no_directory_sync_after_create(patch: Patch) -> None:
    real = segment.create_segment

    def create(disk, *args, **kwargs):
        disk.sync_directory = lambda path: None
        try:
            return real(disk, *args, **kwargs)
        finally:
            del disk.sync_directory

    patch.setattr(journal, "create_segment", create)


def sync_error_retried(patch: Patch) -> None:
    def sync(self: SegmentWriter, position: int) -> None:
        try:
            self._storage.fdatasync(self._fd)
        except OSError:
            self._storage.fdatasync(self._fd)
        self.synced = position

    patch.setattr(SegmentWriter, "sync", sync)


def write_error_ignored(patch: Patch) -> None:
    real = storage.write_all

    def write_all(disk, fd, buffers, position):
        try:
            return real(disk, fd, buffers, position)
        except OSError:
            return position + sum(map(len, buffers))

    patch.setattr(segment, "write_all", write_all)


def short_write_believed(patch: Patch) -> None:
    def write_all(disk, fd, buffers, position):
        disk.pwritev(fd, buffers, position)
        return position + sum(map(len, buffers))

    patch.setattr(segment, "write_all", write_all)


class _AnyNumber(int):
    def __ne__(self, other: object) -> bool:
        return False


def crc_unchecked(patch: Patch) -> None:
    patch.setattr(segment, "crc32", lambda data, seed=0: _AnyNumber())


def payload_crc_unchecked(patch: Patch) -> None:
    real = segment.crc32

    def only_headers(data, seed=0):
        return real(data, seed) if bytes(data[:3]) == b"zbr" else _AnyNumber()

    patch.setattr(segment, "crc32", only_headers)


def dedup_lost_on_restart(patch: Patch) -> None:
    patch.setattr(Streams, "recover", lambda self, batch: None)


def dedup_lost_with_old_segments(patch: Patch) -> None:
    patch.setattr(Streams, "snapshot", lambda self: b"")


def dedup_off(patch: Patch) -> None:
    real = Journal.append

    def append(self, topic, origin, first_seq, *args, **kwargs):
        stream = self._streams.known.get((topic, origin))
        if stream is not None and first_seq <= stream.accepted:
            stream.accepted = first_seq - 1
        return real(self, topic, origin, first_seq, *args, **kwargs)

    patch.setattr(Journal, "append", append)


def gaps_accepted(patch: Patch) -> None:
    real = Journal.append
    patch.setattr(Journal, "append", lambda *args, **kwargs: real(*args, **{**kwargs, "allow_gap": True}))


def durable_to_always_zero(patch: Patch) -> None:
    patch.setattr(journal, "encode_head", lambda *args: encode_head(*args[:7], 0, *args[8:]))
    patch.setattr(Journal, "checkpoint", lambda self, now_ns: None)


def durable_to_too_high(patch: Patch) -> None:
    patch.setattr(journal, "encode_head", lambda *args: encode_head(*args[:7], 1 << 40, *args[8:]))


def damage_always_taken_for_torn(patch: Patch) -> None:
    patch.setattr(segment, "refuse_damage", lambda *args: None)


def cut_where_nothing_valid_follows(patch: Patch) -> None:
    """The rule of etcd's old days: a valid record after an invalid one is called damage."""

    def refuse(disk, seg, fd, scanner: Scanner) -> None:
        for header in segment.find_headers(disk, fd, seg.header.salt, scanner.position + 8, disk.size(fd)):
            raise segment.JournalCorrupt(seg.path, scanner.position, "x", header.base_offset)

    patch.setattr(segment, "refuse_damage", refuse)


def quarantine_skipped(patch: Patch) -> None:
    patch.setattr(segment, "quarantine", lambda *args: "")


def torn_tail_not_cut(patch: Patch) -> None:
    patch.setattr(SimulatedDisk, "truncate", lambda self, fd, size: None)


def recovered_not_rewritten(patch: Patch) -> None:
    patch.setattr(segment, "rewrite", lambda *args: None)


def salt_ignored(patch: Patch) -> None:
    patch.setattr(SimulatedDisk, "random", lambda self, size: bytes(size))


def segment_header_not_synced(patch: Patch) -> None:
    patch.setattr(SimulatedDisk, "fsync", lambda self, fd: None)


def old_segment_not_synced_before_new(patch: Patch) -> None:
    real = SegmentWriter.sync

    def sync(self: SegmentWriter, position: int) -> None:
        if self.capacity - position < 400:
            self.synced = position  # it is full: somebody will surely have synced it
        else:
            real(self, position)

    patch.setattr(SegmentWriter, "sync", sync)


def retention_ignores_cursors(patch: Patch) -> None:
    patch.setattr(Cursors, "slowest", lambda self: 1 << 63)


def retention_newest_first(patch: Patch) -> None:
    real = Retention.victims
    patch.setattr(Retention, "victims", lambda self, segments, *a, **k: real(self, segments[1:], *a, **k))


def cursor_not_synced(patch: Patch) -> None:
    real = Cursors.commit

    def commit(self: Cursors, changes) -> None:
        self._writer.synced = 1 << 40
        real(self, changes)
        self._writer.synced = self._writer.position

    patch.setattr(Cursors, "commit", commit)


def readers_not_held_back(patch: Patch) -> None:
    real = Journal.write

    def write(self: Journal, now_ns: int):
        ticket = real(self, now_ns)
        if ticket is not None:
            ticket.writer.segment.durable_end, self.durable_offset = ticket.position, ticket.next_offset
        return ticket

    patch.setattr(Journal, "write", write)


def no_space_leaves_its_debris(patch: Patch) -> None:
    def refuse(self: Journal, reason):
        self.full = reason
        self._pending.clear()
        return []

    patch.setattr(Journal, "_refuse", refuse)


def index_promises_too_little(patch: Patch) -> None:
    patch.setattr(index.SealedIndex, "span", lambda self, topic, origin: None)
    patch.setattr(index.ActiveIndex, "span", lambda self, topic, origin: None)


def reader_skips_what_does_not_fit(patch: Patch) -> None:
    patch.setattr(reader, "damage", lambda seg, scanner: StopIteration())
    real = reader.Reader.read

    def read(self, bytes_max: int = 1 << 20):
        try:
            return real(self, bytes_max)
        except StopIteration:
            self.offset = self._log.durable_offset
            return []

    patch.setattr(reader.Reader, "read", read)


CASES: list[tuple[Callable[[Patch], None], Callable[[], None]]] = [
    (ack_before_sync, crashes),
    (no_directory_sync, crashes),
    (no_directory_sync_after_create, crashes),
    (sync_error_retried, checks.acked_after_failed_sync),
    (write_error_ignored, crashes),
    (short_write_believed, crashes),
    (crc_unchecked, flips),
    (payload_crc_unchecked, flips),
    (dedup_lost_on_restart, crashes),
    (dedup_lost_with_old_segments, crashes_with_retention),
    (dedup_off, crashes),
    (gaps_accepted, crashes),
    (durable_to_always_zero, flips),
    (durable_to_too_high, crashes),
    (damage_always_taken_for_torn, flips),
    (cut_where_nothing_valid_follows, crashes),
    (quarantine_skipped, checks.torn_tail_is_quarantined),
    (torn_tail_not_cut, checks.torn_tail_is_cut),
    (recovered_not_rewritten, checks.recovered_after_failed_sync),
    (salt_ignored, checks.payload_cannot_pose_as_record),
    (segment_header_not_synced, crashes),
    (old_segment_not_synced_before_new, crashes),
    (retention_ignores_cursors, checks.retention_respects_cursors),
    (retention_ignores_cursors, crashes_with_retention),
    (retention_newest_first, crashes_with_retention),
    (cursor_not_synced, crashes),
    (readers_not_held_back, checks.readers_see_durable_only),
    (no_space_leaves_its_debris, crashes),
    (index_promises_too_little, crashes),
    (reader_skips_what_does_not_fit, flips),
]


@pytest.mark.parametrize(("sabotage", "check"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_sabotage_is_caught(
    sabotage: Callable[[Patch], None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES_MIN", 400)
    sabotage(monkeypatch)
    with pytest.raises((Broken, JournalError)):
        check()


def test_the_checks_pass_without_sabotage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES_MIN", 400)
    for check in checks.DIRECTED:
        check()
    checks.flips(step=97)
