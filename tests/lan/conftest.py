"""Fixtures for whole nodes in whole processes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lan.agents import Agents
from zmqbus import BusKey


@pytest.fixture
def bus() -> str:
    """A bus of this test's own, so that runs beside each other do not meet."""
    return f"lan-{secrets.token_hex(6)}"


@pytest.fixture
def key(tmp_path: Path) -> str:
    """The path of a new bus key."""
    path = tmp_path / "bus.key"
    BusKey.generate().save(path)
    return str(path)


@pytest.fixture
def agents() -> Iterator[Agents]:
    """Processes with nodes; killed afterwards."""
    with Agents() as running:
        yield running
