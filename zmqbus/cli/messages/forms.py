"""Plain forms of messages, values and numbers, both ways. No terminal, no sockets; callers pass `now`.

Three things live here: `Fields`, what a message offers to `--where`, `-F` and `--json`; the JSON form of values;
and sizes, rates and durations as people write and read them.

The JSON form. Whatever msgpack carries has one, `parse_value(…, as_json=True)` reads it back, and the text is
printable: every character that could steer a terminal is written as a `\\u` escape.

    null, true, false, text     as they are
    integer                     as it is up to ±(2^53 - 1), where every JSON reader is exact; beyond: {"$int": "…"}
    float                       as it is; {"$float": "nan"}, {"$float": "inf"}, {"$float": "-inf"}
    bytes                       {"$bytes": "base64"}
    timestamp                   {"$time": "2026-11-23T03:54:31.300401Z"}
    extension type              {"$ext": [code, "base64"]}
    array                       [ … ]
    map, all keys text          { … }
    any other map               {"$map": [[key, value], …]}; an array used as a key is written as an array
    map that looks like one of these forms, such as {"$bytes": 7}   {"$map": [["$bytes", 7]]}
    what lies deeper than 100 levels   {"$deep": null}; the one thing that cannot be read back
"""

from __future__ import annotations

import binascii
import math
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, time, timedelta
from functools import cached_property
from typing import Any

import msgspec
from msgspec.msgpack import Ext

from zmqbus.errors import ParseError
from zmqbus.protocol.message import Message

EXACT_INT_MAX = 2**53 - 1  # beyond it, readers that hold numbers as doubles (JavaScript, jq) silently round
JSON_DEPTH_MAX = 100  # a peer may nest as deep as our stack; common JSON readers give up at 100 to 1000
_EPOCH = datetime.fromtimestamp(0, UTC)
DURATION_S_MAX = 36_500 * 86_400.0  # a century: longer is a typing error, and would overflow timestamps
SIZE_BYTES_MAX = 2**63 - 1

# --- what a message offers ---------------------------------------------------------------------


class Fields(Mapping[str, Any]):
    """The named fields of one message. `size` and `age` are worked out only when asked for.

    `node` is the publisher's name, where known. `now` is the wall clock, in seconds since the Unix epoch. `attempt`: of
    a job, how often it was given out by now.
    """

    def __init__(self, message: Message, *, now: float, node: str = "", attempt: int | None = None) -> None:
        self.message = message
        self.node = node
        self.now = now
        self.attempt = attempt

    @cached_property
    def size(self) -> int | None:
        """Encoded size of the value in bytes; None where the value cannot be encoded (again)."""
        try:
            return len(msgspec.msgpack.encode(self.message.value))
        except (TypeError, ValueError, OverflowError, RecursionError):
            return None

    def __getitem__(self, name: str) -> Any:
        return FIELDS[name](self)

    def __iter__(self) -> Iterator[str]:
        return iter(FIELDS)

    def __len__(self) -> int:
        return len(FIELDS)


FIELDS: Mapping[str, Callable[[Fields], Any]] = {
    "topic": lambda fields: fields.message.topic,
    "value": lambda fields: fields.message.value,
    "seq": lambda fields: fields.message.seq,
    "origin": lambda fields: f"{fields.message.origin:016x}",  # text: as printed everywhere else
    "node": lambda fields: fields.node,
    "time": lambda fields: fields.message.time,
    "age": lambda fields: fields.now - fields.message.time,
    "size": lambda fields: fields.size,
    "headers": lambda fields: fields.message.headers or {},
    "offset": lambda fields: fields.message.offset,
    "attempt": lambda fields: fields.attempt,
}
"""Every field name that `--where` and `-F` know. `age` is negative where the publisher's clock runs ahead.
`offset` is None of a message that comes live, `attempt` of one that is no job."""


