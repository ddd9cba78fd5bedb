"""Where a reading of the log begins, as people write it. Pure functions; callers pass the wall clock's `now_ns`.

"first"                     the oldest message there is
"last"                      the end: what comes from now on
"-90s", "-1h", "-1.5d"      that long ago (s, m, h, d)
"2026-07-31T03:00:00Z"      an ISO 8601 time with its zone (Z, or +02:00); a datetime with its zone is the same
4711                        an offset of the journal
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from zmqbus.errors import SetupError
from zmqbus.protocol.commands import END

OFFSET_MAX = 2**62  # no journal gets that far
TIME_NS_MAX = 2**63 - 1  # the year 2262
CURSOR_BYTES_MAX = 255

FORMS = (
    'use "first", "last", "-90s" (or m, h, d: that long ago), an ISO 8601 time with its zone such as '
    '"2026-07-31T03:00Z", a datetime with a tzinfo, or an offset'
)
_AGO = re.compile(r"-\s*([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Start(NamedTuple):
    """As READ has it: at the first batch of `time_ns`, unless that is 0; else at `offset`."""

    offset: int
    time_ns: int = 0


def parse_start(start: str | int | datetime | None, now_ns: int) -> Start:
    """What `subscribe(start=…)` means. Raises SetupError naming the forms that are understood."""
    match start:
        case None | "last":
            return Start(END)
        case "first":
            return Start(0)
        case bool():
            pass
        case int():
            if 0 <= start <= OFFSET_MAX:
                return Start(start)
            raise SetupError(f"start={start}: no journal has that offset; {FORMS}")
        case datetime():
            return _moment(start, repr(start))
        case str():
            if (ago := _AGO.fullmatch(start.strip())) is not None:
                return Start(END, _clamped(now_ns - int(float(ago[1]) * _UNITS[ago[2]] * 1e9)))
            try:
                return _moment(datetime.fromisoformat(start.strip()), repr(start))
            except ValueError:
                pass
    raise SetupError(f"start={start!r} is not understood: {FORMS}")


def check_cursor_name(name: object) -> str:
    """The name of a durable subscription. Raises SetupError."""
    try:
        if isinstance(name, str) and 0 < len(name.encode()) <= CURSOR_BYTES_MAX and "\0" not in name:
            return name
    except UnicodeEncodeError:
        pass
    raise SetupError(f"durable={name!r}: use a name of 1 to {CURSOR_BYTES_MAX} bytes of UTF-8, without NUL")


def _moment(when: datetime, given: str) -> Start:
    if when.tzinfo is None or when.utcoffset() is None:
        raise SetupError(f"start={given}: that is another moment in each time zone, so name it; {FORMS}")
    return Start(END, _clamped((when - _EPOCH) // timedelta(microseconds=1) * 1000))


def _clamped(time_ns: int) -> int:
    return min(max(time_ns, 1), TIME_NS_MAX)
