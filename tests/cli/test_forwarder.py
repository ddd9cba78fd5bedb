"""`zmqbus forwarder`: real processes that are started, asked, killed, stopped, and given every kind of bad journal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import pytest

import zmqbus
from tests.cli.commands import PATIENCE, Terminal, finish, run
from zmqbus.cli.forwarder import running
from zmqbus.cli.forwarder.asking import Cursor, Figures
from zmqbus.cli.forwarder.forget import freed
from zmqbus.cli.forwarder.log import LINES_MAX, Log
from zmqbus.cli.shell.stopping import LEAVE_MAX
from zmqbus.errors import NotDurable
from zmqbus.journal.storage import encode_meta
from zmqbus.node.events import AsyncEventStream, Warned
from zmqbus.node.faces.asking import ask
from zmqbus.protocol import commands
from zmqbus.protocol.members.peers import DuplicateName, Peer, PeerJoined, PeerLeft
from zmqbus.protocol.streams.stream import Gap

Start = Callable[..., subprocess.Popen[str]]
WAIT = ("--wait", "300ms")


def begin(start: Start, *args: str, **options: object) -> tuple[subprocess.Popen[str], str]:
    """Start one; returns when it is up, with what it says first."""
    process = start("forwarder", *args, **options)
    return process, said(process, "inbox tcp://")


def said(process: subprocess.Popen[str], words: str) -> str:
    """The next line on its stderr with these words."""
    assert process.stderr is not None
    while words not in (line := process.stderr.readline()):
        assert line, f"it ended with {process.wait(PATIENCE)}, and did not say {words!r}"
    return line


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[int, str]:
    """Ask it to stop; exit code, and what it still says."""
    process.send_signal(number)
    code, out, err = finish(process)
    assert out == ""
    return code, err


@contextlib.contextmanager
def joined(bus: str) -> Iterator[tuple[zmqbus.Node, zmqbus.Peer]]:
    """A node, and the forwarder that it has met."""
    with zmqbus.Node("user", bus=bus) as node:
        deadline = time.monotonic() + PATIENCE
        while not (found := [peer for peer in node.peers() if peer.role == "forwarder"]):
            assert time.monotonic() < deadline
            node.wait_for_peers(1, PATIENCE)
        yield node, found[0]


def fill(node: zmqbus.Node) -> None:
    """Publish until the journal is full."""
    publish = partial(node.publish, "t", bytes(50_000), durable=True, timeout=PATIENCE)
    with pytest.raises(NotDurable, match="no room"):
        deque(iter(publish, 0), maxlen=0)


def hand_over(node: zmqbus.Node) -> None:
    """Until all that was published is on disk: there is room again, but the publisher may yet have to hear of it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            node.flush(PATIENCE)
            return
        except NotDurable:
            assert time.monotonic() < deadline
            select.select([], [], [], 0.02)


def status(*args: str) -> dict[str, object]:
    """Of the only forwarder, which a node has met that is there as well."""
    code, out, _ = run("forwarder", "status", "--json", *WAIT, *args, others=2)
    assert code == 0
    [row] = [json.loads(line) for line in out.splitlines()]
    return row


# --- its life ----------------------------------------------------------------------------------


