"""How messages look to people: one line each, a hexdump, a `-F` template, and tables by topic. Prints nothing.

Rule 1: what a peer sent must not steer the terminal. Every text from outside (topics, node names, keys, values)
passes `escape`, which leaves only characters that Python calls printable. The JSON form (`forms.to_json`) keeps
the same rule by `\\u` escapes. Only `Line` adds control sequences, its own colours, and only for a terminal.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import msgspec
from msgspec.msgpack import Ext
from rich.cells import cell_len, set_cell_size
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from zmqbus.cli.forms import FIELDS, Fields, human_age, human_bytes, human_rate, moment, rfc3339
from zmqbus.cli.where import MISSING, lookup
from zmqbus.errors import FormatError
from zmqbus.protocol.message import Message

COMPACT_DEPTH_MAX = 64  # a peer may nest as deep as our stack; nobody reads deeper than this
BYTES_SHOWN = 16  # of bytes within a line
HEX_BYTES_MAX = 4_096  # in a hexdump: 256 rows are more than anybody reads; --json has all
TOPICS_MAX = 10_000  # rows of counts: some 5 MB
MESSAGES_MAX = 1_000  # whole messages kept: mostly small, but each may be as large as the bus carries

# --- values ------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """Text with every unprintable character as a backslash escape (`\\n`, `\\x1b`, `\\u202e`), as `repr` has it.

    Backslashes stay single, for reading: this form is for eyes, the JSON form for programs.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def compact(value: Any, limit: int | None = None) -> str:
    """A value on one line, JSON-like; text bare, bytes as `hex |ascii|`. Beyond `limit` characters it ends in `…`.

    The work is bounded by `limit` as well: what is not shown is not looked at.
    """
    if type(value) is str:
        shown = escape(value if limit is None else value[: limit + 1])
    else:
        pieces, length = [], 0
        for piece in _pieces(value, limit, COMPACT_DEPTH_MAX):
            pieces.append(piece)
            length += len(piece)
            if limit is not None and length > limit:
                break
        shown = "".join(pieces)
    return shown if limit is None or len(shown) <= limit else shown[: max(0, limit - 1)] + "…"


def _pieces(value: Any, limit: int | None, depth: int) -> Iterator[str]:
    kind = type(value)
    if value is None or kind is bool:
        yield {None: "null", True: "true", False: "false"}[value]
    elif kind is str:
        cut = value if limit is None else value[: limit + 1]
        yield '"' + escape(cut.replace("\\", "\\\\").replace('"', '\\"')) + '"'
    elif kind is bytes:
        yield _short_bytes(value)
    elif kind is datetime:
        yield rfc3339(value)
    elif kind is Ext:
        yield f"ext({value.code}, {_short_bytes(value.data)})"
    elif kind is dict or kind is list or kind is tuple:
        if depth == 0:
            yield "…"
        elif kind is dict:
            for i, (key, item) in enumerate(value.items()):
                yield "," if i else "{"
                yield from _pieces(key, limit, depth - 1)
                yield ":"
                yield from _pieces(item, limit, depth - 1)
            yield "}" if value else "{}"
        else:
            for i, item in enumerate(value):
                yield "," if i else "["
                yield from _pieces(item, limit, depth - 1)
            yield "]" if value else "[]"
    else:
        yield escape(repr(value))  # numbers, and what only a typed subscription hands out


def _short_bytes(data: bytes) -> str:
    first = data[:BYTES_SHOWN]
    if len(data) > BYTES_SHOWN:
        return f"{first.hex()}… |{_ascii(first)}…|"
    return f"{first.hex()} |{_ascii(first)}|" if data else "||"


def _ascii(data: bytes) -> str:
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in data)


def hexdump(data: bytes) -> str:
    """Rows of 16 bytes: offset, hex, ASCII. At most 4 KiB, then a row says how much is left."""
    rows = []
    for offset in range(0, min(len(data), HEX_BYTES_MAX), 16):
        row = data[offset : offset + 16]
        hexes = f"{row[:8].hex(' ')}  {row[8:].hex(' ')}"
        rows.append(f"  {offset:08x}  {hexes:<48}  |{_ascii(row)}|")
    if len(data) > HEX_BYTES_MAX:
        rows.append(f"  … {len(data) - HEX_BYTES_MAX:,} more bytes")
    return "\n".join(rows)


# --- one line per message ----------------------------------------------------------------------

_DIM, _TOPIC, _NODE, _PLAIN = Style(dim=True), Style(color="cyan"), Style(color="green"), Style()


