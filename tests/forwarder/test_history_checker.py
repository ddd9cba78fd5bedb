"""The checker itself: clean histories pass, and each way of spoiling one is found under its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from history import (
    Acked,
    Committed,
    Consumed,
    Event,
    Failed,
    HistoryError,
    Journaled,
    Opened,
    Recorder,
    Sent,
    digest,
    load,
    merge,
    parse,
)
from history_checker import Broken, Kind, check
from history_generator import Bus, NotApplicable
from hypothesis import given
from hypothesis import strategies as st
from msgspec.json import encode
from msgspec.structs import replace


def acked(bus: Bus) -> set[tuple[str, int, int]]:
    lines = [event for _, event in bus.lines if isinstance(event, Acked)]
    return {(e.topic, e.origin, seq) for e in lines for seq in range(e.first or e.seq, e.seq + 1)}


def identity(event: Journaled | Consumed) -> tuple[str, int, int]:
    return event.topic, event.origin, event.seq


# --- ways to spoil a history -----------------------------------------------------------------------------


def acked_is_not_stored(bus: Bus) -> None:
    known = acked(bus)
    del bus.lines[bus.pick(Journaled, lambda e: identity(e) in known)]


def journal_ends_too_early(bus: Bus) -> None:
    """The tail of the log is gone, with somebody's acked message in it."""
    known = acked(bus)
    first = bus.lines[bus.pick(Journaled, lambda e: identity(e) in known)][1].offset
    bus.lines = [line for line in bus.lines if not (isinstance(line[1], Journaled) and line[1].offset >= first)]


def shown_before_it_was_stored(bus: Bus) -> None:
    seen = {e.offset for _, e in bus.lines if isinstance(e, Consumed)}
    del bus.lines[bus.pick(Journaled, lambda e: e.offset in seen)]


def not_delivered(bus: Bus) -> None:
    """Passed over, once and for all; something later was delivered."""
    reach: dict[str, int] = {}
    for _, event in bus.lines:
        if isinstance(event, (Consumed, Committed)):
            last = event.offset if isinstance(event, Consumed) else event.offset - 1
            reach[event.consumer] = max(reach.get(event.consumer, 0), last)
    gone = bus.lines[bus.pick(Consumed, lambda e: e.offset < reach[e.consumer])][1]
    bus.lines = [
        line
        for line in bus.lines
        if not (isinstance(line[1], Consumed) and (line[1].consumer, line[1].offset) == (gone.consumer, gone.offset))
    ]


def cursor_passes_what_was_not_delivered(bus: Bus) -> None:
    """A commit is confirmed for more than was handed out."""
    place = bus.pick(Opened, lambda e: e.patterns == [">"])
    consumer = bus.lines[place][1].consumer
    given = [e.offset for _, e in bus.lines if isinstance(e, Consumed) and e.consumer == consumer]
    end = sum(isinstance(e, Journaled) for _, e in bus.lines)
    if max(given, default=bus.lines[place][1].start - 1) + 1 >= end:
        raise NotApplicable
    last = max(n for n, (_, e) in enumerate(bus.lines) if isinstance(e, Opened) and e.consumer == consumer)
    bus.lines.append((bus.lines[last][0], Committed(consumer, end)))


def stored_but_never_sent(bus: Bus) -> None:
    place = bus.pick(Journaled)
    bus.lines = [
        line
        for n, line in enumerate(bus.lines)
        if not (isinstance(line[1], Sent) and identity(line[1]) == identity(bus.lines[place][1]))
    ]


def stored_with_another_value(bus: Bus) -> None:
    bus.change(bus.pick(Journaled), value=digest(b"something else"))


def stored_under_another_topic(bus: Bus) -> None:
    bus.change(bus.pick(Journaled), topic="logs.elsewhere")


def consumed_with_another_value(bus: Bus) -> None:
    bus.change(bus.pick(Consumed), value=digest(b"something else"))


def consumed_but_never_sent(bus: Bus) -> None:
    bus.change(bus.pick(Consumed), seq=1000)


def given_what_was_not_asked_for(bus: Bus) -> None:
    narrow = {e.consumer for _, e in bus.lines if isinstance(e, Opened) and e.patterns == ["logs.*"]}
    place = bus.pick(Consumed, lambda e: e.consumer in narrow)
    other = bus.lines[bus.pick(Journaled, lambda e: e.topic == "metrics.cpu")][1]
    bus.change(place, offset=other.offset, topic=other.topic, origin=other.origin, seq=other.seq, value=other.value)


