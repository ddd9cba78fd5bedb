"""What a forwarder does with a journal, on a real disk."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from checks import new_disk
from checks import start as start_on

from zmqbus.errors import JournalUnavailable, MessageTooLarge, NoSpace
from zmqbus.journal import Appended, Cursor, Head, Journal, Reader, Retention, StreamSeq, fetch, find_time, records

A, B = b"logs.a", b"logs.b"


@pytest.fixture
def opened(tmp_path: Path):
    journals: list[Journal] = []

    def start(**options) -> Journal:
        for journal in journals:
            journal.close(0)
        journals.clear()
        journals.append(Journal.open(str(tmp_path / "journal"), now_ns=0, segment_bytes=4096, **options))
        return journals[0]

    yield start
    for journal in journals:
        journal.close(0)


def read_all(journal: Journal, start: int = 0, accept=None, bytes_max: int = 1 << 20) -> list[tuple[bytes, int, int]]:
    reader = Reader(journal, start, accept)
    got = []
    while not reader.caught_up:
        got += [(batch.topic, batch.first_seq, batch.last_seq) for batch in reader.read(bytes_max)]
    reader.close()
    return got


def fill(journal: Journal, batches: int, topics: int = 3, first: int = 0) -> None:
    """`batches` batches of two messages, round robin over the topics, time = number of the batch."""
    for n in range(first, first + batches):
        topic = b"logs.%d" % (n % topics)
        assert journal.append(topic, 7, 1 + 2 * (n // topics), 2, n, b"h" * 32 + b"%d" % n) is Appended.ACCEPTED
        if n % 4 == 3:
            journal.commit(n)
    journal.commit(first + batches)


def test_judging(opened) -> None:
    journal = opened()
    assert journal.append(A, 1, 1, 3, 0, b"x") is Appended.ACCEPTED
    assert journal.append(A, 1, 1, 3, 0, b"x") is Appended.DUPLICATE
    assert journal.append(A, 1, 3, 1, 0, b"x") is Appended.DUPLICATE
    assert journal.append(A, 1, 3, 2, 0, b"x") is Appended.OVERLAP
    assert journal.append(A, 1, 5, 2, 0, b"x") is Appended.GAP
    assert journal.expected(A, 1) == 4
    assert journal.append(A, 2, 9, 1, 0, b"x") is Appended.GAP
    assert journal.head(A, 2) == Head(A, 2, 0, 0)
    assert journal.append(A, 1, 5, 2, 0, b"x", allow_gap=True) is Appended.ACCEPTED
    assert journal.append(A, 2, 9, 1, 0, b"x", allow_gap=True) is Appended.ACCEPTED
    assert journal.head(A, 1) == Head(A, 1, 6, 0)
    assert journal.commit(0).acked == [StreamSeq(A, 1, 6), StreamSeq(A, 2, 9)]
    assert journal.head(A, 1) == Head(A, 1, 6, 6)
    assert [head.origin for head in journal.heads()] == [1, 2]
    assert list(journal.heads(lambda topic: topic == B)) == []


def test_three_steps(opened) -> None:
    journal = opened()
    assert journal.write(0) is None
    journal.append(A, 1, 1, 1, 0, b"x")
    assert journal.buffered_bytes == 1
    first = journal.write(0)
    assert journal.buffered_bytes == 0
    with pytest.raises(RuntimeError, match="before sync"):
        journal.finish(first)
    journal.append(A, 1, 2, 1, 0, b"y")
    journal.append(B, 1, 1, 1, 0, b"z")
    second = journal.write(0)
    journal.sync(second)
    assert journal.durable_offset == 0
    commit = journal.finish(second)  # covers the first one too
    assert sorted(commit.acked) == [StreamSeq(A, 1, 2), StreamSeq(B, 1, 1)]
    assert commit.refused == []
    assert journal.durable_offset == 3


def test_verbatim_frames(opened) -> None:
    journal = opened()
    parts = [b"header" * 5, bytearray(b"pay"), memoryview(b"load")]
    journal.append(A, 1, 1, 1, 5, parts, b"second frame")
    journal.append(memoryview(A).tobytes(), 1, 2, 7, 6, b"one buffer")
    journal.commit(0)
    first, second = Reader(journal).read()
    assert bytes(first.frame) == A + b"\0" + b"".join(parts)
    assert bytes(first.external) == b"second frame"
    assert bytes(first.payload) == b"".join(parts)
    assert (first.offset, first.count, first.origin, first.time_ns) == (0, 1, 1, 5)
    assert bytes(second.frame) == A + b"\0one buffer"
    assert second.external is None
    assert (second.offset, second.next_offset, second.last_seq) == (1, 8, 8)


def test_impossible_batches_are_refused(opened, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = opened()
    for topic, origin, first, count, time in [
        (b"", 1, 1, 1, 0), (b"a\0b", 1, 1, 1, 0), (b"a" * 256, 1, 1, 1, 0), (A, -1, 1, 1, 0), (A, 1 << 64, 1, 1, 0),
        (A, 1, 1, 1 << 40, 0), (A, 1, 1, 1, -1), (A, 1, 1, 1, 1 << 64),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="can have"):
            journal.append(topic, origin, first, count, time, b"x")
    monkeypatch.setattr("zmqbus.journal.journal.PAYLOAD_BYTES_MAX", 100)
    with pytest.raises(MessageTooLarge):
        journal.append(A, 1, 1, 1, 0, bytes(101))
    assert journal.commit(0).acked == []
    assert journal.append(A, 1, 1, 1, 0, bytes(100)) is Appended.ACCEPTED


def test_a_record_larger_than_a_segment(opened) -> None:
    journal = opened()
    big = bytes(range(256)) * 400
    for seq in range(1, 4):
        journal.append(A, 1, seq, 1, 0, b"small")
        journal.append(B, 1, seq, 1, 0, big)
        journal.commit(0)
    journal = opened()
    batches = []
    reader = Reader(journal)
    while not reader.caught_up:
        batches += reader.read(1)
    assert [bytes(batch.payload) for batch in batches] == [b"small", big] * 3


@pytest.mark.parametrize("bytes_max", [1, 100, 1 << 20])
def test_reading(opened, bytes_max: int) -> None:
    journal = opened()
    fill(journal, 200)
    assert len(journal.segments) > 3
    everything = [(b"logs.%d" % (n % 3), 1 + 2 * (n // 3), 2 + 2 * (n // 3)) for n in range(200)]
    assert read_all(journal, bytes_max=bytes_max) == everything
    for start in (1, 2, 77, 399):
        assert read_all(journal, start, bytes_max=bytes_max) == everything[start // 2 :]
    assert read_all(journal, 400) == []
    assert read_all(journal, accept=lambda topic: topic == b"logs.1") == everything[1::3]
    assert read_all(journal, 77, lambda topic: topic == b"logs.1") == [e for e in everything[38:] if e[0] == b"logs.1"]
    assert read_all(journal, accept=lambda topic: False) == []


def test_following_the_tail(opened) -> None:
    journal = opened()
    reader = Reader(journal)
    got = []
    for n in range(120):
        journal.append(A, 1, n + 1, 1, n, b"x" * 50)
        assert reader.caught_up
        journal.commit(n)
        assert not reader.caught_up
        got += reader.read()
    assert [batch.offset for batch in got] == list(range(120))
    assert reader.offset == 120


def test_a_filter_passes_over_segments_without_a_match(opened) -> None:
    journal = opened()
    journal.append(B, 1, 1, 1, 0, b"needle")
    for n in range(100):
        journal.append(A, 1, n + 1, 1, n, b"x" * 200)
        journal.commit(n)
    journal.append(B, 1, 2, 1, 0, b"needle")
    journal.commit(0)
    for segment in journal.segments[1:-1]:
        Path(segment.path).write_bytes(b"")  # whoever reads one of them will notice
    assert read_all(journal, accept=lambda topic: topic == B) == [(B, 1, 1), (B, 2, 2)]


def test_indexes_are_rebuilt(opened, tmp_path: Path) -> None:
    journal = opened()
    fill(journal, 200)
    expected = read_all(journal, accept=lambda topic: topic == b"logs.1")
    indexes = sorted((tmp_path / "journal").glob("*.idx"))
    assert len(indexes) == len(journal.segments) - 1
    contents = [path.read_bytes() for path in indexes]
    for path, damage in zip(indexes, [b"", b"nonsense" * 20, contents[0]], strict=False):
        path.write_bytes(damage)
    indexes[-1].unlink()
    journal = opened()
    assert read_all(journal, accept=lambda topic: topic == b"logs.1") == expected
    assert [path.read_bytes() for path in indexes] == contents


def test_time(opened) -> None:
    journal = opened()
    fill(journal, 200)
    for journal in (journal, opened()):  # noqa: B020
        assert find_time(journal, 0) == 0
        for n in (1, 55, 120, 199):
            assert find_time(journal, n) == 2 * n
        assert find_time(journal, 200) == 400


def test_time_with_a_clock_that_runs_ahead(opened) -> None:
    """The first message that is not older: a publisher from the future can make a replay longer, never shorter."""
    journal = opened()
    for n in range(100):
        time_ns = 10_000 if n == 30 else n
        journal.append(A, 1, n + 1, 1, time_ns, b"x" * 100)
        journal.commit(n)
    assert find_time(journal, 20) == 20
    assert find_time(journal, 50) == 30
    assert find_time(journal, 20_000) == 100


def test_fetch(opened) -> None:
    journal = opened()
    fill(journal, 300)
    for journal in (journal, opened()):  # noqa: B020
        for first, last in [(1, 1), (1, 200), (57, 99), (150, 10_000), (200, 200)]:
            got = fetch(journal, b"logs.2", 7, first, last, 1 << 20)
            assert got[0].first_seq <= first <= got[0].last_seq
            assert got[-1].first_seq <= min(last, 200) <= got[-1].last_seq
            assert [batch.last_seq + 1 for batch in got[:-1]] == [batch.first_seq for batch in got[1:]]
            assert {(batch.topic, batch.origin) for batch in got} == {(b"logs.2", 7)}
        assert fetch(journal, b"logs.2", 7, 201, 300) == []
        assert fetch(journal, b"logs.2", 8, 1, 300) == []
        assert fetch(journal, b"nobody", 7, 1, 300) == []
        assert len(fetch(journal, b"logs.2", 7, 1, 300, bytes_max=1)) == 1


def test_fetch_across_a_gap(opened) -> None:
    journal = opened()
    journal.append(A, 1, 1, 1, 0, b"x")
    journal.append(A, 1, 10, 1, 0, b"x", allow_gap=True)
    journal.commit(0)
    assert [batch.first_seq for batch in fetch(journal, A, 1, 1, 10)] == [1, 10]
    assert [batch.first_seq for batch in fetch(journal, A, 1, 5, 7)] == []


def test_dedup_survives_restart_and_retention(opened) -> None:
    retention = Retention(bytes_max=16384)
    journal = opened(retention=retention)
    journal.append(B, 5, 1, 4, 0, b"once")
    fill(journal, 600)
    assert journal.first_offset > 0
    journal = opened(retention=retention)
    assert journal.head(B, 5) == Head(B, 5, 4, 4)
    assert journal.append(B, 5, 3, 2, 0, b"once") is Appended.DUPLICATE
    assert journal.append(B, 5, 5, 1, 0, b"next") is Appended.ACCEPTED


def test_forget(opened) -> None:
    journal = opened(streams_max=2)
    journal.append(A, 1, 1, 1, 0, b"x")
    journal.append(A, 2, 1, 1, 0, b"x")
    with pytest.raises(NoSpace):
        journal.append(A, 3, 1, 1, 0, b"x")
    assert not journal.forget(A, 1), "it is not on disk yet"
    journal.commit(0)
    assert journal.forget(A, 1)
    assert not journal.forget(A, 1)
    assert journal.append(A, 3, 1, 1, 0, b"x") is Appended.ACCEPTED
    assert read_all(journal)[0] == (A, 1, 1)


def test_cursors(opened) -> None:
    journal = opened()
    fill(journal, 10)
    with pytest.raises(ValueError, match="the journal ends at 20"):
        journal.commit_cursors({"a": Cursor(21)})
    with pytest.raises(ValueError, match="bad cursor name"):
        journal.commit_cursors({"": Cursor(1)})
    for n in range(200):  # changes its file several times
        journal.commit_cursors({"a": Cursor(n % 21, b"%d" % n), f"cursor {n % 7}": Cursor(n % 20)})
    journal.commit_cursors({"cursor 3": None, "never was": None})
    expected = dict(journal.cursors.all())
    assert set(expected) == {"a", *(f"cursor {n}" for n in (0, 1, 2, 4, 5, 6))}
    assert opened().cursors.all() == expected


def test_retention_by_bytes_rejects_when_a_cursor_holds_on(opened) -> None:
    journal = opened(retention=Retention(bytes_max=16384))
    journal.append(A, 1, 1, 1, 0, b"x" * 300)
    journal.commit(0)
    journal.commit_cursors({"slow": Cursor(0)})
    refused, seq = [], 1
    while journal.full is None:
        seq += 1
        journal.append(A, 1, seq, 1, seq, b"x" * 300)
        commit = journal.commit(seq)
        refused += commit.refused
    assert refused == [StreamSeq(A, 1, seq)]
    assert journal.head(A, 1) == Head(A, 1, seq - 1, seq - 1)
    assert journal.bytes_used <= 16384
    with pytest.raises(NoSpace, match="its limit is 16,384 bytes"):
        journal.append(A, 1, seq, 1, 0, b"x")
    assert journal.append(A, 1, 1, 1, 0, b"x") is Appended.DUPLICATE, "duplicates are acknowledged all the same"
    assert not journal.resume()
    assert len(read_all(journal)) == seq - 1
    journal.commit_cursors({"slow": Cursor(seq - 1)})
    journal.delete(journal.retire(0))
    assert journal.resume()
    assert journal.append(A, 1, seq, 1, 0, b"x") is Appended.ACCEPTED
    assert journal.commit(0).acked == [StreamSeq(A, 1, seq)]


def test_retention_drop_oldest_tells_readers(opened) -> None:
    journal = opened(retention=Retention(bytes_max=16384, drop_oldest=True))
    journal.append(A, 1, 1, 1, 0, b"x" * 300)
    journal.commit(0)
    journal.commit_cursors({"slow": Cursor(0)})
    late, early = Reader(journal), Reader(journal)
    assert early.read(1)[0].offset == 0
    for seq in range(2, 200):
        journal.append(A, 1, seq, 1, seq, b"x" * 300)
        journal.commit(seq)
    assert journal.full is None
    assert late.read()[0].offset == journal.first_offset
    assert late.dropped == [(0, journal.first_offset - 1)]
    offsets = [batch.offset for batch in early.read()]  # its segment is deleted, but open
    assert offsets[0] == 1
    assert early.dropped == [(early.dropped[0][0], journal.first_offset - 1)]


def test_drop_oldest_makes_room_on_a_full_disk() -> None:
    disk = new_disk()
    disk.bytes_max = 30_000
    journal = start_on(disk, retention=Retention(drop_oldest=True))
    seq = acked = dropped = 0
    while acked < 300:
        if journal.full is not None:
            victims = journal.retire(seq)
            journal.delete(victims)
            dropped += len(victims)
            assert journal.resume()
        seq = journal.expected(A, 1)
        assert journal.append(A, 1, seq, 1, seq, b"x" * 300) is Appended.ACCEPTED
        acked = max([acked, *(head.seq for head in journal.commit(seq).acked)])
    assert dropped > 5
    assert [first for _, first, _ in read_all(journal)] == list(range(journal.first_offset + 1, 301))


def test_retention_by_age(opened) -> None:
    journal = opened(retention=Retention(age_max_ns=100))
    for seq in range(1, 100):
        journal.append(A, 1, seq, 1, 0, b"x" * 300)
        journal.commit(seq)
    assert journal.first_offset == 0
    kept = [segment.header.created_ns for segment in journal.segments]
    journal.delete(journal.retire(150))
    assert [segment.header.created_ns for segment in journal.segments[1:]] == [ns for ns in kept if ns >= 50]
    assert read_all(journal)[0][1] == journal.first_offset + 1


def test_writing_reading_and_syncing_side_by_side(opened) -> None:
    """Three threads as documented: the loop appends, a worker syncs, a reader follows."""
    journal = opened()
    total, got, errors, news = 1000, [], [], threading.Event()

    def follow() -> None:
        reader = Reader(journal)
        try:
            while len(got) < total:
                news.wait(0.01)
                news.clear()
                got.extend(batch.offset for batch in reader.read(500))
        except Exception as error:
            errors.append(error)

    follower = threading.Thread(target=follow)
    follower.start()
    seq = 0
    while journal.durable_offset < total and not errors:
        ticket = journal.write(seq)
        worker = threading.Thread(target=journal.sync, args=(ticket,)) if ticket is not None else None
        if worker is not None:
            worker.start()
        for _ in range(min(50, total - seq)):
            seq += 1
            journal.append(b"logs.%d" % (seq % 5), seq % 5, (seq - 1) // 5 + 1, 1, seq, b"x" * (seq % 300))
        if ticket is not None:
            worker.join()
            journal.finish(ticket)
            news.set()
    follower.join()
    assert errors == []
    assert got == list(range(total))


def test_closed(opened) -> None:
    journal = opened()
    journal.append(A, 1, 1, 1, 0, b"x")
    journal.close(0)
    for call in (lambda: journal.append(A, 1, 2, 1, 0, b"x"), lambda: journal.write(0), lambda: journal.resume()):
        with pytest.raises(JournalUnavailable, match="closed"):
            call()
    journal = opened()
    assert journal.head(A, 1).durable == 1


def test_checkpoint_is_written_once(opened) -> None:
    journal = opened()
    assert journal.checkpoint(0) is None
    journal.append(A, 1, 1, 1, 0, b"x")
    assert journal.checkpoint(0) is None
    journal.commit(0)
    ticket = journal.checkpoint(0)
    journal.sync(ticket)
    assert journal.finish(ticket).acked == []
    assert journal.checkpoint(0) is None
    assert journal.durable_offset == 1
    journal.append(A, 1, 2, 1, 0, b"y")
    journal.commit(0)
    assert read_all(journal) == [(A, 1, 1), (A, 2, 2)]
    assert records.RECORD_HEADER_BYTES == 64
