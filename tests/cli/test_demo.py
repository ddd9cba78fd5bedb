"""The demo: its account, what it ships, and the whole of it on real input."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cli.commands import PATIENCE, Terminal, finish
from zmqbus.cli.demo.account import Account, Seqs, by_stream, consumed, count, done, settle, settle_stored
from zmqbus.cli.demo.members import SPIKE_LINES, Seen, lines_of, spike
from zmqbus.cli.demo.sources import Source, find_counters, find_logs, is_text, sources
from zmqbus.errors import SetupError
from zmqbus.journal.inspect import View

Start = Callable[..., subprocess.Popen[str]]
WHOLE = 3 * PATIENCE  # for the whole of a demo


def files_in(folder: Path) -> list[str]:
    """Two log files."""
    paths = [folder / "web.log", folder / "db.log"]
    for path in paths:
        path.write_text("".join(f"{path.name}: line {i}\n" for i in range(500)))
    return [str(path) for path in paths]


# --- the whole of it -----------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_demo_accounts_for_every_line(tmp_path: Path, start: Start) -> None:
    """And keeps the journal, if asked to: what it says of that is held against the files themselves."""
    kept = tmp_path / "journal"
    args = ["--json", "--seconds", "1", "--rate", "4000", "--history", "50", "--journal", str(kept)]
    with tempfile.TemporaryDirectory() as scratch:  # not too deep down for the name of a socket
        code, out, err = finish(start("demo", *args, *files_in(tmp_path), env=os.environ | {"TMPDIR": scratch}), WHOLE)
        assert code == 0, err
        assert os.listdir(scratch) == []
    account = json.loads(out)
    assert (account["files"], account["exit"]) == (2, 0)
    steady, paused, late = account["aggregators"]
    assert [one["name"] for one in (steady, paused, late)] == ["steady", "paused", "late"]
    for one in (steady, paused, late):
        assert one["received"] + one["lost"] == one["sent"]
        assert one["unreported"] == 0
    assert steady["sent"] == paused["sent"] == account["lines"] > 250_000
    assert 100 <= late["sent"] < account["lines"]
    assert "all have found each other by mDNS" in err
    journal, consumer = account["journal"], account["consumer"]
    for one in (journal, consumer):
        assert (one["sent"], one["received"]) == (account["lines"], account["lines"])
        assert (one["lost"], one["unreported"]) == (0, 0)
    assert (journal["redelivered"], consumer["name"]) == (0, "indexer")
    streams = account["streams"]
    assert sum(one["published"] for one in streams) == account["lines"]
    assert all(one["published"] == one["journaled"] == one["consumed"] > 0 for one in streams)
    assert sum(one["redelivered"] for one in streams) == consumer["redelivered"]
    workers, shares = account["workers"], account["shares"]
    [shared] = [one for one in streams if one["done"] is not None]
    assert shared["done"] == shared["published"] == workers["sent"] == workers["received"] > 250_000
    assert (workers["lost"], workers["unreported"]) == (0, 0)
    assert [(one["name"], one["killed"]) for one in shares] == [("doomed", True), ("quick", False), ("slow", False)]
    assert workers["redelivered"] > 0  # it was killed with some in hand
    done = {one["name"]: one["done"] for one in shares}
    assert workers["sent"] <= sum(done.values()) <= workers["sent"] + workers["redelivered"]
    assert 0 < done["slow"] < done["doomed"] < done["quick"]
    for words in (
        "`indexer` is killed",
        "the forwarder is killed",
        "the forwarder is back",
        "`indexer` is back",
        "`doomed` is killed",
        "all is done",
    ):
        assert words in err
    view = View(str(kept))
    assert view.durable_offset == account["journal_end"] == account["lines"]
    assert view.cursors["indexer"].offset == account["cursor"] == account["lines"]
    assert {f"{head.origin:016x}": head.accepted for head in view.streams.heads(None)} == {
        one["origin"]: one["published"] for one in streams
    }


@pytest.mark.timeout(300)
def test_demo_ships_counters_where_no_log_can_be_read(start: Callable[..., subprocess.Popen[str]]) -> None:
    """With an empty /var/log, in a mount namespace of its own."""
    alone = ["unshare", *(["--mount"] if os.geteuid() == 0 else ["--map-root-user", "--mount"])]
    if subprocess.run(
        [*alone, "mount", "-t", "tmpfs", "none", "/var/log"], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs permission to mount something over /var/log")
    script = 'mount -t tmpfs none /var/log && exec "$@"'
    demo = [sys.executable, "-m", "zmqbus", "demo", "--seconds", "1s", "--rate", "2000"]
    code, out, err = finish(start(command=[*alone, "sh", "-c", script, "sh", *demo]), WHOLE)
    assert code == 0, err
    assert "/proc/stat" in out
    assert "/var/log" not in out
    assert "Proved: published = journaled = consumed, on each of " in out


SABOTAGE = {
    "on the way to the consumer": """