def stored_twice(bus: Bus) -> None:
    """A retry was accepted."""
    message = bus.lines[bus.pick(Journaled)][1]
    end = sum(isinstance(e, Journaled) for _, e in bus.lines)
    bus.lines.append(("journal", replace(message, offset=end)))


def stored_in_another_order(bus: Bus) -> None:
    first = bus.pick(Journaled)
    one = bus.lines[first][1]
    second = bus.pick(Journaled, lambda e: e.seq > one.seq and (e.topic, e.origin) == (one.topic, one.origin))
    other = bus.lines[second][1]
    for n, (_, e) in enumerate(bus.lines):  # for everybody: the offsets stay consistent
        if isinstance(e, (Journaled, Consumed)) and e.offset in (one.offset, other.offset):
            now = other if e.offset == one.offset else one
            bus.change(n, seq=now.seq, value=now.value)


def delivered_in_another_order(bus: Bus) -> None:
    given: dict[str, list[int]] = {}
    for n, (_, e) in enumerate(bus.lines):
        if isinstance(e, Consumed) and all(bus.lines[m][1].offset != e.offset for m in given.get(e.consumer, [])):
            given.setdefault(e.consumer, []).append(n)
    pairs = [
        (a, b)
        for places in given.values()
        for a, b in pairwise(places)
        if identity(bus.lines[a][1])[:2] == identity(bus.lines[b][1])[:2]
    ]
    if not pairs:
        raise NotApplicable
    a, b = bus.rng.choice(pairs)
    (file_a, one), (file_b, other) = bus.lines[a], bus.lines[b]
    bus.lines[a], bus.lines[b] = (file_a, other), (file_b, one)


def consumer_saw_another_message_at_an_offset(bus: Bus) -> None:
    place = bus.pick(Consumed)
    there = bus.lines[place][1].offset
    other = bus.lines[bus.pick(Journaled, lambda e: e.offset != there)][1]
    bus.change(place, topic=other.topic, origin=other.origin, seq=other.seq, value=other.value)


def offset_of_a_lost_tail_given_out_again(bus: Bus) -> None:
    """What a consumer saw at the end of the log was replaced by something else after a crash."""
    place = bus.pick(Journaled)
    offset = bus.lines[place][1].offset
    if not any(isinstance(e, Consumed) and e.offset == offset for _, e in bus.lines):
        raise NotApplicable
    bus.lines.insert(0, ("publisher of another time", Sent("logs.new", 5, 1, digest(b"new"))))
    bus.change(place + 1, topic="logs.new", origin=5, seq=1, value=digest(b"new"))


def two_messages_stored_at_one_offset(bus: Bus) -> None:
    place = bus.pick(Journaled, lambda e: e.offset > 0)
    bus.change(place, offset=bus.lines[place][1].offset - 1)


def given_again_after_a_commit(bus: Bus) -> None:
    cursors: dict[str, int] = {}
    places = []
    for n, (_, e) in enumerate(bus.lines):
        if isinstance(e, Committed):
            cursors[e.consumer] = max(cursors.get(e.consumer, 0), e.offset)
        elif isinstance(e, Opened) and any(
            isinstance(c, Consumed) and c.consumer == e.consumer and c.offset < cursors.get(e.consumer, 0)
            for _, c in bus.lines[:n]
        ):
            places.append((n, cursors[e.consumer]))
    if not places:
        raise NotApplicable
    place, cursor = bus.rng.choice(places)
    file, opened = bus.lines[place]
    old = [
        c
        for _, c in bus.lines[:place]
        if isinstance(c, Consumed) and c.consumer == opened.consumer and c.offset < cursor
    ]
    bus.lines.insert(place + 1, (file, replace(bus.rng.choice(old))))


def one_missing_in_the_middle(bus: Bus) -> None:
    last = {e[:2]: e[2] for e in sorted(identity(e) for _, e in bus.lines if isinstance(e, Journaled))}
    place = bus.pick(Journaled, lambda e: 1 < e.seq < last[e.topic, e.origin])
    gone = identity(bus.lines[place][1])
    bus.lines = [
        line
        for n, line in enumerate(bus.lines)
        if n != place and not (isinstance(line[1], Consumed) and identity(line[1]) == gone)
    ]


def acked_but_never_sent(bus: Bus) -> None:
    place = bus.pick(Acked)
    file, event = bus.lines[place]
    bus.lines.insert(place + 1, (file, replace(event, seq=9999, first=None)))


