"""What reaches the kernel, in which order: nothing is acknowledged before its fdatasync and its names are on disk.

The program under strace is journal_writer.py, with threads, changes of segments and of the cursors' file. Then the
rules themselves are tried: on the same program with deliberate bugs, and on traces made by hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import journal_writer
import pytest
from history import Acked, Committed, Sent, parse
from journal_writer import SABOTAGES, cursor_mark, mark
from syscall_order import Call, Order, parse_trace, trace, verify

PROGRAM = Path(journal_writer.__file__)


class Acknowledgements:
    """The marks that the writer's history tells of. Its acks are cumulative: only what is new in them is asked for."""

    def __init__(self, history: Path) -> None:
        self._history = str(history)
        self._acked: dict[tuple[str, int], int] = {}

    def __call__(self, call: Call) -> Iterable[bytes]:
        if call.path != self._history or call.name != "write":
            return
        for line in parse(call.data):
            event = line.event
            if isinstance(event, Sent):  # an earlier life was told of what came before
                self._acked.setdefault((event.topic, event.origin), event.seq - 1)
            elif isinstance(event, Acked):
                stream = event.topic, event.origin
                for seq in range(self._acked[stream] + 1, event.seq + 1):
                    yield mark(event.topic, event.origin, seq)
                self._acked[stream] = max(self._acked[stream], event.seq)
            elif isinstance(event, Committed):
                yield cursor_mark(event.offset)


