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
from itertools import islice
from typing import Any

import msgspec
from msgspec.msgpack import Ext
from rich.cells import cell_len, chop_cells, set_cell_size
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from zmqbus.cli.messages.forms import FIELDS, Fields, human_age, human_bytes, human_rate, moment, rfc3339
from zmqbus.cli.messages.where import MISSING, lookup
from zmqbus.errors import FormatError
from zmqbus.protocol.message import Message

COMPACT_DEPTH_MAX = 64  # a peer may nest as deep as our stack; nobody reads deeper than this
BYTES_SHOWN = 16  # of binary bytes within a line on a terminal
SAMPLE_BYTES = 256  # that tell text from binary
ROWS_MAX = 40  # of one map or array on a terminal
INDENT = 4
KEY_SHOWN = 40  # characters of a key that has a row
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


def compact(value: Any, limit: int | None = None, *, bare: bool = True) -> str:
    """A value on one line, JSON-like; bytes as `b"text"` or `hex |ascii|`; text `bare`. Beyond `limit` it ends in `…`.

    The work is bounded by `limit`, in characters, as well: what is not shown is not looked at.
    """
    if bare and type(value) is str:
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
        yield _bytes(value, limit)
    elif kind is datetime:
        yield rfc3339(value)
    elif kind is Ext:
        yield f"ext({value.code}, {_bytes(value.data, limit)})"
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


def legible(data: bytes) -> bool:
    """Whether bytes are text, if not all of it UTF-8: no controls but those of texts, and at least half readable."""
    sample = data[:SAMPLE_BYTES]
    if any(byte < 0x20 and byte not in b"\t\n\r\x1b" for byte in sample):
        return False
    text = sample.decode(errors="replace")
    return text.count("\ufffd") * 2 <= len(text)


def bytes_as_text(data: bytes) -> str:
    """Bytes that are legible; those that are not UTF-8 as `\\xff`."""
    return escape(data.decode(errors="backslashreplace"))


def _bytes(data: bytes, limit: int | None) -> str:
    if legible(data):
        cut = data if limit is None else data[: 4 * (limit + 2)]  # a character takes four at most
        return 'b"' + bytes_as_text(cut.replace(b"\\", b"\\\\").replace(b'"', b'\\"')) + '"'
    if limit is None or len(data) <= BYTES_SHOWN:
        return f"{data.hex()} |{_ascii(data)}|"
    first = data[:BYTES_SHOWN]  # so that both forms are seen
    return f"{first.hex()}… |{_ascii(first)}…|"


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


# --- one line per message, or more for a map -----------------------------------------------------

_DIM, _TOPIC, _NODE, _KEY, _PLAIN = (
    Style(dim=True),
    Style(color="cyan"),
    Style(color="green"),
    Style(color="yellow"),
    Style(),
)
Part = tuple[str, Style]


class Line:
    """The human form of a message: `12:34:56.789  topic  node#seq  17 B  3ms  value`, time in the local zone.

    Headers, where there are some, stand before the value: `[trace=7f3a]`. In a pipe a line is plain and whole. On a
    terminal it is coloured (unless NO_COLOR is set); a map or array is spread out, over indented rows if it does not
    fit; any other value is cut to the width, and with `brief` these as well.
    With `dump`, a hexdump follows in place of the value: of bytes as they are, of any other value as msgpack.
    One that was `stored` begins with its offset in the journal and the date, and its age is left out.
    """

    def __init__(self, console: Console, *, dump: bool = False, brief: bool = False, stored: bool = False) -> None:
        self._console = console
        self._dump = dump
        self._brief = brief
        self._stored = stored
        self._colored = console.is_terminal and console.color_system is not None and not console.no_color
        self._cut = console.file.isatty()

    def render(self, fields: Fields) -> str:
        """The line, or the lines, without the last newline."""
        width = self._console.width if self._cut else None  # asked each time: windows are resized
        when = moment(fields["time"]).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        parts = [
            (f"{fields.message.offset}  {when}" if self._stored else when[11:], _DIM),
            (f"  {escape(fields['topic'])}", _TOPIC),
            (f"  {escape(fields['node'] or fields['origin'])}#{fields['seq']}", _NODE),
            (f"  {'?' if fields['size'] is None else human_bytes(fields['size'])}", _DIM),
        ]
        if not self._stored:
            parts.append((f"  {human_age(fields['age'])}", _DIM))
        if fields["headers"]:
            shown = (f"{escape(key)}={compact(item, width)}" for key, item in fields["headers"].items())
            parts.append((f"  [{' '.join(shown)}]", _DIM))
        value = fields["value"]
        if self._dump:
            dump = hexdump(_bytes_of(value))
            return self._join(parts, width) + (f"\n{dump}" if dump else "")
        if width is None or self._brief or not value or type(value) not in (dict, list, tuple):
            return self._join([*parts, (f"  {compact(value, width)}", _PLAIN)], width)
        spread = [*parts, *_spread(value, width)]
        if _cells(spread) <= width:
            return self._join(spread, width)
        rows = list(islice(_rows(value, width, INDENT, COMPACT_DEPTH_MAX), ROWS_MAX + 1))
        if len(rows) > ROWS_MAX:
            rows[-1] = [(f"{'':{INDENT}}…", _DIM)]
        return "\n".join(self._join(row, width) for row in [parts, *rows])

    def _join(self, parts: list[Part], width: int | None) -> str:
        if width is not None and _cells(parts) > width:
            parts = _cut_to(parts, width)
        if not self._colored:
            return "".join(text for text, _ in parts)
        return "".join(style.render(text, color_system=ColorSystem.STANDARD) for text, style in parts)