from zmqbus.node.faces.subscription import LogSubscription
get = LogSubscription.get
def careless(self, timeout=None):
    message = get(self, timeout)
    if message is not None and message.offset == 5000:  # this one, in whichever life it comes
        message = get(self, timeout)
    return message
LogSubscription.get = careless
""",
    "on the way to the disk": """
from zmqbus.journal.journal import Appended, Journal
append, seen = Journal.append, []
def careless(self, topic, origin, first_seq, count, *rest, **options):
    stream = self.known.get((topic, origin))
    seen.append(None)
    if stream is not None and len(seen) > 100 and first_seq == stream.accepted + 1 and not hasattr(Journal, "done"):
        Journal.done = True
        stream.accepted += count
        return Appended.ACCEPTED
    return append(self, topic, origin, first_seq, count, *rest, **options)
Journal.append = careless
""",
    "on the way to a worker": """
from zmqbus.node.faces.worker import Worker
get = Worker.get
def careless(self, timeout=None):
    job = get(self, timeout)
    if job is not None and job.seq == 5000:  # whoever gets it, and however often
        job.ack()
        job = get(self, timeout)
    return job
Worker.get = careless
""",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("where", SABOTAGE)
def test_demo_finds_out_a_loss_without_a_word(tmp_path: Path, start: Start, where: str) -> None:
    """In its processes messages vanish as if by a mistake of ours."""
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE[where])
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    args = ["--json", "--seconds", "1", "--rate", "4000"]
    code, out, err = finish(start("demo", *args, *files_in(tmp_path), env=environment), WHOLE)
    assert code == 4, err
    account = json.loads(out)
    assert account["exit"] == 4
    assert all(one["unreported"] == 0 for one in account["aggregators"])
    journal, consumer = account["journal"], account["consumer"]
    if where == "on the way to the consumer":
        assert (journal["received"], journal["unreported"]) == (account["lines"], 0)
        missing = account["lines"] - consumer["received"]
        assert missing == consumer["unreported"] == 1
        assert account["workers"]["unreported"] == 0
    elif where == "on the way to a worker":
        workers = account["workers"]
        assert workers["sent"] - workers["received"] == workers["unreported"] == 1
        assert (journal["unreported"], consumer["unreported"]) == (0, 0)
    else:
        missing = account["lines"] - journal["received"]
        assert journal["unreported"] == missing > 0
        assert consumer["received"] == journal["received"]
        assert consumer["lost"] + consumer["unreported"] >= missing  # told of, if it came to where the stream jumps


def test_demo_says_what_is_wrong_with_the_journal(tmp_path: Path, start: Start) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = finish(start("demo", "--journal", str(tmp_path / "file"), *files_in(tmp_path)))
    assert (code, out) == (66, "")
    assert err.startswith(f"zmqbus: journal {tmp_path / 'file'}: ")
    assert len(err.splitlines()) == 1


# --- its parts -----------------------------------------------------------------------------------


def test_demo_counts_during_the_spike() -> None:
    """A shipper reports while it is busy, or its count would stand still on the screen."""
    reports: list[int] = []
    publisher: Any = SimpleNamespace(seq=0)

    def send(line: str) -> None:
        publisher.seq += 1

    publisher.send = send
    spike(publisher, iter(lambda: "line", None), lambda: reports.append(publisher.seq))
    assert len(reports) > 5
    assert reports == sorted(set(reports))
    assert publisher.seq == SPIKE_LINES


def test_demo_leaves_nobody_and_nothing_behind_on_ctrl_c(tmp_path: Path) -> None:
    with Terminal("demo", "--seconds", "10m", "/proc/stat", TMPDIR=str(tmp_path)) as demo:
        demo.until("lines per second")
        for words in ("shippers", "journaled", "consumed", "indexer"):  # the live counts
            demo.until(words)
        os.killpg(demo.process.pid, signal.SIGINT)  # as a terminal does
        demo.interrupt()
        code, _ = demo.end()  # when all have let go of the terminal
    assert code == 130
    assert list(tmp_path.iterdir()) == []


def test_demo_sees_what_is_missing() -> None:
    heads = {("t", 1): 100, ("u", 1): 10}
    whole = {("t", 1): 1, ("u", 1): 1}

    def account(streams: dict[Any, Any], gaps: list[Any], lost: int, starts: dict[Any, Any] = whole) -> Account:
        received = sum(received for _, received, _ in streams.values())
        facts = {"streams": streams, "gaps": gaps, "received": received, "repaired": 0, "lost": lost, "seconds": 1.0}
        return settle(SimpleNamespace(name="x", facts=facts), heads, starts)  # type: ignore[arg-type]

    everything = {("t", 1): (1, 100, 0), ("u", 1): (1, 10, 0)}
    assert account(everything, [], 0).unreported == 0
    assert account(everything | {("t", 1): (1, 97, 0)}, [("t", 1, 5, 7)], 3).unreported == 0
    assert account(everything | {("t", 1): (1, 97, 0)}, [], 0).unreported == 3  # silently
    assert account(everything | {("t", 1): (1, 97, 0)}, [("t", 1, 5, 6)], 2).unreported == 1
    assert account(everything | {("t", 1): (4, 97, 0)}, [], 0).unreported == 3  # its beginning
    assert account({("t", 1): (1, 100, 0)}, [], 0).unreported == 10  # a whole stream
    assert account(everything | {("u", 1): (1, 10, 2)}, [], 0).unreported == 2  # came twice
    assert account(everything | {("t", 1): (1, 99, 0), ("u", 1): (1, 11, 0)}, [], 0).unreported == 2
    assert account(everything | {("t", 1): (1, 90, 0)}, [("t", 1, 5, 7)], 10).unreported == 0  # ranges not all kept
    late = {("t", 1): (41, 60, 0), ("u", 1): (1, 10, 0)}
    assert account(late, [], 0, {("t", 1): 51, ("u", 1): 1}).unreported == 0
    assert account(late, [], 0, {("t", 1): 31, ("u", 1): 1}).unreported == 10


def test_demo_sees_what_is_missing_in_the_log() -> None:
    heads = {("t", 1): 100, ("u", 1): 10}

    def life(*spans: tuple[str, int, int]) -> dict[tuple[str, int], Seqs]:
        found: dict[tuple[str, int], Seqs] = {}
        for topic, first, last in spans:
            found.setdefault((topic, 1), Seqs()).note(first, last)
        return found

    def account(*lives: dict[tuple[str, int], Seqs], gaps: Any = (), lost: int = 0) -> tuple[int, int, int, int]:
        one = settle_stored("x", heads, lives, gaps, lost, 2.0)
        assert one.sent == 110
        return one.received, one.redelivered, one.lost, one.unreported

    whole = life(("t", 1, 60), ("u", 1, 10), ("t", 61, 100))
    assert account(whole) == (110, 0, 0, 0)
    assert account(life(("t", 1, 60), ("u", 1, 10)), life(("t", 51, 100))) == (110, 10, 0, 0)  # killed, and again
    assert account(life(("t", 1, 60), ("u", 1, 10)), life(("t", 62, 100))) == (109, 0, 0, 1)  # silently
    assert account(life(("t", 1, 60)), life(("t", 61, 100))) == (100, 0, 0, 10)  # a whole stream
    assert account(life(("t", 1, 90), ("u", 1, 10))) == (100, 0, 0, 10)  # its end
    assert account(life(("t", 3, 100), ("u", 1, 10))) == (108, 0, 0, 2)  # its beginning
    gap = ("t", 1, 61, 70)
    holed = life(("t", 1, 60), ("u", 1, 10), ("t", 71, 100))
    assert account(holed, gaps=[gap, gap], lost=10) == (100, 0, 10, 0)  # told, in both lives
    assert account(holed, gaps=[("t", 1, 61, 69)], lost=9) == (100, 0, 9, 1)
    assert account(holed, lost=10) == (100, 0, 10, 0)  # offsets that are no more: whose, is not known
    assert account(whole, gaps=[gap], lost=10) == (110, 0, 10, 10)  # told of a loss that there was not
    assert account(life(("t", 1, 60), ("t", 60, 60), ("t", 61, 100), ("u", 1, 10))) == (110, 0, 0, 1)  # twice in a life
    assert account(life(("t", 1, 101), ("u", 1, 10))) == (110, 0, 0, 1)  # one that was never sent
    assert count([life(("t", 5, 9)), life(("t", 1, 3)), life(("t", 2, 6))], ("t", 1), 100) == (9, 4, 0)
    [t, u] = by_stream(heads, whole, [life(("t", 1, 60)), life(("t", 51, 99))], [life(("t", 1, 5)), life(("t", 4, 9))])
    assert (t.published, t.journaled, t.consumed, t.redelivered, t.done) == (100, 100, 99, 10, 9)
    assert (u.published, u.journaled, u.consumed, u.redelivered, u.done) == (10, 10, 0, 0, None)


@pytest.mark.parametrize("cut", range(3))
def test_demo_does_not_count_what_was_cut_short(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "index"
    path.write_bytes(b"a.b ff 1\na.b ff 2\nc ff 1\na.b ff 31\n"[: -cut or None])
    found = consumed(path)
    assert found["a.b", 255].spans == ([[1, 2], [31, 31]] if not cut else [[1, 2]])
    assert found["c", 255].spans == [[1, 1]]


def test_demo_counts_what_workers_did_in_whatever_order(tmp_path: Path) -> None:
    path = tmp_path / "work"
    path.write_text("".join(f"t 1 {seq}\n" for seq in (5, 6, 9, 1, 2, 6, 10)) + "u 2 1\n")
    lives = done(path)
    assert [life["t", 1].spans for life in lives] == [[[5, 6], [9, 9]], [[1, 2], [6, 6], [10, 10]]]
    assert lives[0]["u", 2].spans == [[1, 1]]
    assert count(lives, ("t", 1), 10) == (6, 1, 0)
    path.write_text("")
    assert done(path) == []


def test_demo_notes_what_came_twice() -> None:
    seen = Seen(5)
    for seq in (5, 6, 6, 9, 8):
        seen.note(seq)
    assert (seen.first, seen.following, seen.received, seen.disorder) == (5, 10, 3, 2)


def test_demo_finds_logs(tmp_path: Path) -> None:
    (tmp_path / "apt").mkdir()
    texts = {"small.log": b"one\n", "apt/term.log": b"\xe2\x82\xac\n" * 3000, "messages": b"two\nthree\n"}
    others = {
        "wtmp": b"a\0b\n",
        "empty.log": b"",
        "latin": b"\xff\xfe\n",
        "old.gz": gzip.compress(b"old\n" * 100),
        "one-word": b"word",
    }
    for name, data in (texts | others).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link.log").symlink_to(tmp_path / "small.log")
    os.mkfifo(tmp_path / "fifo.log")
    found = find_logs(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["apt/term.log", "messages", "small.log"]
    assert not is_text(tmp_path / "nowhere")
    assert all(is_text(path) for path in find_counters())


def test_demo_makes_topics_of_file_names(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("sys log.log", "a/sys:log", "ünïcode.log", "...", "x" * 200)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("line\nline\n")
    found = sources(paths, "host.example")
    assert found[0] == Source(paths[0], 10, "2", "logs.host_example.sys_log")
    assert [one.topic.split(".")[-1] for one in found] == ["sys_log", "sys_log_2", "n_code", "file", "x" * 60]


def test_demo_repeats_short_files(tmp_path: Path) -> None:
    path = tmp_path / "short.log"
    path.write_bytes(b"a\r\nb\xff\n\nlast")
    lines = lines_of(path)
    assert [next(lines) for _ in range(6)] == ["a", "b\ufffd", "", "last", "a", "b\ufffd"]
    path.write_bytes(b"")
    with pytest.raises(SetupError, match="empty"):
        list(lines)