def cursor_beyond_the_end(bus: Bus) -> None:
    place = bus.pick(Committed)
    file, event = bus.lines[place]
    bus.lines.insert(place + 1, (file, replace(event, offset=1 << 40)))


CORRUPTIONS: list[tuple[Callable[[Bus], None], Kind]] = [
    (acked_is_not_stored, Kind.LOST),
    (journal_ends_too_early, Kind.LOST),
    (shown_before_it_was_stored, Kind.LOST),
    (not_delivered, Kind.LOST),
    (cursor_passes_what_was_not_delivered, Kind.LOST),
    (stored_but_never_sent, Kind.UNEXPECTED),
    (stored_with_another_value, Kind.UNEXPECTED),
    (stored_under_another_topic, Kind.UNEXPECTED),
    (consumed_with_another_value, Kind.UNEXPECTED),
    (consumed_but_never_sent, Kind.UNEXPECTED),
    (given_what_was_not_asked_for, Kind.UNEXPECTED),
    (stored_twice, Kind.DUPLICATED),
    (stored_in_another_order, Kind.OUT_OF_ORDER),
    (delivered_in_another_order, Kind.OUT_OF_ORDER),
    (consumer_saw_another_message_at_an_offset, Kind.OFFSET_REUSED),
    (offset_of_a_lost_tail_given_out_again, Kind.OFFSET_REUSED),
    (two_messages_stored_at_one_offset, Kind.OFFSET_REUSED),
    (given_again_after_a_commit, Kind.REDELIVERED),
    (one_missing_in_the_middle, Kind.HOLE),
    (acked_but_never_sent, Kind.INVENTED_ACK),
    (cursor_beyond_the_end, Kind.INVENTED_ACK),
]
ALONE = {
    not_delivered, stored_with_another_value, consumed_with_another_value, stored_twice, given_again_after_a_commit,
}  # fmt: skip


@given(st.integers(0, 1 << 64))
def test_clean_histories_pass(seed: int) -> None:
    Bus(seed).verdict().raise_if_broken()


def test_the_histories_are_worth_checking() -> None:
    """Everything that is allowed happens in them; else it would prove little that they pass."""
    total = sum((Bus(seed).verdict().counts for seed in range(40)), start=type(Bus(0).verdict().counts)())
    assert {"sent", "acked", "failed", "journaled", "opened", "consumed", "committed", "killed"} <= set(total)
    assert total["redeliveries"] > 100
    assert total["sent"] > total["journaled"] > 1000
    assert total["opened"] > 100


@pytest.mark.parametrize(("spoil", "kind"), CORRUPTIONS, ids=lambda case: getattr(case, "__name__", ""))
def test_corruption_is_found_and_named(spoil: Callable[[Bus], None], kind: Kind) -> None:
    spoilt = 0
    for seed in range(60):
        bus = Bus(seed)
        try:
            spoil(bus)
        except NotApplicable:
            continue
        spoilt += 1
        report = bus.verdict()
        assert kind in report.kinds, f"seed {seed}: {report}"
        if spoil in ALONE:
            assert report.kinds == {kind}, f"seed {seed}: {report}"
        with pytest.raises(Broken, match=kind):
            report.raise_if_broken()
    assert spoilt >= 10, "too few histories could be spoilt in this way"


def test_every_kind_has_a_corruption() -> None:
    assert {kind for _, kind in CORRUPTIONS} == set(Kind)


def test_what_is_allowed() -> None:
    """The fine print, one case each."""
    bus = Bus(0, steps=0)
    bus.publishers, value = [], digest(b"v")
    bus.lines = [
        ("p", Sent("t", 1, 1, value)),
        ("p", Sent("t", 1, 2, value)),  # never stored, never acked
        ("p", Failed("t", 1, 2, 1)),  # and the first is stored all the same
        ("c", Opened("c")),
        ("c", Consumed("c", 0, "t", 1, 1, value)),
        ("c", Committed("c", 1)),
        ("c", Consumed("c", 0, "t", 1, 1, value)),  # a commit that was confirmed in the same session
        ("d", Opened("d", start=1)),
        ("d", Committed("d", 1)),  # never wanted offset 0
        ("j", Journaled(0, "t", 1, 1, value)),
    ]
    assert bus.verdict().violations == []
    bus.lines[6:6] = [("c", Opened("c"))]
    assert bus.verdict().kinds == {Kind.REDELIVERED}


