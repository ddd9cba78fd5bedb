"""Forwarders on loopback, each test on a bus of its own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forwarder.forwarders import Running, running


@pytest.fixture
def bus() -> str:
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
def forwarder(tmp_path: Path, bus: str) -> Iterator[Running]:
    """One that claims everything."""
    with running(tmp_path / "journal", bus=bus, name="forwarder") as forwarder:
        yield forwarder
