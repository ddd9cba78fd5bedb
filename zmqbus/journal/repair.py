"""For an operator at 3 a.m.: is a journal sound, and how to make it so again.

`verify` only reads, takes no lock, and may be run beside a working forwarder: what it is just writing is reported as
an unfinished tail. `repair` takes the lock. It never destroys: each file it replaces is copied to `quarantine/` first,
and every message it has to give up is declared lost, by offset, with a hole record.
Long work reports to `progress(done, total)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from itertools import chain

from zmqbus.errors import JournalCorrupt, JournalLocked, JournalUnavailable
from zmqbus.journal.index import index_identity, index_name
from zmqbus.journal.inspect import TRIES, Finding, Progress, check_journal
from zmqbus.journal.positions import CURSORS, Cursor, Streams, decode_cursors, encode_cursors, recover_cursor
from zmqbus.journal.records import (
    Batch,
    SegmentHeader,
    decode_segment_header,
    encode_record,
    encode_segment_header,
)
from zmqbus.journal.segment import (
    QUARANTINE,
    Scanner,
    Segment,
    find_headers,
    last_byte_written,
    load_segment,
    quarantine,
    read_snapshot,
    segment_name,
    segment_names,
)
from zmqbus.journal.storage import (
    META,
    Directory,
    Disk,
    Storage,
    encode_meta,
    in_use,
    os_errors,
    publish_file,
    read_file,
    read_meta,
    remove_file,
)

# --- verify --------------------------------------------------------------------------------------


def verify(path: str, storage: Storage | None = None, progress: Progress | None = None) -> Iterator[Finding]:
    """Check every byte that matters. Yields nothing for a sound journal. Does not stop at the first damage.

    Raises JournalUnavailable where there is no journal at all, JournalVersion, JournalFailed.
    """
    storage = storage or Disk()
    uuid: bytes | None = None
    cursors: dict[str, Cursor] = {}
    with os_errors("verify", path):
        names = check_journal(storage, path)
        try:
            uuid = read_meta(storage, path)
        except JournalCorrupt as error:
            yield finding_of(error)
        except FileNotFoundError:
            yield Finding("damage", f"{path}/{META}", 0, None, "the file is missing")
        if CURSORS in names:  # before the messages: no cursor passes what is not yet there
            for salvage, saved in salvage_cursors(storage, path, uuid):
                yield from salvage.findings
                cursors = saved
        names = segment_names(storage.list(path))
    end = None
    for number, name in enumerate(names):
        if progress is not None:
            progress(number, len(names))
        following = int(names[number + 1][:-4]) if number + 1 < len(names) else None
        with os_errors("verify", f"{path}/{name}"):
            try:
                salvage = Salvage(storage, path, name, uuid, following)
            except FileNotFoundError:
                if following is not None and name not in storage.list(path):
                    continue  # retention was quicker
                raise
        yield from salvage.findings
        end = salvage.next_offset
    if end is not None:
        yield from passed_beyond(path, cursors, end)
    if progress is not None:
        progress(1, 1)


def salvage_cursors(storage: Storage, path: str, uuid: bytes | None) -> Iterator[tuple[Salvage, dict[str, Cursor]]]:
    """The newest file of cursors, if there is any, and what could be saved of them. Older files are about to go."""
    folder = f"{path}/{CURSORS}"
    for left in reversed(range(TRIES)):
        names = segment_names(storage.list(folder))
        if not names:
            return
        try:
            salvage = Salvage(storage, folder, names[-1], uuid, None)
            cursors = dict(decode_cursors(salvage.snapshot or b""))
            for batch in salvage.batches():
                if isinstance(batch, Batch):
                    recover_cursor(cursors, batch)
        except FileNotFoundError:
            if not left:
                raise
            continue  # there is a newer one by now
        # Its offsets count commits, not messages.
        salvage.findings[:] = [finding._replace(offset=None, lost=0) for finding in salvage.findings]
        yield salvage, cursors
        return


def passed_beyond(path: str, cursors: dict[str, Cursor], end: int) -> Iterator[Finding]:
    """A finding if cursors stand beyond the end: what they have passed was on disk, and is gone without a trace."""
    name, cursor = max(cursors.items(), key=lambda item: item[1].offset, default=("", Cursor(0)))
    if cursor.offset > end:
        text = f"messages that cursor {name!r} has passed are gone (it is at {cursor.offset})"
        yield Finding("damage", f"{path}/{CURSORS}", 0, end, text, cursor.offset - end)


class Salvage:
    """Everything that is still good in one segment file, whatever state it is in. Reads it twice, changes nothing."""

    def __init__(self, storage: Storage, directory: str, name: str, uuid: bytes | None, following: int | None) -> None:
        self.storage = storage
        self.path = f"{directory}/{name}"
        self.findings: list[Finding] = []
        self.segment: Segment | None = None
        self.snapshot: bytes | None = None
        self.next_offset = self.base_offset = int(name[:-4])
        self._following = following
        try:
            self.segment = load_segment(storage, directory, name, uuid)
            self.segment.next_base = following
            self.snapshot = read_snapshot(storage, self.segment)
        except JournalCorrupt as error:
            self.findings.append(finding_of(error))
            if self.segment is None:
                self.segment = self._from_index(directory, name)
        for item in self.batches(self.findings):
            if self.segment is None and isinstance(item, int):
                self.findings[-1] = self.findings[-1]._replace(offset=self.base_offset, lost=item)
                if following is None:
                    text = f"{self.findings[-1].text}; how many messages it held is not known, at most so many"
                    self.findings[-1] = self.findings[-1]._replace(text=text)
                self.next_offset = self.base_offset + item

    def _from_index(self, directory: str, name: str) -> Segment | None:
        """A stand-in for a destroyed header: the index file repeats the salt, without which no record can be read."""
        with contextlib.suppress(OSError):
            data = read_file(self.storage, f"{directory}/{index_name(name)}")
            if (found := index_identity(data)) is not None and found.base_offset == self.base_offset:
                fd = self.storage.open(self.path)
                try:
                    segment = Segment(directory, name, found, self.storage.size(fd))
                finally:
                    self.storage.close(fd)
                segment.next_base = self._following
                return segment
        return None

    @property
    def damaged(self) -> bool:
        return any(finding.kind == "damage" for finding in self.findings)

    def batches(self, findings: list[Finding] | None = None) -> Iterator[Batch | int]:
        """The good batches in order, and for what lies destroyed between them the number of messages lost."""
        if self.segment is None:
            # Without the header there is no salt, and no record can be told from noise. No offset may be used twice:
            # a message takes a byte or more, so there were no more messages than bytes.
            end = self._following
            fd = self.storage.open(self.path)
            try:
                yield (end - self.base_offset) if end is not None else self.storage.size(fd)
            finally:
                self.storage.close(fd)
            return
        fd = self.storage.open(self.path)
        try:
            yield from self._batches(fd, self.segment, findings if findings is not None else [])
        finally:
            self.storage.close(fd)

    def _batches(self, fd: int, segment: Segment, findings: list[Finding]) -> Iterator[Batch | int]:
        scanner = Scanner.whole(self.storage, fd, segment, segment.file_bytes)
        salt, limit, following = segment.header.salt, segment.file_bytes, self._following
        while True:
            while (following is None or scanner.next_offset < following) and (batch := scanner.next()) is not None:
                yield batch
            bad, expected = scanner.position, scanner.next_offset
            self.next_offset = expected
            written = last_byte_written(self.storage, fd, bad, limit)
            if expected == following or (following is None and written == bad):
                return
            proof, lost_to, resumed = following is not None, following or expected, False
            for header in find_headers(self.storage, fd, salt, bad + 8, limit):
                proof = proof or header.durable_to > bad
                if not resumed:
                    lost_to = max(lost_to, header.next_offset)
                again = Scanner(self.storage, fd, salt, header.position, header.base_offset, limit)
                if not resumed and header.base_offset >= expected and (batch := again.next()) is not None:
                    scanner, lost_to, resumed = again, batch.offset, True
                if resumed and proof:
                    break
            if following is None:
                # A forwarder may have finished it while we looked: what is vouched for by now is read anew.
                anew = Scanner(self.storage, fd, salt, bad, expected, limit)
                if (good := anew.next()) is not None or anew.position > bad:
                    scanner = anew
                    if good is not None:
                        yield good
                    continue
            reason = scanner.bad if not resumed else "records are destroyed"
            if not proof:
                findings.append(Finding("torn", segment.path, bad, expected, "an unfinished tail, never acknowledged"))
                return
            text = reason or "the segment ends before its last message"
            findings.append(Finding("damage", segment.path, bad, expected, text, lost_to - expected))
            if lost_to > expected:
                yield lost_to - expected
            self.next_offset = lost_to
            if not resumed:
                return
            assert batch is not None
            yield batch


# --- repair --------------------------------------------------------------------------------------


def repair(
    path: str,
    storage: Storage | None = None,
    *,
    now_ns: int,
    progress: Progress | None = None,
    pretend: bool = False,
) -> Iterator[Finding]:
    """Make a damaged journal usable: keep every good record, declare the rest lost. Yields what was found and done;
    with `pretend` what would be done, and then it changes nothing and takes no lock.

    Torn tails are left to the next start, which knows what to do with them. May be interrupted anywhere, and be run
    again. Raises JournalLocked while the journal is in use.
    """
    storage = storage or Disk()
    with os_errors("repair", path):
        check_journal(storage, path)
        if not pretend and (holder := in_use(storage, path)) is not None:
            raise JournalLocked(path, holder or None)
        uuid = yield from _repair_meta(storage, path, pretend)
    directory = Directory(storage, path, uuid, -1) if pretend else Directory.acquire(storage, path, create=False)
    try:
        with os_errors("repair", path):
            yield from _repair_segments(directory, now_ns, progress, pretend)
    finally:
        directory.release()


def _repair_meta(storage: Storage, path: str, pretend: bool) -> Generator[Finding, None, bytes]:
    """The identity is in every segment's header too."""
    kept = ""
    try:
        return read_meta(storage, path)
    except FileNotFoundError:
        yield Finding("damage", f"{path}/{META}", 0, None, "the file is missing")
    except JournalCorrupt as error:
        yield finding_of(error)
        kept = f"; as it was: {path}/{QUARANTINE}/" if pretend else f"; as it was: {_keep(storage, path, META)}"
    uuids = set()
    for name in segment_names(storage.list(path)):
        with contextlib.suppress(JournalCorrupt):
            uuids.add(load_segment(storage, path, name, None).header.uuid)
    if len(uuids) != 1:
        raise JournalUnavailable(path, f"{META} is unusable and its segments name {len(uuids)} journals, not one")
    uuid = uuids.pop()
    if not pretend:
        publish_file(storage, path, META, [encode_meta(uuid)], durable=True)
    yield _done(pretend, f"{path}/{META}", f"written anew from the segments' headers{kept}")
    return uuid