def test_a_life(start: Start, bus: str, tmp_path: Path) -> None:
    """Started, used, asked, killed, started again, stopped."""
    journal = tmp_path / "journal"
    one, line = begin(start, "--journal", str(journal), "--topics", "logs.> a.b", "--topics", "c", "--max-bytes", "1G")
    assert re.fullmatch(
        rf"zmqbus: forwarder forwarder-\S+ on bus '{bus}' claims logs\.> a\.b c; journal {journal}: new, "
        r"64 MiB of 1 GiB in 1 segment; inbox tcp://127\.0\.0\.1:\d+, pub tcp://127\.0\.0\.1:\d+\n",
        line,
    )
    with joined(bus) as (node, peer):
        for i in range(20):
            node.publish("logs.web", i, durable=True, timeout=PATIENCE)
        node.publish("logs.db", "x", durable=True, timeout=PATIENCE)
        row = status()
        assert row["name"] == peer.name
        assert (row["pid"], row["claims"]) == (one.pid, ["logs.>", "a.b", "c"])
        assert (row["first_offset"], row["next_offset"], row["messages"], row["streams"]) == (0, 21, 21, 2)
        assert (row["bytes_max"], row["full"], row["cursors"], row["unacked"]) == (1 << 30, None, [], 0)
        assert row["bytes_in"] > 21 * 32  # type: ignore[operator]
        assert row["commits"] >= 21  # type: ignore[operator]
        assert row["messages_per_s"] > 0  # type: ignore[operator]
        assert 0 < row["fsync_p50_ms"] <= row["fsync_max_ms"]  # type: ignore[operator]
        assert 0 <= row["last_commit_s"] <= row["uptime_s"]  # type: ignore[operator]
        assert run("forwarder", "--status", "--json", *WAIT, peer.name, others=2)[0] == 0
        code, out, _ = run("nodes", *WAIT, others=2)
        assert re.search(r" forwarder .* logs\.> a\.b c$", out, re.MULTILINE)

    one.kill()
    assert one.wait(PATIENCE) == -signal.SIGKILL
    two, line = begin(start, "--journal", str(journal), "--name", "second")
    assert (
        f"forwarder second on bus '{bus}' claims >; journal {journal}: offsets 0 to 20 recovered, 64 MiB in 1" in line
    )
    with joined(bus) as (node, _):
        node.publish("logs.web", "y", durable=True, timeout=PATIENCE)
        assert (status()["messages"], status()["next_offset"]) == (1, 22)
    code, err = end(two)
    assert code == 0
    assert re.fullmatch(r"zmqbus: stopped after \S+; 1 message taken, next offset 22\n", err)
    three, line = begin(start, "--journal", str(journal))
    assert "offsets 0 to 21 recovered" in line
    assert end(three, signal.SIGINT)[0] == 0


def test_a_torn_end_is_told(start: Start, bus: str, tmp_path: Path) -> None:
    begin(start, "--journal", str(tmp_path))[0].kill()
    one, _ = begin(start, "--journal", str(tmp_path))
    with joined(bus) as (node, _):
        node.publish("t", "x", durable=True, timeout=PATIENCE)
    one.kill()
    one.wait(PATIENCE)
    [segment] = tmp_path.glob("*.zbj")
    data = bytearray(segment.read_bytes())
    at = data.rindex(b"zbr")
    data[at + 200 : at + 210] = b"unfinished"
    segment.write_bytes(data)
    two, line = begin(start, "--journal", str(tmp_path))
    assert f"a torn end, of which nobody was promised anything, is in {tmp_path}/quarantine/" in line
    assert end(two)[0] == 0


def test_what_goes_wrong_is_told() -> None:
    stream, lines = AsyncEventStream(lambda _: None), []
    peer = Peer(origin=1, name="web\x1b", inbox="tcp://127.0.0.1:1")
    for event in (
        PeerJoined(peer),
        Gap("t", 1, 3, 3),
        Gap("t", 2, 1, 2000),
        Warned("a\nb"),
        DuplicateName("x", (1, 2)),
        PeerLeft(peer, "x"),
    ):
        stream.put(event)
    stream.close()
    forwarder, log = SimpleNamespace(events=lambda: stream), SimpleNamespace(line=lines.append)

    async def pass_on() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(running._pass_on(forwarder, log), 0.1)  # type: ignore[arg-type]

    asyncio.run(pass_on())
    why = "neither their publisher nor another forwarder has them"
    assert lines == [
        rf"lost: 1 message on t from web\x1b, #3: {why}",
        f"lost: 2,000 messages on t from 0000000000000002, #1 to #2000: {why}",
        r"warning: a\nb",
        "warning: 2 nodes are named x: give each a name of its own (--name)",
    ]