class Line:
    """The human form of a message: `12:34:56.789  topic  node#seq  17 B  3ms  value`, time in the local zone.

    On a terminal it is coloured (unless NO_COLOR is set) and cut to the width; in a pipe it is plain and whole.
    With `dump`, a hexdump follows in place of the value: of bytes as they are, of any other value as msgpack.
    """

    def __init__(self, console: Console, *, dump: bool = False) -> None:
        self._console = console
        self._dump = dump
        self._colored = console.is_terminal and console.color_system is not None and not console.no_color
        self._cut = console.file.isatty()

    def render(self, fields: Fields) -> str:
        """The line, or with `dump` the lines, without the last newline."""
        width = self._console.width if self._cut else None  # asked each time: windows are resized
        parts = [
            (moment(fields["time"]).astimezone().strftime("%H:%M:%S.%f")[:-3], _DIM),
            (escape(fields["topic"]), _TOPIC),
            (f"{escape(fields['node'] or fields['origin'])}#{fields['seq']}", _NODE),
            ("?" if fields["size"] is None else human_bytes(fields["size"]), _DIM),
            (human_age(fields["age"]), _DIM),
        ]
        if not self._dump:
            parts.append((compact(fields["value"], width), _PLAIN))
            return self._join(parts, width)
        return "\n".join(filter(None, (self._join(parts, width), hexdump(_bytes_of(fields["value"])))))

    def _join(self, parts: list[tuple[str, Style]], width: int | None) -> str:
        spaced = [(f"  {text}" if i else text, style) for i, (text, style) in enumerate(parts)]
        if width is not None and cell_len("".join(text for text, _ in spaced)) > width:
            spaced = _cut_to(spaced, width)
        if not self._colored:
            return "".join(text for text, _ in spaced)
        return "".join(style.render(text, color_system=ColorSystem.STANDARD) for text, style in spaced)


def _cut_to(parts: list[tuple[str, Style]], width: int) -> list[tuple[str, Style]]:
    kept, room = [], max(0, width - 1)  # one cell for the ellipsis
    for text, style in parts:
        cells = cell_len(text)
        if cells > room:
            kept.append((set_cell_size(text, room) + "…", style))
            break
        kept.append((text, style))
        room -= cells
    return kept


def _bytes_of(value: Any) -> bytes:
    if type(value) is bytes:
        return value
    try:
        return msgspec.msgpack.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return b""


# --- templates ---------------------------------------------------------------------------------

_FIELD = re.compile(r"(\w+)((?:\.[^.\[\]]+|\[[^\[\]]+\])*)")
_STEP = re.compile(r"\.([^.\[\]]+)|\[([^\[\]]+)\]")
_INDEX = re.compile(r"-?[0-9]{1,18}", re.ASCII)
_WIDE = re.compile(r"[0-9]{4}")
_BACKSLASHES = {r"\t": "\t", r"\n": "\n", r"\0": "\0", r"\\": "\\"}
_SAMPLES: dict[str, tuple[Any, ...]] = {"topic": ("",), "origin": ("",), "node": ("",), "seq": (0,), "size": (0,)}
_NUMBERS = ("time", "age")


class FormatString:
    """A `-F` template: `{topic} {value.status} {value[a b][0]} {age:.1f}`. Raises FormatError when made.

    Python's format specifications apply. Keys follow a dot or stand in brackets, quoted or not; what is not there
    prints as nothing. `\\t`, `\\n`, `\\0` and `\\\\` in the template mean what they do in C.
    `{time}` is RFC 3339 in UTC, `{time:%H:%M:%S}` local, `{time:.3f}` and `{age}` seconds, `{origin}` hexadecimal;
    arrays and maps print as in a line, whole, and bytes as hexadecimal digits.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            raise FormatError(template, f"{error}; a brace itself is written {{{{ or }}}}") from None
        self._steps: list[str | Callable[[Fields], str]] = []
        for literal, name, spec, conversion in parsed:
            if literal:
                self._steps.append(re.sub(r"\\[tn0\\]", lambda found: _BACKSLASHES[found[0]], literal))
            if name is not None:
                if conversion is not None:
                    raise FormatError(template, f"!{conversion} is not supported")
                self._steps.append(self._field(name, spec or ""))

    def render(self, fields: Fields) -> str:
        """The message in this form, without a newline at its end. Never raises."""
        return "".join(step if isinstance(step, str) else step(fields) for step in self._steps)

    def _field(self, text: str, spec: str) -> Callable[[Fields], str]:
        match = _FIELD.fullmatch(text)
        if match is None:
            raise FormatError(self._template, f"{{{text}}} is not a field, such as {{topic}} or {{value.status}}")
        name, path = match[1], [dotted or _unquoted(key) for dotted, key in _STEP.findall(match[2])]
        if name not in FIELDS:
            raise FormatError(self._template, f"unknown field {name!r}; there are {', '.join(FIELDS)}")
        self._check_spec(name if not path else "value", spec)

        def field(fields: Fields) -> str:
            found = fields[name]
            for key in path:
                found = _lookup_text(found, key)
            if found is MISSING or (name == "size" and found is None):
                return ""
            if name in _NUMBERS and not path:
                return escape(_format_number(name, found, spec))
            return escape(_format(found, spec))

        return field

    def _check_spec(self, name: str, spec: str) -> None:
        if "{" in spec:  # or a peer's value could choose the width
            raise FormatError(self._template, "a field within a format specification is not supported")
        if name == "time" and "%" in spec:
            try:
                moment(0).strftime(spec)
                return
            except ValueError as error:
                raise FormatError(self._template, f"{spec!r} does not format a time: {error}") from None
        if _WIDE.search(spec):
            raise FormatError(self._template, f"{spec!r} is wider than 999 characters")
        for sample in (0.0,) if name in _NUMBERS else _SAMPLES.get(name, ("", 0, 0.0)):
            try:
                format(sample, spec)
                return
            except ValueError:
                continue
        raise FormatError(self._template, f"{spec!r} does not format {name}")


def _unquoted(key: str) -> str:
    return key[1:-1] if len(key) > 2 and key[0] == key[-1] and key[0] in "'\"" else key


def _lookup_text(container: Any, key: str) -> Any:
    found = lookup(container, key)
    return lookup(container, int(key)) if found is MISSING and _INDEX.fullmatch(key) else found


def _format_number(name: str, number: float, spec: str) -> str:
    if name == "time" and not spec:
        return rfc3339(moment(number))
    if name == "time" and "%" in spec:
        return moment(number).astimezone().strftime(spec)
    return format(number, spec or ".3f")


def _format(value: Any, spec: str) -> str:
    kind = type(value)
    text = value.hex() if kind is bytes else compact(value)
    candidates = (value, text) if kind is int or kind is float else (text, value) if kind is bool else (text,)
    for candidate in candidates if spec else ():
        try:
            return format(candidate, spec)
        except (ValueError, OverflowError):  # {value.status:d} of a text, {value.status:>8s} of a number
            continue
    return text


# --- tables ------------------------------------------------------------------------------------


class TopicRow(msgspec.Struct, frozen=True):
    """What a table knows of one topic. `bytes` counts encoded values; `rate` is messages per second."""

    topic: str
    count: int
    bytes: int
    rate: float

    def cells(self) -> tuple[str, str, str, str]:
        """The row as text for a terminal. Wrap the first in rich's `Text`: a topic may look like its markup."""
        return escape(self.topic), f"{self.count:,}", human_bytes(self.bytes), human_rate(self.rate)