# --- the files -------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 64), st.data())
def test_torn_last_lines_never_make_a_clean_history_look_broken(seed: int, data: st.DataObject) -> None:
    """A process is killed in the middle of a line: its file is cut anywhere in the last one it wrote."""
    bus = Bus(seed, steps=60)
    files = bus.files()
    for file in sorted(set(files) - {"journal", "test"}):
        last = files[file].rstrip(b"\n").rpartition(b"\n")[0]
        torn = data.draw(st.integers(0, 1)) and last
        if torn and isinstance(parse(files[file])[-1].event, (Acked, Committed, Failed)):
            cut = data.draw(st.integers(len(last) + 1, len(files[file]) - 1))
            files[file] = files[file][:cut]
    check(merge([parse(content, file) for file, content in files.items()])).raise_if_broken()


def test_a_torn_line_is_as_if_never_begun() -> None:
    whole = b"".join(encode(Sent("t", 1, seq, "v")) + b"\n" for seq in (1, 2))
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        assert [line.event.seq for line in parse(whole[:cut])] == [1]
    assert [line.event.seq for line in parse(whole)] == [1, 2]


def test_a_torn_ack_asks_for_less() -> None:
    lines = [Sent("t", 1, 1, "v"), Acked("t", 1, 1)]
    data = b"".join(encode(event) + b"\n" for event in lines)
    assert check(parse(data)).kinds == {Kind.LOST}
    assert check(parse(data[:-1])).violations == []


@pytest.mark.parametrize(
    "data",
    [
        b"{}\n",
        b'{"event":"sent"}\n',
        b"garbage\n" + encode(Sent("t", 1, 1, "v")) + b"\n",
        encode(Sent("t", 1, 1, "v"))[:20] + b"\n",  # torn, and then somebody went on writing
        encode(Sent("t", 1, 1, "v", time_ns=2)) + b"\n" + encode(Sent("t", 1, 2, "v", time_ns=1)) + b"\n",
    ],
)
def test_files_that_no_kill_leaves_behind(data: bytes) -> None:
    with pytest.raises(HistoryError, match=r"history:\d"):
        parse(data)


@pytest.mark.parametrize(
    "events",
    [
        [Sent("t", 1, 1, "v"), Sent("t", 1, 1, "w")],
        [Consumed("c", 0, "t", 1, 1, "v")],
        [Committed("c", 0)],
        [Opened("c"), Opened("c", ["t"])],
        [Acked("t", 1, 1, first=2)],
    ],
)
def test_histories_that_are_the_fault_of_the_test(events: list[Event]) -> None:
    with pytest.raises(HistoryError):
        check(parse(b"".join(encode(event) + b"\n" for event in events)))


def test_recording(tmp_path: Path) -> None:
    clock = iter(range(100, 200))
    one, two = (Recorder(tmp_path / name, clock=lambda: next(clock)) for name in ("one", "two"))
    one.record(Sent("t", 1, 1, digest(b"x")))
    two.record(Opened("c"), Consumed("c", 0, "t", 1, 1, digest(b"x")))
    one.record(Acked("t", 1, 1))
    two.record(Journaled(0, "t", 1, 1, digest(b"x")))
    one.close()
    two.close()
    lines = load(tmp_path.iterdir())
    assert [str(line) for line in lines] == ["one:1", "two:1", "two:2", "one:2", "two:3"]
    assert [line.event.time_ns for line in lines] == [100, 101, 101, 102, 103]
    assert check(lines).violations == []
    with pytest.raises(FileExistsError):
        Recorder(tmp_path / "one")


def test_a_killed_recorder_loses_at_most_its_last_line(tmp_path: Path) -> None:
    """kill -9 in the middle of recording: what had been recorded is there, in whole lines."""
    program = (
        "import sys; from history import Recorder, Sent; recorder = Recorder(sys.argv[1])\n"
        "for seq in range(1, 1 << 40):\n"
        "    recorder.record(Sent('t', 1, seq, 'v' * 50)); print(seq)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}"}
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", program, str(tmp_path / "history")], stdout=subprocess.PIPE, env=environment
    )
    assert child.stdout is not None
    for _ in range(200):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    recorded = [int(line) for line in child.stdout.read().splitlines()[:-1]] or [200]
    child.stdout.close()
    child.wait(30)
    seqs = [line.event.seq for line in load([tmp_path / "history"])]
    assert seqs == list(range(1, len(seqs) + 1))
    assert len(seqs) >= recorded[-1]
