"""Forwarders for tests: on a thread of this process, or as a process that can be stopped and killed.

    with running(tmp_path / "j", bus=bus) as forwarder: ...          # forwarder.statistics(), forwarder.forwarder
    with ForwarderProcess(tmp_path / "j", bus=bus) as forwarder:     # .stop(), .go_on(), .kill(), .start()
        ...
    stored(tmp_path / "j")                                           # what is on disk, also meanwhile

Every wait has a bound. On leaving, nothing runs any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from zmqbus.forwarder import Forwarder
from zmqbus.journal import Reader
from zmqbus.journal.inspect import View
from zmqbus.net.adapter import run_main
from zmqbus.protocol.frames import ValueDecoder, decode_batches

T = TypeVar("T")
PATIENCE_S = 30.0  # no wait of a healthy test comes near it


class Stored(NamedTuple):
    """One message of a journal."""

    offset: int
    topic: str
    origin: int
    seq: int
    value: Any


def stored(path: Path, topic: str | None = None) -> list[Stored]:
    """What is on disk now, in order; of one topic, or of all."""
    reader = Reader(View(str(path)))
    found: list[Stored] = []
    decoder = ValueDecoder()
    while not reader.caught_up:
        for record in reader.read():
            parts = [bytes(record.frame)] + ([] if record.external is None else [bytes(record.external)])
            (batch,) = decode_batches(parts)
            values, _ = decoder.decode(batch)
            name = batch.topic.decode()
            found += (
                Stored(record.offset + i, name, batch.origin, batch.first + i, value) for i, value in enumerate(values)
            )
        assert not reader.dropped or reader.dropped[0][0] == 0, "retention takes the oldest, and nothing else is lost"
    reader.close()
    return [message for message in found if topic in (None, message.topic)]


def seqs(path: Path, topic: str, origin: int) -> list[int]:
    """The seqs of one stream that are on disk, in the order of the journal."""
    return [message.seq for message in stored(path, topic) if message.origin == origin]


class Running:
    """A forwarder on a thread and loop of its own."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.forwarder = Forwarder(path, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="forwarder", daemon=True)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Have it done on the forwarder's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def statistics(self) -> dict[str, Any]:
        """The forwarder's figures."""

        async def ask() -> dict[str, Any]:
            return self.forwarder.statistics()

        return self.call(ask())

    def open(self) -> None:
        self._thread.start()
        self.call(self.forwarder.open())

    def close(self) -> None:
        """Leave the bus, and let go of the journal. May be called twice."""
        if self._loop.is_closed():
            return
        try:
            self.call(self.forwarder.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE_S)
            self._loop.close()


@contextlib.contextmanager
def running(path: Path, **options: Any) -> Iterator[Running]:
    """A forwarder while the block runs."""
    forwarder = Running(path, **options)
    try:
        forwarder.open()
        yield forwarder
    finally:
        forwarder.close()


class ForwarderProcess:
    """A forwarder in a process of its own. After `kill`, `start` is the next one on the same journal."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.origin = 0
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Start it, and wait until it is on the bus."""
        argv = [sys.executable, __file__, str(self.path), json.dumps(self._options)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        self.origin = json.loads(self._answers.get(timeout=PATIENCE_S))["origin"]

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._answers.put(line)

    def statistics(self) -> dict[str, Any]:
        """The forwarder's figures."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write("statistics\n")
        self._process.stdin.flush()
        figures: dict[str, Any] = json.loads(self._answers.get(timeout=PATIENCE_S))
        return figures

    def stop(self) -> None:
        """Stop it in its tracks; done when the kernel says so."""
        self._signal(signal.SIGSTOP)
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/stat")
        while status.read_text().rpartition(")")[2].split()[0] != "T":
            pass

    def go_on(self) -> None:
        """After `stop`."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9, and reap it."""
        assert self._process is not None
        process, self._process = self._process, None
        process.kill()
        process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def close(self) -> None:
        """Have it leave the bus in good order."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(PATIENCE_S) == 0
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.kill()


async def _main(path: str, options: dict[str, Any]) -> None:
    """The process: answers each line of its input with its figures; the end of that is the end."""
    async with Forwarder(path, **options) as forwarder:
        print(json.dumps({"origin": forwarder.origin}), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(forwarder.statistics()), flush=True)


if __name__ == "__main__":
    run_main(_main(sys.argv[1], json.loads(sys.argv[2])))