def test_a_terminal_shows_how_it_is(bus: str, tmp_path: Path) -> None:
    with Terminal("forwarder", "--journal", str(tmp_path / "j"), columns=200) as terminal:
        terminal.until("0 readings; fsync")
        with joined(bus) as (node, _):
            node.publish("t", "x", durable=True, timeout=PATIENCE)
            terminal.until("next offset 1, ")
        terminal.interrupt()
        code, shown = terminal.end()
    assert code == 0
    assert re.search(r"\x1b\[Kzmqbus: stopped after \S+; 1 message taken, next offset 1\r\n$", shown)


SLOW = """
import asyncio
from zmqbus.forwarder import Forwarder
close = Forwarder.close
async def slowly(self, timeout=5.0):
    print("closing", flush=True)
    try:
        await asyncio.sleep(3600)
    finally:
        {hang}
        await close(self)
Forwarder.close = slowly
from zmqbus.cli import main
main()
"""


@pytest.mark.parametrize(("hang", "code"), [("pass", 0), ("await asyncio.sleep(3600)", 143)])
def test_a_second_signal_hurries(start: Start, tmp_path: Path, hang: str, code: int) -> None:
    """The drain is cut short, and what does not end then is ended."""
    program = (sys.executable, "-c", SLOW.format(hang=hang))
    process, _ = begin(start, "--journal", str(tmp_path / "j"), command=program)
    process.terminate()
    assert process.stdout is not None
    assert process.stdout.readline() == "closing\n"
    begun = time.monotonic()
    process.terminate()
    assert finish(process)[0] == code
    assert time.monotonic() - begun < LEAVE_MAX + 5


def test_stderr_that_nobody_reads_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        log = Log()
        log.line("x" * 100_000)  # more than a pipe holds
        while not select.select([reader], [], [], 0.1)[0]:
            pass
        for i in range(LINES_MAX + 500):
            log.line(str(i))
        taken = b""
        while b"left out" not in taken:
            taken += os.read(reader, 65536)
        log.close()
        monkeypatch.undo()
    os.close(reader)
    lines = taken.decode().splitlines()
    assert lines[0] == "zmqbus: " + "x" * 100_000
    assert lines[1 : LINES_MAX + 1] == [f"zmqbus: {i}" for i in range(LINES_MAX)]
    assert lines[-1] == "zmqbus: 500 more lines are left out: nobody read them in time"


# --- what is wrong with its journal ------------------------------------------------------------


def refused(start: Start, *args: str) -> tuple[int, str]:
    code, out, err = finish(start("forwarder", *args))
    assert out == ""
    assert err.startswith("zmqbus: ")
    assert len(err.splitlines()) == 1
    return code, err


def test_one_directory_one_forwarder(start: Start, tmp_path: Path) -> None:
    one, _ = begin(start, "--journal", str(tmp_path))
    code, err = refused(start, "--journal", str(tmp_path))
    assert (code, err) == (
        75,
        f"zmqbus: journal {tmp_path} is in use by process {one.pid}: stop it, or choose another directory\n",
    )
    assert end(one)[0] == 0