def moment(seconds: float) -> datetime:
    """Unix time as an aware UTC datetime; the epoch itself where no calendar reaches that far."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0, UTC)


def rfc3339(when: datetime) -> str:
    """RFC 3339 in UTC with microseconds: `2026-11-23T03:54:31.300401Z`."""
    return when.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


# --- JSON --------------------------------------------------------------------------------------


def to_json(fields: Fields) -> str:
    """One message as one line of JSON, without the newline. Values and headers are in the form drawn above.

    One that was read from a journal begins with its offset there, and a job with its attempt.
    """
    firsts = {"offset": fields.message.offset, "attempt": fields.attempt}
    row: dict[str, Any] = {name: value for name, value in firsts.items() if value is not None}
    row |= {
        "topic": fields["topic"],
        "seq": fields["seq"],
        "origin": fields["origin"],
        "node": fields["node"],
        "time": rfc3339(moment(fields["time"])),
        "size": fields["size"],
        "headers": _to_form(fields["headers"], 0),
        "value": _to_form(fields["value"], 0),
    }
    return _printable_json(row)


def value_to_json(value: Any) -> str:
    """A value alone in the JSON form: what `parse_value(…, as_json=True)` reads."""
    return _printable_json(_to_form(value, 0))


def parse_value(text: str, as_json: bool) -> Any:
    """What `zmqbus pub` publishes for an argument: the text itself, or the value that the JSON form stands for.

    Raises ParseError where it is no JSON, no known form, or nothing that msgpack can carry.
    """
    try:
        encoded = text.encode()
    except UnicodeEncodeError:  # how Python hands over arguments that are not UTF-8
        raise ParseError("value", text, "it is not UTF-8") from None
    if not as_json:
        return text
    try:
        return _from_form(msgspec.json.decode(encoded))
    except RecursionError:
        raise ParseError("JSON value", text, "it is nested too deep") from None
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError) as error:
        raise ParseError("JSON value", text, str(error)) from None


def _printable_json(form: Any) -> str:
    text = msgspec.json.encode(form).decode()
    if text.isprintable():
        return text
    # Outside its strings JSON is ASCII on one line here, so whatever is unprintable may be written as an escape.
    return "".join(character if character.isprintable() else _json_escape(character) for character in text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def _to_form(value: Any, depth: int) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -EXACT_INT_MAX <= value <= EXACT_INT_MAX else {"$int": str(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is bytes:
        return {"$bytes": b64encode(value).decode()}
    if kind is datetime and value.tzinfo is not None:
        return {"$time": rfc3339(value)}
    if kind is Ext:
        return {"$ext": [value.code, b64encode(value.data).decode()]}
    if depth >= JSON_DEPTH_MAX:
        return {"$deep": None}
    if kind is list or kind is tuple:
        return [_to_form(item, depth + 1) for item in value]
    if kind is dict:
        if all(type(key) is str for key in value) and not (len(value) == 1 and next(iter(value)) in _READERS):
            return {key: _to_form(item, depth + 1) for key, item in value.items()}
        return {"$map": [[_to_form(k, depth + 1), _to_form(v, depth + 1)] for k, v in value.items()]}
    # Structs, enums, sets and the like: what a subscriber would receive for them.
    return _to_form(msgspec.msgpack.decode(msgspec.msgpack.encode(value)), depth + 1)


def _from_form(form: Any) -> Any:
    if type(form) is list:
        return [_from_form(item) for item in form]
    if type(form) is dict:
        if len(form) == 1:
            [(tag, body)] = form.items()
            if (reader := _READERS.get(tag)) is not None:
                return reader(body)
        return {key: _from_form(item) for key, item in form.items()}
    if type(form) is int and not -(2**63) <= form < 2**64:
        raise ValueError(f"the integer {str(form)[:30]} has more than 64 bits")
    return form


def _read_int(body: Any) -> int:
    if type(body) is not str or re.fullmatch(r"-?[0-9]{1,20}", body) is None:
        raise ValueError('$int takes an integer as text: {"$int": "9007199254740993"}')
    return int(_from_form(int(body)))


def _read_float(body: Any) -> float:
    if body not in ("nan", "inf", "-inf"):
        raise ValueError('$float takes "nan", "inf" or "-inf"')
    return float(body)


def _read_bytes(body: Any) -> bytes:
    try:
        return b64decode(body, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise ValueError('$bytes takes base64 text: {"$bytes": "AAEC"}') from None


def _read_time(body: Any) -> datetime:
    when = msgspec.convert(body, datetime)
    if when.tzinfo is None:
        raise ValueError('$time takes RFC 3339 text with a zone: {"$time": "2026-11-23T03:54:31Z"}')
    return when.astimezone(UTC)


def _read_ext(body: Any) -> Ext:
    match body:
        case [int(code), data] if -128 <= code <= 127 and code != -1:  # -1 is msgpack's timestamp: $time
            return Ext(code, _read_bytes(data))
    raise ValueError('$ext takes a code and base64 text: {"$ext": [5, "AAEC"]}')


def _read_map(body: Any) -> dict[Any, Any]:
    if type(body) is not list or any(type(pair) is not list or len(pair) != 2 for pair in body):
        raise ValueError('$map takes pairs: {"$map": [[1, "one"], [2, "two"]]}')
    return {_hashable(_from_form(key)): _from_form(value) for key, value in body}


def _hashable(key: Any) -> Any:
    if type(key) is list:
        return tuple(_hashable(item) for item in key)
    if type(key) in (dict, Ext):
        raise ValueError("a map or an extension type cannot be a key")
    return key


def _read_deep(body: Any) -> Any:
    raise ValueError("$deep marks what was nested too deep to be written; there is nothing to read")


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "$int": _read_int,
    "$float": _read_float,
    "$bytes": _read_bytes,
    "$time": _read_time,
    "$ext": _read_ext,
    "$map": _read_map,
    "$deep": _read_deep,
}

# --- numbers for people ------------------------------------------------------------------------


def human_bytes(n: int) -> str:
    """`512 B`, `1.5 KiB`, `64 MiB`: powers of 1024."""
    return _scaled(n, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def human_rate(per_second: float) -> str:
    """`0.2/s`, `350/s`, `2.6M/s`: powers of 1000."""
    return _scaled(per_second, 1000, ("/s", "k/s", "M/s", "G/s"))


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    for unit in units:
        shown = f"{number:.0f}" if number >= 9.95 or number == int(number) else f"{number:.1f}"
        if float(shown) < step or unit is units[-1]:
            break
        number /= step
    return shown + unit


def told_claims(claims: Iterable[str]) -> list[str]:
    """What a forwarder was told to claim. For dead letters of that it claims more, by itself."""
    return [claim for claim in claims if not claim.startswith("$")]


def human_age(seconds: float) -> str:
    """`0.3ms`, `12ms`, `1.5s`, `42s`, `3m05s`, `2h10m`, `3d04h`; with a minus where a clock runs ahead."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0:
        return f"-{human_age(-seconds)}"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.{1 if seconds < 0.00995 else 0}f}ms"
    if seconds < 59.5:
        return f"{seconds:.{1 if seconds < 9.95 else 0}f}s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{second:02}s"
    hours, minute = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minute:02}m"
    return f"{hours // 24}d{hours % 24:02}h"


