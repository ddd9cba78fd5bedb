"""Forwarders for tests of nodes: `Hosted` runs one on a thread of this process, `Spawned` one in a process to kill."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from unittest.mock import patch

from zmqbus.forwarder import Forwarder
from zmqbus.journal.journal import SEGMENT_BYTES, Journal

T = TypeVar("T")


class Hosted:
    """A forwarder on a loop and thread of its own."""

    def __init__(self, journal: Path, *, segment_bytes: int | None = None, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.forwarder = Forwarder(journal, **options)
        sized = partial(Journal.open, segment_bytes=segment_bytes or SEGMENT_BYTES)
        with patch.object(Journal, "open", sized):
            self.do(self.forwarder.open())

    @property
    def store(self) -> Any:
        """Its journal."""
        return self.forwarder._store

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """On its loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def call(self, work: Any, *arguments: Any) -> Any:
        """The same of what is no coroutine."""

        async def called() -> Any:
            return work(*arguments)

        return self.do(called())

    def cursors(self) -> dict[str, int]:
        """Name and offset of each, as on disk."""
        return {name: offset for name, offset, _ in self.call(self.forwarder.cursors)}

    def close(self) -> None:
        if self._thread.is_alive():
            self.do(self.forwarder.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


PROGRAM = """
import asyncio, json, sys
from zmqbus.forwarder import Forwarder
path, options = sys.argv[1], json.loads(sys.argv[2])
async def main():
    async with Forwarder(path, **options):
        print("up", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
asyncio.run(main())
"""


class Spawned:
    """A forwarder in a process of its own; when the test ends or dies, so does it."""

    def __init__(self, journal: Path, **options: Any) -> None:
        self._argv = [sys.executable, "-c", PROGRAM, str(journal), json.dumps(options)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "up\n"

    def kill(self) -> None:
        """As kill -9 does."""
        self.process.kill()
        self._reap()

    def stop(self) -> None:
        """As it should be."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            assert self.process.wait(30) == 0
        self._reap()

    def _reap(self) -> None:
        self.process.wait(30)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.kill()