def test_a_directory_that_cannot_be_used(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (str(tmp_path / "file"), str(tmp_path / "file" / "j"), str(tmp_path), "/proc/self/zmqbus"):
        code, err = refused(start, "--journal", path)
        assert code == 66, err
        assert path in err


def test_a_newer_version(start: Start, tmp_path: Path) -> None:
    assert end(begin(start, "--journal", str(tmp_path))[0])[0] == 0
    text = encode_meta(bytes(16)).replace(b"journal 1\n", b"journal 99\n").rpartition(b"crc ")[0]
    (tmp_path / "meta").write_bytes(text + b"crc %08x\n" % crc32(text))
    code, err = refused(start, "--journal", str(tmp_path))
    assert code == 66
    assert "99" in err
    assert "upgrade zmqbus" in err


def test_damage(start: Start, bus: str, tmp_path: Path) -> None:
    one, _ = begin(start, "--journal", str(tmp_path))
    with joined(bus) as (node, _):
        for i in range(5):
            node.publish("t", f"message {i}", durable=True, timeout=PATIENCE)
    assert end(one)[0] == 0
    [segment] = tmp_path.glob("*.zbj")
    data = segment.read_bytes()
    assert data.count(b"message 1") == 1
    segment.write_bytes(data.replace(b"message 1", b"massage 1"))
    code, err = refused(start, "--journal", str(tmp_path))
    assert code == 65
    assert f"{segment} is damaged at byte " in err
    assert "(message offset 1)" in err
    assert "zmqbus journal verify" in err
    assert segment.read_bytes() == data.replace(b"message 1", b"massage 1")


BROKEN = """
import errno, os, sys
from zmqbus.journal.storage import Disk
def broken(self, fd):
    if os.path.exists({trigger!r}):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    os.fdatasync(fd)
assert Disk.fdatasync
Disk.fdatasync = broken
from zmqbus.cli import main
main()
"""


def test_a_disk_that_fails(start: Start, bus: str, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    program = (sys.executable, "-c", BROKEN.format(trigger=str(trigger)))
    one, _ = begin(start, "--journal", str(tmp_path / "j"), command=program)
    with joined(bus) as (node, _):
        node.publish("t", 1, durable=True, timeout=PATIENCE)
        trigger.touch()
        node.publish("t", 2)
        code, _, err = finish(one)
        assert code == 74
        assert re.fullmatch(
            r"zmqbus: \w+ of \S+\.zbj failed: Input/output error; check the disk, then start again\n", err
        )
        trigger.unlink()
        two, _ = begin(start, "--journal", str(tmp_path / "j"))
        node.flush(PATIENCE)
        assert status()["next_offset"] == 2  # once each, whatever had become of the second
    assert end(two)[0] == 0


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """2 MiB of tmpfs."""
    path = tmp_path / "tiny"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk(start: Start, bus: str, tiny_disk: Path) -> None:
    code, err = refused(start, "--journal", str(tiny_disk / "large"))
    assert (code, err.split(":")[1]) == (74, f" journal {tiny_disk}/large is full")

    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    one, _ = begin(start, "--journal", str(tiny_disk / "j"), "--max-bytes", "1M")
    with joined(bus) as (node, _):
        fill(node)
        assert "nothing more is accepted until there is room" in said(one, "warning")
        _, out, err = run("forwarder", "status", *WAIT, others=2)
        assert " FULL " in out
        assert "takes nothing at present: " in err
        kept = status()["next_offset"]
        ballast.unlink()
        assert "has room again" in said(one, "room again")
        hand_over(node)
        node.publish("t", "at last", durable=True, timeout=PATIENCE)
        assert status()["next_offset"] == kept + 2  # type: ignore[operator]  # the refused one as well
    assert end(one)[0] == 0


# --- cursors -----------------------------------------------------------------------------------


def test_cursors_hold_retention_and_are_forgotten(start: Start, bus: str, tmp_path: Path) -> None:
    one, _ = begin(start, "--journal", str(tmp_path / "j"), "--max-bytes", "1M", "--name", "keeper")
    with joined(bus) as (node, peer):
        node.publish("t", "first", durable=True, timeout=PATIENCE)
        reading = commands.Read(7, ["t"], 1 << 20, cursor="slow", offset=0)
        assert isinstance(ask(node, {peer.origin: reading}, PATIENCE)[peer.origin], commands.Log)
        assert status()["cursors"] == [{"name": "slow", "offset": 0, "lag": 1, "reading": True}]
        code, out, err = run("forwarder", "forget", "slow", "--yes", *WAIT, others=2)
        assert (code, out) == (1, "")
        assert err == "zmqbus: somebody reads as slow from keeper at present: stop that first\n"

    with joined(bus) as (node, peer):  # whoever read has gone
        fill(node)
        said(one, "nothing more is accepted")
        code, out, err = run("forwarder", "status", "keeper", *WAIT, others=2)
        assert code == 0
        last = status()["next_offset"]
        assert re.search(rf"^slow +keeper +0 +{last} +nobody$", out, re.MULTILINE)
        code, out, err = run("forwarder", "forget", "slow", *WAIT, others=2)
        assert code == 2
        assert re.fullmatch(
            rf"keeper: cursor slow is at offset 0, {last} messages behind; retention may then remove {last} messages "
            r"that only it holds \(offsets 0 to \d+\)\n",
            out,
        )
        assert err == "zmqbus: nothing was changed; to do it: zmqbus forwarder forget --yes slow\n"
        assert len(status()["cursors"]) == 1  # type: ignore[arg-type]

        code, _, err = run("forwarder", "forget", "quick", "--yes", *WAIT, others=2)
        assert (code, err) == (1, "zmqbus: no forwarder that answered has a cursor quick; there are: slow\n")
        code, _, err = run("forwarder", "forget", "slow", "--forwarder", "other", *WAIT, others=2)
        assert (code, err) == (3, f"zmqbus: no forwarder on bus '{bus}' is named other; there are: keeper\n")
        code, out, err = run("forwarder", "forget", "slow", "--yes", "--forwarder", "keeper", *WAIT, others=2)
        assert (code, err) == (0, "")
        assert out.endswith("\nkeeper: cursor slow is forgotten\n")
        said(one, "has room again")
        hand_over(node)
        node.publish("t", "again", durable=True, timeout=PATIENCE)
        assert status()["cursors"] == []
        assert status()["first_offset"] > 0  # type: ignore[operator]
    assert end(one)[0] == 0


def test_what_a_cursor_alone_holds() -> None:
    figures = Figures(journal_first_offset=10, journal_next_offset=100, journal_bytes_max=1)
    slow, quick, late = Cursor("slow", 20, False), Cursor("quick", 90, False), Cursor("late", 5, False)
    assert "remove 70 messages that only it holds (offsets 20 to 89)" in freed(figures, [slow, quick], slow)
    assert freed(figures, [slow, quick], quick) == "it holds nothing that another cursor does not hold as well"
    assert "remove 80 messages that only it holds (offsets 20 to 99)" in freed(figures, [slow], slow)
    assert "remove 10 messages that only it holds (offsets 10 to 19)" in freed(figures, [slow, quick, late], late)
    at_end = Cursor("end", 100, True)
    assert freed(figures, [at_end], at_end) == "it holds nothing back"
    everything = Figures(journal_next_offset=3)
    assert freed(everything, [Cursor("a", 2, False)] * 1, Cursor("a", 2, False)).startswith("it holds nothing")
    one = Cursor("a", 2, False)
    assert freed(everything, [one], one).endswith(
        "1 message that only it holds (offsets 2 to 2), but is told to keep everything"
    )


def test_nobody_is_there(bus: str) -> None:
    for args in (["status"], ["status", "--json"], ["--status"], ["forget", "x", "--yes"]):
        assert run("forwarder", *args, "--wait", "20ms") == (3, "", f"zmqbus: no forwarder is on bus '{bus}'\n")


def test_one_that_does_not_answer(start: Start, bus: str, tmp_path: Path) -> None:
    one, _ = begin(start, "--journal", str(tmp_path / "j"), "--name", "stuck")
    with joined(bus) as (node, peer):
        asking = start("forwarder", "status", "--wait", "2s", "--timeout", "1s", "--json")
        met = 0
        while met < 5:  # and what it has said to whoever asks has long been sent
            answer = ask(node, {peer.origin: commands.Stats()}, PATIENCE)[peer.origin]
            assert isinstance(answer, commands.Statistics)
            met += answer.counters["peers"] == 2
        one.send_signal(signal.SIGSTOP)  # it has met whoever asks, and says nothing more
        code, out, err = finish(asking)
        one.send_signal(signal.SIGCONT)
    assert (code, err) == (3, "zmqbus: stuck did not answer within 1 s\n")
    row = json.loads(out)
    assert (row["name"], row["answered"]) == ("stuck", False)
    assert end(one)[0] == 0