def _repair_segments(directory: Directory, now_ns: int, progress: Progress | None, pretend: bool) -> Iterator[Finding]:
    storage, path = directory.storage, directory.path
    cursors: dict[str, Cursor] = {}
    if CURSORS in storage.list(path):
        cursors = yield from _repair_cursors(directory, now_ns, pretend)
    names = segment_names(storage.list(path))
    streams = Streams(path, 1 << 62)
    max_time_ns = 0
    for number, name in enumerate(names):
        if progress is not None:
            progress(number, len(names))
        following = int(names[number + 1][:-4]) if number + 1 < len(names) else None
        salvage = Salvage(storage, path, name, directory.uuid, following)
        if salvage.snapshot is not None and salvage.segment is not None:
            streams.known.clear()
            streams.restore(salvage.snapshot)
            max_time_ns = max(max_time_ns, salvage.segment.header.max_time_ns)
        if following is None:  # no offset may be used twice
            salvage.findings += passed_beyond(path, cursors, salvage.next_offset)
        beyond = sum(finding.lost for finding in salvage.findings if finding.path != salvage.path)
        if salvage.damaged:
            yield from salvage.findings
            if pretend:
                yield _done(pretend, salvage.path, f"{_REWRITTEN}; as it was: {path}/{QUARANTINE}/")
                continue
            created_ns = salvage.segment.header.created_ns if salvage.segment is not None else now_ns
            head = _encode_header(directory, salvage.base_offset, streams.snapshot(), created_ns, max_time_ns)
            kept = _keep(storage, path, name)
            publish_file(storage, path, name, _rewritten(head, salvage, beyond), durable=True)
            remove_file(storage, f"{path}/{index_name(name)}")
            yield _done(pretend, salvage.path, f"{_REWRITTEN}; as it was: {kept}")
            salvage = Salvage(storage, path, name, directory.uuid, following)
        if pretend:
            continue  # what is known of streams goes into headers only
        for batch in salvage.batches():
            if isinstance(batch, Batch):
                streams.recover(batch)
                max_time_ns = max(max_time_ns, batch.time_ns)
    if progress is not None:
        progress(len(names), len(names))