def _cells(parts: list[Part]) -> int:
    return sum(cell_len(text) for text, _ in parts)


def _spread(value: Any, limit: int) -> Iterator[Part]:
    """A map on one line: `key: value  key: value`; an array as anywhere. At most some more than `limit` characters."""
    if type(value) is not dict:
        yield f"  {compact(value, limit + 1)}", _PLAIN
        return
    length = 0
    for label, item in _items(value):
        text = compact(item, limit, bare=False)
        yield f"  {label}", _KEY
        yield text, _PLAIN
        length += len(label) + len(text) + 2
        if length > limit:
            return


def _rows(value: Any, width: int, indent: int, depth: int) -> Iterator[list[Part]]:
    """A map or array over several lines: an item each, or more where it does not fit, indented by more."""
    for label, item in _items(value):
        lead = (f"{'':{indent}}{label}", _KEY)
        room = width - cell_len(lead[0])
        text = compact(item, max(1, room) + 1, bare=False)
        if cell_len(text) <= room:
            yield [lead, (text, _PLAIN)]
        elif item and type(item) in (dict, list, tuple) and depth and indent + INDENT < width // 2:
            yield [(lead[0].rstrip(), _KEY)]
            yield from _rows(item, width, indent + INDENT, depth - 1)
        else:
            yield [(lead[0].rstrip(), _KEY)]
            inner = max(1, width - indent - INDENT)
            for chunk in chop_cells(compact(item, inner * ROWS_MAX, bare=False), inner):
                yield [(f"{'':{indent + INDENT}}{chunk}", _PLAIN)]


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if type(value) is dict:
        for key, item in value.items():
            yield f"{compact(key, KEY_SHOWN)}: ", item
    else:
        for item in value:
            yield "- ", item


def _cut_to(parts: list[Part], width: int) -> list[Part]:
    kept: list[Part] = []
    room = max(0, width - 1)  # one cell for the ellipsis
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
_SAMPLES: dict[str, tuple[Any, ...]] = {
    "topic": ("",),
    "origin": ("",),
    "node": ("",),
    "seq": (0,),
    "size": (0,),
    "offset": (0,),
    "attempt": (0,),
}
_NUMBERS = ("time", "age")


class FormatString:
    """A `-F` template: `{topic} {value.status} {value[a b][0]} {age:.1f}`. Raises FormatError when made.

    Python's format specifications apply. Keys follow a dot or stand in brackets, quoted or not; what is not there
    prints as nothing. `\\t`, `\\n`, `\\0` and `\\\\` in the template mean what they do in C.
    `{time}` is RFC 3339 in UTC, `{time:%H:%M:%S}` local, `{time:.3f}` and `{age}` seconds, `{origin}` hexadecimal;
    arrays and maps print as in a pipe, and bytes as text where they are that, otherwise as hexadecimal digits.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        if not template:
            raise FormatError(template, "it is empty; name what to print, such as {topic} {value}")
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
            if found is MISSING or (found is None and name in ("size", "offset", "attempt")):
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
    text = compact(value) if kind is not bytes else bytes_as_text(value) if legible(value) else value.hex()
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

    def __len__(self) -> int:
        """Topics."""
        return len(self._counters)

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