class _Counter:
    __slots__ = ("bytes", "count", "slot", "slots")

    def __init__(self, slot: int) -> None:
        self.count = 0
        self.bytes = 0
        self.slot = slot
        self.slots = [0] * _SLOTS

    def advance(self, slot: int) -> None:
        """Forget what has left the window by the time of `slot`."""
        for passed in range(self.slot + 1, min(slot, self.slot + _SLOTS) + 1):
            self.slots[passed % _SLOTS] = 0
        self.slot = max(self.slot, slot)


_SLOTS = 10  # parts of a window; the rate lags by one part at most


class TopicTable:
    """Messages, bytes and rate by topic, for `tap --subjects`. `now` is monotonic, in seconds.

    The first `topics_max` topics seen are kept for good, so that no count is ever too small; `dropped` counts the
    messages of all others. The rate is that of the last `window` seconds, or of the time since the first message.
    """

    def __init__(self, *, topics_max: int = TOPICS_MAX, window: float = 5.0) -> None:
        self.topics_max = topics_max
        self.dropped = 0
        self._slot_seconds = window / _SLOTS
        self._started: float | None = None
        self._counters: dict[str, _Counter] = {}

    def add(self, topic: str, size: int, now: float) -> None:
        """Count one message whose value is `size` bytes."""
        if self._started is None:
            self._started = now
        slot = int(now / self._slot_seconds)
        counter = self._counters.get(topic)
        if counter is None:
            if len(self._counters) >= self.topics_max:
                self.dropped += 1
                return
            counter = self._counters[topic] = _Counter(slot)
        counter.advance(slot)
        counter.count += 1
        counter.bytes += size
        counter.slots[counter.slot % _SLOTS] += 1

    def rows(self, now: float) -> list[TopicRow]:
        """All rows, the busiest topic (by count) first, equals by name."""
        slot = int(now / self._slot_seconds)
        covered = now - (slot - _SLOTS + 1) * self._slot_seconds  # the current part has only begun
        elapsed = now - self._started if self._started is not None else 0.0
        seconds = max(min(covered, elapsed), self._slot_seconds)
        rows = []
        for topic, counter in self._counters.items():
            counter.advance(slot)
            rows.append(TopicRow(topic, counter.count, counter.bytes, sum(counter.slots) / seconds))
        return sorted(rows, key=lambda row: (-row.count, row.topic))


class LastPerTopic:
    """The last message of each topic. The first `topics_max` topics are kept; `dropped` counts other messages."""

    def __init__(self, *, topics_max: int = MESSAGES_MAX) -> None:
        self.topics_max = topics_max
        self.dropped = 0
        self._messages: dict[str, Message] = {}

    def add(self, message: Message) -> None:
        if message.topic not in self._messages and len(self._messages) >= self.topics_max:
            self.dropped += 1
            return
        self._messages[message.topic] = message

    def messages(self) -> list[Message]:
        """What was kept, by topic."""
        return [message for _, message in sorted(self._messages.items(), key=lambda item: item[0])]