_REWRITTEN = "good records kept, the rest declared lost"


def _repair_cursors(directory: Directory, now_ns: int, pretend: bool) -> Generator[Finding, None, dict[str, Cursor]]:
    """Cursors whose last commits are destroyed stand further back: some messages will be delivered again."""
    storage, folder = directory.storage, f"{directory.path}/{CURSORS}"
    cursors: dict[str, Cursor] = {}
    for salvage, cursors in salvage_cursors(storage, directory.path, directory.uuid):
        if salvage.damaged:
            yield from salvage.findings
            kept = f"{folder}/{QUARANTINE}/"
            if not pretend:
                base_offset = salvage.next_offset + 1
                head = _encode_header(directory, base_offset, encode_cursors(cursors), now_ns, 0)
                kept = _keep(storage, folder, salvage.path.rpartition("/")[2])
                publish_file(storage, folder, segment_name(base_offset), [head], durable=True)
                remove_file(storage, salvage.path)
                storage.sync_directory(folder)
            yield _done(pretend, salvage.path, f"written anew with {len(cursors)} cursors; as it was: {kept}")
    return cursors


def _done(pretend: bool, path: str, text: str) -> Finding:
    return Finding("planned" if pretend else "repaired", path, 0, None, text)


def _encode_header(directory: Directory, base_offset: int, snapshot: bytes, created_ns: int, max_time_ns: int) -> bytes:
    return encode_segment_header(
        salt=int.from_bytes(directory.storage.random(4), "little"),
        uuid=directory.uuid,
        base_offset=base_offset,
        created_ns=created_ns,
        max_time_ns=max_time_ns,
        snapshot=snapshot,
    )