def run(folder: Path, *options: str) -> Order:
    history, journal = folder / "history.jsonl", folder / "journal"
    calls = trace(
        [sys.executable, str(PROGRAM), str(journal), str(history), *options],
        folder / "trace",
        {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    return verify(calls, journal=str(journal), told=Acknowledgements(history), finished=True)


def test_nothing_is_told_before_it_is_on_disk(tmp_path: Path) -> None:
    order = run(tmp_path, "--batches", "400")
    assert order.violations == []
    assert order.told > 500
    assert order.syncs > 100
    assert order.names > 40, "it should have changed segments and cursor files"


def test_recovery_of_a_torn_tail(tmp_path: Path) -> None:
    """A second life: what is torn is copied to quarantine, durably, before it is cut, and the log goes on."""
    run(tmp_path, "--batches", "60")
    segment = max((tmp_path / "journal").glob("*.zbj"))
    with segment.open("r+b") as file:
        file.seek(len(file.read().rstrip(b"\0")) + 100)  # the last record may well end in zeros
        file.write(b"torn off")
    (tmp_path / "history.jsonl").unlink()
    order = run(tmp_path, "--batches", "60", "--seed", "2")
    assert order.violations == []
    assert order.told > 60
    (kept,) = (tmp_path / "journal" / "quarantine").iterdir()
    assert kept.read_bytes().strip(b"\0") == b"torn off"


def test_retention(tmp_path: Path) -> None:
    order = run(tmp_path, "--batches", "400", "--age", "20")
    assert order.violations == []
    assert not (tmp_path / "journal" / ("0" * 20 + ".zbj")).exists(), "the first segments should be gone"


@pytest.mark.parametrize(
    ("sabotage", "rule"),
    [
        ("ack_before_sync", "told after durable"),
        ("names_not_synced", "told after durable"),
        ("names_not_synced", "name before records"),
        ("names_not_synced", "every name in the end"),
        ("new_file_not_synced", "contents before name"),
    ],
)
def test_deliberate_bugs_are_seen(sabotage: str, rule: str, runs: dict[str, Order]) -> None:
    assert any(violation.startswith(rule) for violation in runs[sabotage].violations), runs[sabotage]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Order]:
    return {name: run(tmp_path_factory.mktemp(name), "--batches", "60", "--sabotage", name) for name in SABOTAGES}


# --- by hand -----------------------------------------------------------------------------------------


def text(value: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in value.encode())


def made(*lines: str) -> list[Call]:
    """A trace from lines such as `1 write(3</j/a>, "<<m/1>>") = 7`: process 1, strings and paths in plain text."""
    out = []
    for line in lines:
        pid, _, rest = line.partition(" ")
        parts = rest.split('"')
        parts = [f'"{text(part)}"' if n % 2 else part for n, part in enumerate(parts)]
        rest = "".join(part if n % 2 else part.replace("<", "<\0").replace(">", "\0>") for n, part in enumerate(parts))
        pieces = rest.split("\0")
        plain = [text(piece) if piece.startswith("/") else piece for piece in pieces]
        out.append(f"{pid} 1.0 {''.join(plain)}")
    return parse_trace("\n".join(out))


def told(call: Call) -> list[bytes]:
    """On sockets, as a forwarder tells it."""
    return [call.data] if call.name == "sendto" else []


CREATE = [
    '1 openat(AT_FDCWD</>, "/j/1.zbj.tmp", O_RDWR|O_CREAT, 0600) = 3</j/1.zbj.tmp>',
    '1 pwritev2(3</j/1.zbj.tmp>, [{iov_base="head", iov_len=4}], 1, 0, 0) = 4',
    "1 fsync(3</j/1.zbj.tmp>) = 0",
    '1 rename("/j/1.zbj.tmp", "/j/1.zbj") = 0',
    "1 fsync(4</j>) = 0",
]
RECORD = '1 pwritev2(3</j/1.zbj>, [{iov_base="..<<a/1/1>>", iov_len=11}, {iov_base="tail", iov_len=4}], 2, 4, 0) = 15'
SYNC = "1 fdatasync(3</j/1.zbj>) = 0"
TELL = '1 sendto(9<socket:[7]>, "<<a/1/1>>", 9, 0, NULL, 0) = 9'


@pytest.mark.parametrize(
    ("lines", "rule"),
    [
        ([*CREATE, RECORD, SYNC, TELL], None),
        ([*CREATE, RECORD, TELL, SYNC], "told after durable"),
        ([*CREATE, SYNC, RECORD, TELL], "told after durable"),
        ([*CREATE, RECORD, TELL], "told after durable"),
        ([*CREATE, RECORD, SYNC.replace("= 0", "= -1 EIO (Input/output error)"), TELL], "told after durable"),
        ([*CREATE, RECORD.replace("= 15", "= 5"), SYNC, TELL], "told after durable"),
        ([*CREATE, RECORD, SYNC.replace("1.zbj", "2.zbj"), TELL], "told after durable"),
        # A sync that was under way when the record was written, or not over when it was told of.
        ([*CREATE, "2 fdatasync(3</j/1.zbj> <unfinished ...>", RECORD, "2 <... fdatasync resumed>) = 0", TELL],
         "told after durable"),
        ([*CREATE, RECORD, "2 fdatasync(3</j/1.zbj> <unfinished ...>", TELL, "2 <... fdatasync resumed>) = 0"],
         "told after durable"),
        ([*CREATE, RECORD, "2 fdatasync(3</j/1.zbj> <unfinished ...>", "2 <... fdatasync resumed>) = 0", TELL], None),
        ([*CREATE[:-1], RECORD, SYNC, CREATE[-1], TELL], "name before records"),
        ([*CREATE[:-1], RECORD, SYNC, TELL, CREATE[-1]], "told after durable"),
        ([*CREATE[:2], *CREATE[3:], RECORD, SYNC, TELL], "contents before name"),
        ([*CREATE[:3], '1 mkdir("/j/q", 0700) = 0', *CREATE[3:], '1 mkdir("/j/p", 0700) = 0'], "every name in the end"),
        (['1 mkdir("/j", 0700) = 0', *CREATE, RECORD, SYNC, TELL], "told after durable"),
        (['1 mkdir("/j", 0700) = 0', "1 fsync(4</>) = 0", *CREATE, RECORD, SYNC, TELL], None),
        (['1 unlink("/j/1.zbj") = 0', "1 fsync(4</j>) = 0", '1 unlink("/j/2.zbj") = 0', "1 fsync(4</j>) = 0"], None),
        (['1 unlink("/j/1.zbj") = 0', '1 unlink("/j/2.zbj") = 0', "1 fsync(4</j>) = 0"], "one removal at a time"),
        (['1 unlink("/j/1.zbj") = 0'], "every name in the end"),
        (['1 unlink("/j/1.idx") = 0', '1 unlink("/elsewhere/1.zbj") = 0'], None),
    ],
)  # fmt: skip
def test_the_rules(lines: list[str], rule: str | None) -> None:
    order = verify(made(*lines), journal="/j", told=told, finished=True)
    if rule is None:
        assert order.violations == []
    else:
        assert any(violation.startswith(rule) for violation in order.violations), order


def test_a_trace_that_was_cut_short_is_refused() -> None:
    with pytest.raises(ValueError, match="makes no sense"):
        parse_trace("rubbish")
    with pytest.raises(ValueError, match="cut a string"):
        parse_trace('1 1.0 write(1<\\x61>, "\\x61"..., 5) = 5')
