"""Where a reading begins, as people write it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from zmqbus.errors import SetupError
from zmqbus.protocol.commands import END
from zmqbus.protocol.starts import Start, check_cursor_name, parse_start

NOW = 1_700_000_000_000_000_000
HOUR = 3600 * 10**9


@pytest.mark.parametrize(
    ("start", "meant"),
    [
        (None, Start(END)),
        ("last", Start(END)),
        ("first", Start(0)),
        (0, Start(0)),
        (4711, Start(4711)),
        ("-90s", Start(END, NOW - 90 * 10**9)),
        ("-5m", Start(END, NOW - 300 * 10**9)),
        ("-1h", Start(END, NOW - HOUR)),
        (" -1.5d ", Start(END, NOW - 36 * HOUR)),
        ("-99999d", Start(END, 1)),  # before 1970
        ("2023-11-14T22:13:20Z", Start(END, NOW)),
        ("2023-11-14T22:13:20.000001+00:00", Start(END, NOW + 1000)),
        ("2023-11-15T00:13:20+02:00", Start(END, NOW)),
        (datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC), Start(END, NOW)),
        (datetime(2023, 11, 14, 23, 13, 20, tzinfo=timezone(timedelta(hours=1))), Start(END, NOW)),
        (datetime(9999, 12, 31, tzinfo=UTC), Start(END, 2**63 - 1)),
    ],
)
def test_forms(start: Any, meant: Start) -> None:
    assert parse_start(start, NOW) == meant


@pytest.mark.parametrize(
    ("start", "why"),
    [
        ("yesterday", "is not understood"),
        ("", "is not understood"),
        ("-", "is not understood"),
        ("-1", "is not understood"),
        ("1h", "is not understood"),
        (True, "is not understood"),
        (1.5, "is not understood"),
        (b"first", "is not understood"),
        (-1, "no journal has that offset"),
        (2**63, "no journal has that offset"),
        ("2023-11-14T22:13:20", "another moment in each time zone"),
        ("2023-11-14", "another moment in each time zone"),
        (datetime(2023, 11, 14), "another moment in each time zone"),
    ],
)
def test_what_is_refused_names_the_forms(start: Any, why: str) -> None:
    with pytest.raises(SetupError, match=why) as raised:
        parse_start(start, NOW)
    assert '"first", "last", "-90s"' in str(raised.value)


@pytest.mark.parametrize("name", ["x", "häß ☃", "x" * 255, "a b/c"])
def test_cursor_names(name: str) -> None:
    assert check_cursor_name(name) == name


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 256, "ä" * 128, "\ud800", 7, b"x", None])
def test_cursor_names_that_cannot_be(name: Any) -> None:
    with pytest.raises(SetupError, match="1 to 255 bytes of UTF-8, without NUL"):
        check_cursor_name(name)
