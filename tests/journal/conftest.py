from __future__ import annotations

import pytest

from zmqbus.journal import positions


@pytest.fixture(autouse=True)
def _small_cursor_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the cursors' file changes often, and copying simulated disks stays cheap."""
    monkeypatch.setattr(positions, "CURSOR_FILE_BYTES", 2048)