def _rewritten(head: bytes, salvage: Salvage, beyond: int) -> Iterator[bytes]:
    """A whole segment file from what could be saved. It is synced before it appears, so every record may say that
    all before it was on disk."""
    header = decode_segment_header(head)
    assert isinstance(header, SegmentHeader)
    yield head
    position, offset = len(head), salvage.base_offset
    for item in chain(salvage.batches(), [beyond] if beyond else []):
        if isinstance(item, int):
            item = Batch(offset, item, b"", 0, 0, 0, memoryview(b"\0"))
        record = encode_record(
            header.salt,
            topic=item.topic,
            base_offset=item.offset,
            count=item.count,
            durable_to=position,
            origin=item.origin,
            first_seq=item.first_seq,
            time_ns=item.time_ns,
            payload=(item.payload,) if item.external is None else (item.payload, item.external),
            external_bytes=0 if item.external is None else len(item.external),
        )
        yield record
        position += len(record)
        offset = item.next_offset


def _keep(storage: Storage, directory: str, name: str) -> str:
    fd = storage.open(f"{directory}/{name}")
    try:
        return quarantine(storage, directory, name, fd, 0, storage.size(fd))
    finally:
        storage.close(fd)


def finding_of(error: JournalCorrupt) -> Finding:
    """Damage as a finding."""
    return Finding("damage", error.path, error.position, error.offset, error.reason)