_DURATION_UNITS = {"w": 604_800.0, "d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|us|[wdhms])\s*")
_DURATION_PLAIN = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_DURATION_HELP = (
    "write a number and a unit (us, ms, s, m, h, d, w), such as 10s, 500ms, 1h30m or 2d; without a unit: seconds"
)


def parse_duration(text: str) -> float:
    """Seconds meant by `10`, `500ms`, `10s`, `1h30m`, `2d`. Units descend, each used once. Raises ParseError."""
    rest, total, previous = text.strip(), 0.0, math.inf
    if _DURATION_PLAIN.fullmatch(rest):
        rest += "s"
    while (part := _DURATION_PART.match(rest)) is not None:
        unit = _DURATION_UNITS[part[2]]
        if unit >= previous:
            raise ParseError("duration", text, "larger units come first, each once, as in 1h30m")
        total, previous, rest = total + float(part[1]) * unit, unit, rest[part.end() :]
    if rest or previous == math.inf:
        raise ParseError("duration", text, _DURATION_HELP)
    if total > DURATION_S_MAX:
        raise ParseError("duration", text, "it is longer than a century")
    return total


_CLOCK = re.compile(r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?")
_TIME_HELP = (
    "write 2026-07-31T03:00 or '2026-07-31 03:00' (local time, unless it ends in Z or +02:00), 2026-07-31, 03:00 "
    "(the last time it was that), -90m (that long ago), @1785466800 (Unix time) or now"
)


def parse_time_ns(text: str, now_ns: int) -> int:
    """The moment meant by a text, in Unix ns; see _TIME_HELP. Raises ParseError."""
    plain = text.strip()
    now = moment(now_ns / 1e9)
    try:
        if plain == "now":
            return now_ns
        if plain.startswith("-"):
            return now_ns - round(parse_duration(plain[1:]) * 1e9)
        if plain.startswith("@"):
            when = datetime.fromtimestamp(float(plain[1:]), UTC)
        elif _CLOCK.fullmatch(plain):
            clock = time.fromisoformat(plain.zfill(8 if plain.count(":") == 2 else 5))
            local = datetime.combine(now.astimezone().date(), clock)
            if local.astimezone() > now:
                local -= timedelta(days=1)
            when = local.astimezone()
        else:
            when = datetime.fromisoformat(plain).astimezone(UTC)
        return (when - _EPOCH) // timedelta(microseconds=1) * 1000
    except ParseError as error:
        raise ParseError("time", text, error.reason) from None
    except (ValueError, OverflowError, OSError):
        hint = "; for that long ago write a minus before it" if _DURATION_PART.match(plain) else ""
        raise ParseError("time", text, _TIME_HELP + hint) from None


_SIZE = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,20}))?\s*(?:([kmgt])(ib?|b)?|b)?", re.IGNORECASE)
_SIZE_HELP = "write a number of bytes, or one with a unit such as 64K, 1.5MiB or 10G (powers of 1024; 64KB is 64,000)"


def parse_size(text: str) -> int:
    """Bytes meant by `4096`, `64K`, `1.5MiB`, `10G`; rounded down. Raises ParseError.

    As in GNU tools: K, Ki and KiB are 1024, KB is 1000; likewise M, G and T. Case does not matter.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[2] and not match[3]):  # half a byte
        raise ParseError("size", text, _SIZE_HELP)
    whole, fraction, prefix, suffix = match[1], match[2] or "", match[3], match[4]
    step = 1000 if (suffix or "").lower() == "b" else 1024
    scale = step ** ("kmgt".index(prefix.lower()) + 1) if prefix else 1
    # In integers: 1.1GiB is no exact float. 10^digits undoes the shift of the decimal point.
    size: int = int(whole + fraction) * scale // 10 ** len(fraction)
    if size > SIZE_BYTES_MAX:
        raise ParseError("size", text, "it is more than any disk holds (2^63 bytes)")
    return size
