"""`journal info`, `dump` and `export`: what is in there comes out, and nothing in there changes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.cli.commands import Terminal, finish, plain, run
from tests.cli.journal.journals import (
    BATCHES,
    MESSAGES,
    MINUTE_NS,
    ORIGIN,
    START_NS,
    add,
    damage_last,
    damage_records,
    external,
    flip,
    open_journal,
    owner_only,
    payload,
    segments,
    snapshot,
    tear,
)
from zmqbus.cli.journal import save
from zmqbus.cli.shell import bus
from zmqbus.journal import Cursor
from zmqbus.journal.repair import repair

Start = Callable[..., subprocess.Popen[str]]


def rows(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def offsets(*args: str) -> list[int]:
    code, out, _ = run("journal", "dump", *args, "--json")
    assert code == 0
    return [row["offset"] for row in rows(out)]


# --- info --------------------------------------------------------------------------------------


def test_info_for_people(path: Path) -> None:
    before = snapshot(path)
    code, out, err = run("journal", "info", f"{path}/")
    assert (code, err) == (0, "")
    assert snapshot(path) == before
    lines = dict(line.split(maxsplit=1) for line in out.split("\n\n")[0].splitlines())
    assert lines["journal"] == str(path)
    assert re.fullmatch(r"[0-9a-f]{32} \(format version 1\)", lines["identity"])
    assert re.search(r"^in use +no$", out, re.MULTILINE)
    assert lines["messages"] == f"{MESSAGES} (offsets 0 to {MESSAGES - 1})"
    assert re.search(rf"^next offset  {MESSAGES}$", out, re.MULTILINE)
    assert lines["times"] == "2026-07-31 03:00:00 +0000 to 2026-07-31 03:59:00 +0000"
    assert re.fullmatch(rf"{len(segments(path))}, \S+ KiB; \S+ \SiB free", lines["segments"])
    assert lines["streams"] == "3 on 3 topics"
    assert lines["quarantine"] == "0 files"
    assert re.search(r"^slow\\x1b\[31m +7 +113\nindexer +100 +20$", out, re.MULTILINE)  # the slowest first
    assert re.search(r"^logs\.web0 +1\nlogs\.web1 +1\nlogs\.web2 +1$", out, re.MULTILINE)


def test_info_for_programs(path: Path) -> None:
    code, out, _ = run("journal", "info", "--json", str(path))
    assert code == 0
    [row] = rows(out)
    assert (row["first_offset"], row["next_offset"], row["messages"], row["streams"]) == (0, MESSAGES, MESSAGES, 3)
    assert row["cursors"] == [
        {"name": "indexer", "offset": 100, "lag": 20},
        {"name": "slow\x1b[31m", "offset": 7, "lag": 113},
    ]
    assert row["topics"][0] == {"topic": "logs.web0", "streams": 1}
    assert (row["oldest"], row["newest"]) == ("2026-07-31T03:00:00.123457Z", "2026-07-31T03:59:00.123457Z")
    assert [one["path"] for one in row["segments"]] == [str(file) for file in segments(path)]
    assert row["bytes"] == sum(file.stat().st_size for file in segments(path))
    assert (row["in_use"], row["holder"], row["format"], row["tail"], row["damage"]) == (False, None, 1, None, None)


def test_info_beside_whoever_uses_it(path: Path) -> None:
    journal = open_journal(path)
    try:
        assert re.search(rf"^in use +by process {os.getpid()}$", run("journal", "info", str(path))[1], re.MULTILINE)
        [row] = rows(run("journal", "info", str(path), "--json")[1])
        assert (row["in_use"], row["holder"]) == (True, os.getpid())
        os.truncate(path / "LOCK", 0)
        assert "by another process" in run("journal", "info", str(path))[1]
    finally:
        journal.close(START_NS)
    assert not rows(run("journal", "info", str(path), "--json")[1])[0]["in_use"]


def test_info_of_an_empty_journal(tmp_path: Path) -> None:
    open_journal(tmp_path / "new").close(START_NS)
    code, out, _ = run("journal", "info", str(tmp_path / "new"))
    assert code == 0
    assert re.search(r"^messages +0$", out, re.MULTILINE)
    assert "times" not in out
    [row] = rows(run("journal", "info", str(tmp_path / "new"), "--json")[1])
    assert (row["oldest"], row["newest"], row["cursors"]) == (None, None, [])
    assert run("journal", "dump", str(tmp_path / "new")) == (
        0, "", "zmqbus: 0 messages shown: there is no message in it\n",
    )  # fmt: skip
    assert run("journal", "verify", str(tmp_path / "new"))[0] == 0


def test_info_names_quarantine_tail_and_damage(path: Path) -> None:
    damage_records(path)
    assert len(list(repair(str(path), now_ns=0))) == 5
    tear(path)
    code, out, _ = run("journal", "info", str(path))
    assert code == 0
    assert re.search(r"^quarantine +2 files$", out, re.MULTILINE)
    assert f"{path}/quarantine/{segments(path)[0].name}.0  " in out
    assert "unfinished: the next start puts it into quarantine" in out
    damage_last(path)
    code, out, err = run("journal", "info", str(path))
    assert code == 65
    assert f"damaged      {segments(path)[-1]} at byte " in out
    assert "journal verify" in err


def test_info_is_short_where_there_is_much(path: Path) -> None:
    journal = open_journal(path)
    for n in range(30):
        journal.append(b"more.%02d" % n, ORIGIN, 1, 1, START_NS, payload(1, [n], START_NS))
    journal.commit(START_NS)
    journal.commit_cursors({f"cursor{n:02}": Cursor(n) for n in range(30)})
    journal.close(START_NS)
    _, out, _ = run("journal", "info", str(path))
    assert "… and 12 more cursors (--json has all)" in out
    assert "… and 13 more topics (--json has all)" in out
    [row] = rows(run("journal", "info", str(path), "--json")[1])
    assert (len(row["cursors"]), len(row["topics"])) == (32, 33)


# --- dump --------------------------------------------------------------------------------------


def test_dump_for_people(path: Path) -> None:
    before = snapshot(path)
    code, out, err = run("journal", "dump", str(path), "-n", "3")
    assert (code, err) == (0, "zmqbus: 3 messages shown\n")
    text = "x" * 100
    assert out.splitlines() == [
        f'0  2026-07-31 03:00:00.123  logs.web0  0000000000abcdef#1  111 B  {{"n":0,"text":"{text}"}}',
        "1  2026-07-31 03:00:00.123  logs.web0  0000000000abcdef#2  7 B  line 0",
        f'2  2026-07-31 03:01:00.123  logs.web1  0000000000abcdef#1  111 B  {{"n":1,"text":"{text}"}}',
    ]
    assert snapshot(path) == before


def test_dump_for_programs(path: Path) -> None:
    add(path, b"other", payload(1, [b"\xff\x00"], START_NS, [{"trace": "\x1b"}]))
    code, out, _ = run("journal", "dump", str(path), "--json", "-q")
    assert code == 0
    assert out.isascii()
    messages = rows(out)
    assert [row["offset"] for row in messages] == list(range(MESSAGES + 1))
    assert messages[7] == {
        "offset": 7, "topic": "logs.web0", "seq": 4, "origin": "0000000000abcdef", "node": "",
        "time": "2026-07-31T03:03:00.123457Z", "size": 7, "headers": {}, "value": "line 3",
    }  # fmt: skip
    assert messages[-1]["value"] == {"$bytes": "/wA="}
    assert messages[-1]["headers"] == {"trace": "\x1b"}


def test_dump_of_large_values_and_in_hex(path: Path) -> None:
    large = bytes(range(256)) * 100
    add(path, b"large", external(1, START_NS), large)
    [row] = rows(run("journal", "dump", str(path), "large", "--json")[1])
    assert len(row["value"]["$bytes"]) == 4 * ((len(large) + 2) // 3)
    _, out, _ = run("journal", "dump", str(path), "large", "--hex")
    assert "  00000010  10 11 12 13" in out
    assert "more bytes" in out


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ((), range(MESSAGES)),
        (("--from", "7"), range(7, MESSAGES)),  # within a batch
        (("--from", "-3"), range(MESSAGES - 3, MESSAGES)),
        (("--from", "-1000"), range(MESSAGES)),
        (("--from", "7", "-n", "2"), range(7, 9)),
        (("logs.web1",), [n for n in range(MESSAGES) if n // 2 % 3 == 1]),
        (("logs.web1", "logs.web2", "-n", "5"), [2, 3, 4, 5, 8]),
        (("*.web0", "--from", "100"), [n for n in range(100, MESSAGES) if n // 2 % 3 == 0]),
        (("nothing.>",), []),
        (("--since", "2026-07-31T03:30Z"), range(60, MESSAGES)),
        (("--since", "2026-07-31 03:30:00"), range(60, MESSAGES)),  # the zone is UTC
        (("--since", "2026-07-31T05:30:01+02:00"), range(62, MESSAGES)),
        (("--until", "2026-07-31T03:01Z"), range(2)),
        (("--since", "@1785466860", "--until", "@1785466980"), range(2, 6)),
        (("--since", "-30m", "--until", "-90s"), range(60, 118)),
        (("--since", "now"), []),
        (("--since", "2026-07-31"), range(MESSAGES)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_dump_finds_what_was_asked_for(
    path: Path, args: tuple[str, ...], wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "time_ns", lambda: START_NS + BATCHES * MINUTE_NS)
    assert offsets(str(path), *args) == list(wanted)
    file = tmp_path / "export"
    code, _, err = run("journal", "export", str(path), *args, "-o", str(file))
    assert code == 0
    assert f"{len(list(wanted))} message" in err
    assert [row["offset"] for row in rows(file.read_text())] == list(wanted)


def test_times_are_looked_for_everywhere(path: Path) -> None:
    """A publisher whose clock was wrong, or whose batch came late: order is that of the journal."""
    late = START_NS + 5 * MINUTE_NS
    journal = open_journal(path)
    journal.append(b"late", ORIGIN, 1, 1, late, payload(1, ["late"], late))
    journal.commit(START_NS)
    journal.close(START_NS)
    assert offsets(str(path), "--since", "@1785467100", "--until", "@1785467160") == [10, 11, MESSAGES]


def test_what_there_is_not_is_explained(path: Path) -> None:
    code, out, err = run("journal", "dump", str(path), "--from", "500")
    assert (code, out) == (0, "")
    assert err == f"zmqbus: 0 messages shown: the last message is {MESSAGES - 1}\n"
    _, _, err = run("journal", "dump", str(path), "--since", "2030-01-01")
    assert err == f"zmqbus: 0 messages shown: nothing is as new as that; the last message is {MESSAGES - 1}\n"
    for file in segments(path)[:2]:
        file.unlink()
    first = int(segments(path)[0].stem)
    code, out, err = run("journal", "dump", str(path), "--json")
    assert (code, rows(out)[0]["offset"], len(err.splitlines())) == (0, first, 1)  # nothing was asked for that is gone
    code, out, err = run("journal", "dump", str(path), "--from", "5", "-n", "1")
    assert code == 0
    assert err.splitlines()[0].startswith(f"zmqbus: messages 5 to {first - 1} are no more: ")
    assert out.startswith(f"{first}  ")


def test_what_a_repair_declared_lost_is_named(path: Path) -> None:
    flip(segments(path)[0], 1000)
    [damage, _] = list(repair(str(path), now_ns=0))
    assert damage.offset is not None
    code, out, err = run("journal", "dump", str(path), "--json")
    assert code == 0
    lost = list(range(damage.offset, damage.offset + damage.lost))
    assert lost
    assert [row["offset"] for row in rows(out)] == [n for n in range(MESSAGES) if n not in lost]
    assert f"messages {lost[0]} to {lost[-1]} are no more" in err


def test_what_is_no_message_is_named_and_the_rest_shown(path: Path, tmp_path: Path) -> None:
    add(path, b"bad\x1b", b"junk")
    add(path, b"worse", payload(1, ["one", "two"], START_NS), count=1)
    add(path, b"good", payload(1, ["fine"], START_NS))
    code, out, err = run("journal", "dump", str(path), "--from", str(MESSAGES))
    assert code == 65
    assert out.endswith("  good  0000000000abcdef#1  5 B  fine\n")
    assert out.count("\n") == 1
    first, second, last = err.splitlines()
    assert first.startswith(rf"zmqbus: message {MESSAGES} on bad\x1b cannot be decoded: frame: ")
    assert second == f"zmqbus: message {MESSAGES + 1} on worse cannot be decoded: 2 messages where the journal counts 1"
    assert last == "zmqbus: 1 message shown"
    file = tmp_path / "out"
    code, _, err = run("journal", "export", str(path), "-o", str(file))
    assert code == 65
    assert len(rows(file.read_text())) == MESSAGES + 1


@pytest.mark.parametrize("damage", [damage_records, damage_last], ids=["in the middle", "in the last segment"])
def test_dump_and_export_end_at_damage_with_all_before_it(
    path: Path, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    damage(path)
    code, out, err = run("journal", "dump", str(path), "--json")
    assert code == 65
    good = [row["offset"] for row in rows(out)]
    assert good == list(range(len(good)))
    assert 0 < len(good) < MESSAGES
    shown, error = err.splitlines()
    assert shown == f"zmqbus: {len(good)} messages shown"
    assert f"(message offset {len(good)})" in error

    file = tmp_path / "out"
    code, _, err = run("journal", "export", str(path), "-o", str(file))
    assert code == 65
    assert f"zmqbus: {len(good)} messages before the damage: {file}.partial\n" in err
    assert not file.exists()
    assert len(rows(Path(f"{file}.partial").read_text())) == len(good)
    assert run("journal", "export", str(path), "-o", str(file), "-n", "1")[0] == 73
    assert run("journal", "export", str(path), "-o", str(file), "-n", "1", "--force")[0] == 0
    assert len(rows(file.read_text())) == 1


def test_dump_beside_whoever_writes(path: Path) -> None:
    journal = open_journal(path)
    try:
        assert len(offsets(str(path))) == MESSAGES
        journal.append(b"live", ORIGIN, 1, 1, START_NS, payload(1, ["new"], START_NS))
        journal.commit(START_NS)
        assert len(offsets(str(path))) == MESSAGES + 1
        assert run("journal", "verify", str(path))[0] == 0
    finally:
        journal.close(START_NS)


def test_dump_on_a_terminal(path: Path) -> None:
    with Terminal("journal", "dump", str(path), "-n", "1", columns=60, NO_COLOR="") as dump:
        code, shown = dump.end()
    assert code == 0
    assert "\x1b[36m  logs.web0\x1b[0m" in shown
    assert "    n: 0\n" in plain(shown)
    for command in ("info", "dump", "verify", "repair"):
        with Terminal("journal", command, str(path), NO_COLOR="1") as quiet:
            code, shown = quiet.end()
        assert code == 0
        assert "\x1b" not in shown


# --- whoever reads the output ------------------------------------------------------------------


@pytest.mark.parametrize("args", [("dump",), ("export", "-o", "-")], ids=lambda args: args[0])
def test_a_reader_that_leaves_or_a_full_disk(args: tuple[str, ...], start: Start, path: Path) -> None:
    for n in range(20):
        add(path, b"large", external(1 + n, START_NS), bytes(20_000), seq=1 + n)
    process = start("journal", *args, str(path), "--json" if args == ("dump",) else "-q")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert (process.wait(60), process.stderr.read()) == (141, "")
    with open("/dev/full", "w") as full:
        code, _, err = finish(start("journal", *args, str(path), "-q", stdout=full))
    assert code == 74
    assert err.splitlines()[-1] == "zmqbus: No space left on device"


@pytest.mark.parametrize("args", [("dump",), ("export", "-o", "-")], ids=lambda args: args[0])
def test_ctrl_c_while_nobody_reads(args: tuple[str, ...], start: Start, path: Path) -> None:
    for n in range(20):
        add(path, b"large", external(1 + n, START_NS), bytes(20_000), seq=1 + n)
    process = start("journal", *args, str(path), *(["--json"] if args == ("dump",) else []))
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["offset"] == 0
    process.send_signal(signal.SIGINT)
    process.wait(60)
    code, _, err = finish(process)
    assert code == 130
    assert re.fullmatch(r"zmqbus: [\d,]+ messages read, [\d,]+ (shown|exported)\n", err)


# --- export ------------------------------------------------------------------------------------


def test_export_as_json_is_what_dump_prints(path: Path, tmp_path: Path) -> None:
    before = snapshot(path)
    file = tmp_path / "out.ndjson"
    code, out, err = run("journal", "export", str(path), "-o", str(file))
    assert (code, out, err) == (0, "", f"zmqbus: {MESSAGES} messages exported to {file}\n")
    assert file.read_text() == run("journal", "dump", str(path), "--json")[1]
    assert owner_only(file)
    assert snapshot(path) == before
    code, out, err = run("journal", "export", str(path), "-o", "-", "-q")
    assert (code, out, err) == (0, file.read_text(), "")
    assert sorted(tmp_path.iterdir()) == [path, file]


def test_export_as_msgpack_is_exact(path: Path, tmp_path: Path) -> None:
    values: list[Any] = [b"\xff", {1: 2}, [None, 2**64 - 1], msgpack.Timestamp(5, 7), msgpack.ExtType(5, b"x"), 1.5]
    packed = b"\x96" + b"".join(msgpack.packb(value) for value in values)
    frame = payload(1, values[:0], START_NS)[:32]
    add(path, b"odd", frame[:4] + (6).to_bytes(4, "little") + frame[8:] + packed, count=6)
    add(path, b"large", external(1, START_NS), b"z" * 70_000)
    add(path, b"heads", payload(1, ["v"], START_NS, [{"a": b"\0"}]))
    file = tmp_path / "out.msgpack"
    assert run("journal", "export", str(path), "--format", "msgpack", "-o", str(file))[0] == 0
    unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=1 << 24)
    unpacker.feed(file.read_bytes())
    got = list(unpacker)
    assert [row["offset"] for row in got] == list(range(MESSAGES + 8))
    assert got[2] == {
        "offset": 2, "topic": "logs.web1", "seq": 1, "origin": "0000000000abcdef", "time_ns": START_NS + MINUTE_NS,
        "headers": {}, "value": {"n": 1, "text": "x" * 100},
    }  # fmt: skip
    assert [row["value"] for row in got[MESSAGES : MESSAGES + 6]] == values
    assert got[-2]["value"] == b"z" * 70_000
    assert got[-1]["headers"] == {"a": b"\0"}


def test_export_replaces_nothing_unless_forced(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("mine")
    code, out, err = run("journal", "export", str(path), "-o", str(file))
    assert (code, out) == (73, "")
    assert err == f"zmqbus: {file} is there already: name another file, or replace it with --force\n"
    assert file.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [path, file]
    assert run("journal", "export", str(path), "-o", str(file), "--force", "-n", "1")[0] == 0
    assert len(rows(file.read_text())) == 1
    assert sorted(tmp_path.iterdir()) == [path, file]


def test_a_file_that_appears_meanwhile_is_not_replaced(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out"
    encode = save._as_json

    def meddle(message: Any, batch: Any) -> bytes:
        file.write_text("mine")
        return encode(message, batch)

    monkeypatch.setattr(save, "_as_json", meddle)
    for links in (True, False):
        if not links:
            file.unlink()
            Path(f"{file}.partial").unlink()

            def refuse(*args: Any) -> None:
                raise PermissionError(1, "Operation not permitted")

            monkeypatch.setattr(save.os, "link", refuse)
        code, _, err = run("journal", "export", str(path), "-o", str(file))
        assert code == 73
        assert err.endswith(f"has appeared meanwhile: the export is in {file}.partial\n")
        assert file.read_text() == "mine"
        assert len(rows(Path(f"{file}.partial").read_text())) == MESSAGES
    monkeypatch.setattr(save, "_as_json", encode)
    file.unlink()
    Path(f"{file}.partial").unlink()
    assert run("journal", "export", str(path), "-o", str(file))[0] == 0  # where there are no links
    assert len(rows(file.read_text())) == MESSAGES
    assert not Path(f"{file}.partial").exists()


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "forced"])
def test_export_spares_what_is_no_file_and_the_journal(path: Path, tmp_path: Path, force: tuple[str, ...]) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "into").symlink_to(path)
    before = snapshot(path)
    for name, code, words in (
        (f"{tmp_path}", 73, "is a directory"),
        (f"{tmp_path}/fifo", 73, "no regular file"),
        (f"{tmp_path}/link", 73, "no regular file"),
        ("/dev/null", 73, "no regular file"),
        (f"{tmp_path}/missing/out", 73, "cannot be created: No such file"),
        (f"{path}/out", 2, "inside the journal"),
        (f"{path}/meta", 2, "inside the journal"),
        (f"{path}/cursors/out", 2, "inside the journal"),
        (f"{tmp_path}/into/out", 2, "inside the journal"),
        ("", 2, "names no file"),
        (f"{tmp_path}/x/", 2, "names no file"),
    ):
        got, out, err = run("journal", "export", str(path), "-o", name, *force)
        assert (got, out) == (code, ""), name
        assert words in err
        assert len(err.splitlines()) == 1
    assert snapshot(path) == before
    assert (tmp_path / "target").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(start: Start, path: Path, tmp_path: Path) -> None:
    """A limit of the file size stands for a full disk."""
    file = tmp_path / "out"
    command = ["sh", "-c", 'ulimit -f 4; exec "$0" -m zmqbus "$@"', os.sys.executable]
    code, _, err = finish(start("journal", "export", str(path), "-o", str(file), command=command))
    assert (code, err) == (74, f"zmqbus: {file}: File too large\n")
    assert list(tmp_path.iterdir()) == [path]


def test_an_export_that_is_stopped_leaves_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "_as_json", stop)
    assert run("journal", "export", str(path), "-o", str(tmp_path / "out"))[0] == 130
    assert list(tmp_path.iterdir()) == [path]


def test_msgpack_is_not_for_a_terminal(path: Path) -> None:
    with Terminal("journal", "export", str(path), "-o", "-", "--format", "msgpack") as export:
        code, shown = export.end()
    assert code == 2
    assert "msgpack is not for a terminal" in shown
