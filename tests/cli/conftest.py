"""Commands, each test on a bus of its own."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def bus(monkeypatch: pytest.MonkeyPatch) -> str:
    """A bus that nobody else is on. Without a key everything stays on the loopback interface."""
    name = f"test-cli-{secrets.token_hex(6)}"
    for variable in ("ZMQBUS_KEY_FILE", "ZMQBUS_INTERFACE", "ZMQBUS_PEER", "ZMQBUS_DEBUG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("ZMQBUS_BUS", name)
    return name


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `zmqbus …` as a process; whatever still runs at the end is ended."""
    started: list[subprocess.Popen[str]] = []

    def run(
        *args: str, command: Sequence[str] = (sys.executable, "-m", "zmqbus"), **options: Any
    ) -> subprocess.Popen[str]:
        defaults = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*command, *args], **(defaults | options))
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()
