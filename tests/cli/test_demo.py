"""The demo: its account, what it ships, and the whole of it on real input."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cli.commands import Terminal, finish
from zmqbus.cli.demo import Account, Source, find_counters, find_logs, is_text, settle, sources
from zmqbus.cli.demo.crew import SPIKE_LINES, Seen, lines_of, spike
from zmqbus.errors import SetupError


def test_demo_accounts_for_every_line(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    files = [tmp_path / "web.log", tmp_path / "db.log"]
    for path in files:
        path.write_text("".join(f"{path.name}: line {i}\n" for i in range(500)))
    code, out, err = finish(
        start("demo", "--json", "--seconds", "1", "--rate", "4000", "--history", "50", *map(str, files))
    )
    assert code == 0, err
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


def test_demo_ships_counters_where_no_log_can_be_read(start: Callable[..., subprocess.Popen[str]]) -> None:
    """With an empty /var/log, in a mount namespace of its own."""
    alone = ["unshare", *(["--mount"] if os.geteuid() == 0 else ["--map-root-user", "--mount"])]
    if subprocess.run(
        [*alone, "mount", "-t", "tmpfs", "none", "/var/log"], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs permission to mount something over /var/log")
    script = 'mount -t tmpfs none /var/log && exec "$@"'
    demo = [sys.executable, "-m", "zmqbus", "demo", "--seconds", "1s", "--rate", "2000"]
    code, out, err = finish(start(command=[*alone, "sh", "-c", script, "sh", *demo]))
    assert code == 0, err
    assert "/proc/stat" in out
    assert "/var/log" not in out
    assert "Proved: " in out


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
