"""The examples run, on files that are rotated and truncated, and with topics that are no file names."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import zmqbus

ROOT = Path(__file__).parents[1]
PATIENCE = 30.0
HOST = re.sub(r"[^\w-]+", "_", socket.gethostname())

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start an example; what still runs at the end is ended."""
    started: list[subprocess.Popen[str]] = []

    def run(name: str, *args: object, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / name), *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and what it said, when it is ended with Ctrl-C."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    return process.returncode, err


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def append(path: Path, text: str) -> bool:
    with path.open("a") as file:
        file.write(text)
    return True


class Shipped:
    """A shipper of one file on the bus that examples are on, and what comes of it."""

    def __init__(self, node: zmqbus.Node, start: Start, path: Path) -> None:
        self.topic = f"logs.{HOST}.{path.stem}"
        self.process = start("ship_logs.py", path)
        self._lines = node.subscribe(self.topic)
        until(lambda: any(peer.name == f"{HOST}-{path.stem}" for peer in node.peers()))

    def settle(self, path: Path) -> None:
        """Until it has found its place in the file, and ships what comes."""
        until(lambda: append(path, "probe\n") and self._lines.get(0.1) is not None)

    def next(self) -> object:
        """The next line that is no probe."""
        while True:
            message = self._lines.get(PATIENCE)
            assert message is not None
            if message.value != "probe":
                return message.value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / f"test-{secrets.token_hex(6)}.log"


def test_a_log_is_shipped_through_rotation_and_truncation(start: Start, path: Path) -> None:
    path.write_text("old\n")
    with zmqbus.Node("reader") as node:
        shipped = Shipped(node, start, path)
        shipped.settle(path)
        with path.open("a") as log:
            log.write("one\nhal")
            log.flush()
            assert shipped.next() == "one"
            time.sleep(0.5)
            log.write("f\ncaf\n")
        assert [shipped.next(), shipped.next()] == ["half", "caf"]

        path.rename(path.with_suffix(".log.1"))
        time.sleep(0.5)  # it is not there for a while
        assert shipped.process.poll() is None
        with path.with_suffix(".log.1").open("a") as log:
            log.write("to the old one\n")
        path.write_text("to the new one\n")
        assert [shipped.next(), shipped.next()] == ["to the old one", "to the new one"]

        path.write_text("after-truncate, and longer than before\n")  # the same file, from its beginning
        assert shipped.next() == "after-truncate, and longer than before"
        path.write_text("x\n")
        assert shipped.next() == "x"
        assert interrupted(shipped.process) == (0, "")


def test_a_log_is_awaited(start: Start, path: Path) -> None:
    with zmqbus.Node("reader") as node:
        shipped = Shipped(node, start, path)
        time.sleep(0.5)
        path.write_text("first\n")
        assert shipped.next() == "first"


def test_lines_are_collected_by_topic(start: Start, tmp_path: Path) -> None:
    mark = secrets.token_hex(6)
    folder = tmp_path / "logs"
    with zmqbus.Node("web") as node:
        aggregator = start("aggregate_logs.py", folder)
        until(lambda: any(peer.name == "aggregator" and peer.pid == aggregator.pid for peer in node.peers()))
        node.wait_for_subscribers(f"logs.{mark}.a/b", 1, PATIENCE)
        long = f"logs.{mark}.{'é' * 100}"
        for topic in (f"logs.{mark}.a/b", f"logs.{mark}.plain", long):
            node.publish(topic, "one")
            node.publish(topic, "two")
        expected = [f"logs.{mark}.a%2Fb.log", f"logs.{mark}.plain.log"]
        until(
            lambda: all((folder / name).exists() and (folder / name).read_text() == "one\ntwo\n" for name in expected)
        )
        for i in range(300):
            node.publish(f"logs.{mark}.many.{i}", i)
        until(lambda: (folder / f"logs.{mark}.many.299.log").exists())
        assert len(os.listdir(f"/proc/{aggregator.pid}/fd")) < 64 + 64
        assert aggregator.poll() is None
        code, err = interrupted(aggregator)
    assert code == 0
    assert re.fullmatch(r"\d+ repaired, 0 lost\n", err)
    assert len(list(folder.glob(f"logs.{mark}.many.*.log"))) == 300


def test_workers_index_each_line_whoever_is_killed(start: Start, tmp_path: Path) -> None:
    topic = f"logs.{secrets.token_hex(6)}"
    database = sqlite3.connect(tmp_path / "index.db", timeout=60)
    with zmqbus.Node("web") as node:
        workers = [start("index_logs.py", tmp_path / "index.db") for _ in range(3)]
        pids = {worker.pid for worker in workers}
        until(lambda: pids <= {pid for pid, _ in joined(node)})

        def indexed() -> int:
            return int(database.execute("select count(*) from lines where topic = ?", [topic]).fetchone()[0])

        for number in range(3000):
            node.publish(topic, f"line {number}")
            if number == 1000:
                until(lambda: indexed() > 0)
                workers[0].kill()
        until(lambda: indexed() == 3000)
        found = database.execute("select line from lines where topic = ? order by seq", [topic]).fetchall()
        assert found == [(f"line {number}",) for number in range(3000)]
        done = [interrupted(worker) for worker in workers[1:]]
    database.close()
    assert [code for code, _ in done] == [0, 0]
    counts = [int(said.split()[0]) for _, said in done]
    assert min(counts) > 0
    assert 1990 <= sum(counts) <= 3000


def joined(node: zmqbus.Node) -> set[tuple[int, int]]:
    """Process and number of each worker that a node knows."""
    pids = {peer.origin: peer.pid for peer in node.peers()}
    return {(pids[origin], number) for origin, number in list(node._engine.jobs._desk.workers) if origin in pids}
