"""Times as an operator writes them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from zmqbus.cli.messages.forms import parse_time_ns
from zmqbus.errors import ParseError

NOW = datetime(2026, 7, 31, 3, 30, 15, tzinfo=UTC)
NOW_NS = int(NOW.timestamp()) * 10**9


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is 05:30:15; winter time ends the second hour of it."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("now", "2026-07-31T03:30:15"),
        ("-1h30m", "2026-07-31T02:00:15"),
        ("-500ms", "2026-07-31T03:30:14.5"),
        ("-15", "2026-07-31T03:30:00"),
        ("@0", "1970-01-01T00:00:00"),
        ("@1785466800.25", "2026-07-31T03:00:00.25"),
        ("05:30", "2026-07-31T03:30:00"),
        ("5:30:15", "2026-07-31T03:30:15"),
        ("05:31", "2026-07-30T03:31:00"),  # not yet: yesterday's
        ("23:00", "2026-07-30T21:00:00"),
        ("2026-07-31", "2026-07-30T22:00:00"),
        ("2026-01-31", "2026-01-30T23:00:00"),
        ("2026-07-31T03:00", "2026-07-31T01:00:00"),
        (" 2026-07-31 03:00:59.5 ", "2026-07-31T01:00:59.5"),
        ("2026-07-31T03:00Z", "2026-07-31T03:00:00"),
        ("2026-07-31T03:00:00-07:00", "2026-07-31T10:00:00"),
        ("2026-11-23T03:54:31.300401Z", "2026-11-23T03:54:31.300401"),  # as --json prints it
    ],
)
def test_what_is_meant(text: str, meant: str) -> None:
    wanted = datetime.fromisoformat(f"{meant}+00:00")
    assert parse_time_ns(text, NOW_NS) == round(wanted.timestamp() * 1e6) * 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "write 2026-07-31T03:00"),
        ("yesterday", "write 2026-07-31T03:00"),
        ("1h", "write a minus before it"),
        ("--1h", "a number and a unit"),
        ("-", "a number and a unit"),
        ("-1 fortnight", "a number and a unit"),
        ("25:00", "write 2026"),
        ("12:60", "write 2026"),
        ("2026-02-30", "write 2026"),
        ("0001-01-01", "write 2026"),
        ("@nan", "write 2026"),
        ("@1e99", "write 2026"),
        ("31.07.2026", "write 2026"),
    ],
)
def test_what_is_no_time(text: str, words: str) -> None:
    with pytest.raises(ParseError, match=words):
        parse_time_ns(text, NOW_NS)
