"""A journal for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.journal.journals import make


@pytest.fixture(autouse=True)
def zone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are shown in UTC, also in processes."""
    monkeypatch.setenv("TZ", "UTC")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make(tmp_path / "journal")
