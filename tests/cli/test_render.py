"""Rendering: golden lines, and that nothing a peer sends can steer the terminal."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext
from rich.cells import cell_len
from rich.console import Console

from zmqbus.cli.messages.forms import FIELDS, Fields
from zmqbus.cli.messages.render import (
    BYTES_SHOWN,
    COMPACT_DEPTH_MAX,
    HEX_BYTES_MAX,
    ROWS_MAX,
    FormatString,
    Line,
    compact,
    escape,
    hexdump,
)
from zmqbus.errors import FormatError, ZmqbusError
from zmqbus.protocol.message import Message

SENT = 1_763_870_000.123456  # 03:53:20 UTC
HOSTILE = [
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\x1b]52;c;cm0=\x07",  # writes the clipboard
    "\x9b31m",  # CSI in one character
    "\x90q\x9c",
    "a\rb",
    "a\nb",
    "a\x08b",
    "\x00\x7f",
    "\u2028\u2029\x85",
    "\u202eevil\u202c",  # right-to-left override
    "\u2066\u2069\u200b\ufeff",
    "\U000e0041",
    "\ud800",
]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as zone:
        zone.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def line(width: int | None = None, *, dump: bool = False) -> Line:
    """For a terminal of `width` cells, or for a pipe."""
    if width is None:
        return Line(Console(file=io.StringIO()), dump=dump)
    return Line(Console(file=Terminal(), width=width), dump=dump)


def fields(value: Any, *, topic: str = "logs.web1", node: str = "web1", **others: Any) -> Fields:
    return Fields(Message(topic, value, 42, 0xABC, SENT, **others), now=SENT + 0.25, node=node)


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_escape_leaves_only_printable_characters(text: str) -> None:
    assert escape(text).isprintable()
    assert escape(text) == escape(escape(text))


def test_escape_is_for_eyes() -> None:
    assert escape("a\tb\n\x1b[0m\u202e\U000e0041") == r"a\tb\n\x1b[0m\u202e\U000e0041"
    assert escape(r"C:\new") == r"C:\new"
    assert escape("grün 日本 🙂") == "grün 日本 🙂"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (7, "7"),
        (2.5, "2.5"),
        (float("nan"), "nan"),
        ("a b\n", r"a b\n"),
        ('say "hi" \\', 'say "hi" \\'),
        ("", ""),
        (b"", 'b""'),
        (b"\x00hi", "006869 |.hi|"),
        (b"caf\xe9 au\tlait \x1b[m", r'b"caf\xe9 au\tlait \x1b[m"'),
        ("grün".encode(), 'b"grün"'),
        (b'a "b" \\', r'b"a \"b\" \\"'),
        (b"\xff\xfe", "fffe |..|"),
        (datetime(2026, 1, 1, tzinfo=UTC), "2026-01-01T00:00:00.000000Z"),
        (Ext(5, b"x"), 'ext(5, b"x")'),
        ([], "[]"),
        ({}, "{}"),
        ((1, "a"), '[1,"a"]'),
        ({"a": [1, {"b\n": None}], 2: b"x"}, r'{"a":[1,{"b\n":null}],2:b"x"}'),
        (['say "hi" \\', "\x1b"], r'["say \"hi\" \\","\x1b"]'),
    ],
)
def test_compact(value: Any, text: str) -> None:
    assert compact(value) == text
    assert compact(value, len(text)) == text
    if len(text) > 1:
        assert compact(value, len(text) - 1) == text[: len(text) - 2] + "…"


def test_binary_is_whole_in_a_pipe_and_seen_in_both_forms_on_a_terminal() -> None:
    data = bytes(range(40))
    assert compact(data) == f"{data.hex()} |{'.' * 32} !\"#$%&'|"
    assert compact(data, 80) == f"{data[:16].hex()}… |{'.' * 16}…|"
    assert compact(b"x" * 500) == f'b"{"x" * 500}"'
    assert compact(b"x" * 500, 80) == f'b"{"x" * 77}…'


def test_compact_looks_only_at_what_it_shows() -> None:
    class Untouchable:
        def __repr__(self) -> str:
            raise AssertionError("looked at")

    assert compact([1, 2, 3, Untouchable()], 5) == "[1,2…"
    assert compact({"key": "x" * 1000, "z": Untouchable()}, 10) == '{"key":"x…'
    assert compact("x" * 1000, 3) == "xx…"
    assert compact("\x1b" * 1000, 9) == r"\x1b\x1b…"


def test_compact_bounds_depth() -> None:
    value: Any = []
    for _ in range(50_000):
        value = [value]
    assert compact(value) == "[" * COMPACT_DEPTH_MAX + "…" + "]" * COMPACT_DEPTH_MAX


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(HOSTILE)
    | st.binary(max_size=BYTES_SHOWN)
    | st.datetimes(timezones=st.just(UTC))
    | st.builds(Ext, st.integers(-128, 127), st.binary(max_size=BYTES_SHOWN))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(HOSTILE), inner),
    max_leaves=8,
)
TEXTS = st.text() | st.lists(st.sampled_from(HOSTILE)).map("".join)


@settings(max_examples=150)
@given(VALUES, st.integers(1, 60))
def test_compact_is_printable_and_within_its_limit(value: Any, limit: int) -> None:
    whole, cut = compact(value), compact(value, limit)
    assert whole.isprintable()
    assert cut.isprintable()
    assert cut == whole if len(whole) <= limit else cut == whole[: limit - 1] + "…"


def test_hexdump_golden() -> None:
    assert hexdump(b"hello world\n\x00\x01\xfe\xff0123\x1b[31m") == (
        "  00000000  68 65 6c 6c 6f 20 77 6f  72 6c 64 0a 00 01 fe ff  |hello world.....|\n"
        "  00000010  30 31 32 33 1b 5b 33 31  6d                       |0123.[31m|"
    )
    assert hexdump(b"") == ""


def test_hexdump_is_bounded() -> None:
    assert len(hexdump(bytes(HEX_BYTES_MAX)).splitlines()) == HEX_BYTES_MAX // 16
    *rows, more = hexdump(bytes(HEX_BYTES_MAX + 1500)).splitlines()
    assert len(rows) == HEX_BYTES_MAX // 16
    assert more == "  … 1,500 more bytes"


# --- lines -------------------------------------------------------------------------------------


def test_line_in_a_pipe_is_plain_and_whole() -> None:
    value = {"status": 500, "path": "/" + "x" * 100}
    assert line().render(fields(value)) == (
        '03:53:20.123  logs.web1  web1#42  119 B  250ms  {"status":500,"path":"/' + "x" * 100 + '"}'
    )


def test_line_names_the_origin_where_the_node_has_no_name() -> None:
    assert line().render(fields("hi", node="")) == "03:53:20.123  logs.web1  0000000000000abc#42  3 B  250ms  hi"


def test_line_of_a_value_that_cannot_be_encoded() -> None:
    assert line().render(fields(2**64)) == "03:53:20.123  logs.web1  web1#42  ?  250ms  18446744073709551616"


def test_line_shows_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XXX-05:30")
    time.tzset()
    assert line().render(fields("hi")).startswith("09:23:20.123  ")


def test_line_on_a_terminal_is_coloured_and_cut() -> None:
    assert line(60).render(fields("GET /index HTTP/1.1")) == (
        "\x1b[2m03:53:20.123\x1b[0m\x1b[36m  logs.web1\x1b[0m\x1b[32m  web1#42\x1b[0m"
        "\x1b[2m  20 B\x1b[0m\x1b[2m  250ms\x1b[0m  GET /index H…"
    )


def test_no_color_leaves_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    rendered = line(60).render(fields("GET /index HTTP/1.1"))
    assert rendered == "03:53:20.123  logs.web1  web1#42  20 B  250ms  GET /index H…"
    assert cell_len(rendered) == 60


def test_a_map_is_spread_out_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"status": 500, "path": "/index"}
    coloured = line(80).render(fields(value))
    assert coloured.endswith('\x1b[33m  status: \x1b[0m500\x1b[33m  path: \x1b[0m"/index"')
    monkeypatch.setenv("NO_COLOR", "1")
    head = "03:53:20.123  logs.web1  web1#42  23 B  250ms"
    assert line(80).render(fields(value)) == f'{head}  status: 500  path: "/index"'
    assert line(60).render(fields(value)) == f'{head}\n    status: 500\n    path: "/index"'
    assert line(60).render(fields({})) == f"{head.replace('23 B', '1 B')}  {{}}"


def test_a_map_that_does_not_fit_is_wrapped_and_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    value = {"agent": "x" * 50, "tags": ["one", {"deep": "y" * 20, "more": [1, 2]}], 7: None}
    head, *rows = line(40).render(fields(value)).splitlines()
    assert head == "03:53:20.123  logs.web1  web1#42  106 B…"
    assert rows == [
        "    agent:",
        '        "' + "x" * 31,
        "        " + "x" * 19 + '"',
        "    tags:",
        '        - "one"',
        "        -",
        '            deep: "' + "y" * 20 + '"',
        "            more: [1,2]",
        "    7: null",
    ]
    rows = line(40).render(fields({f"key{i}": i for i in range(1000)})).splitlines()
    assert len(rows) == 1 + ROWS_MAX + 1
    assert rows[-1] == "    …"


def test_a_brief_line_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    brief = Line(Console(file=Terminal(), width=60), brief=True).render(fields({"status": 500, "path": "/index"}))
    assert brief == '03:53:20.123  logs.web1  web1#42  23 B  250ms  {"status":50…'


def test_headers_are_shown() -> None:
    rendered = line().render(fields("hi", headers={"trace": "7f3a", "n\x1b": 2}))
    assert rendered == r"03:53:20.123  logs.web1  web1#42  3 B  250ms  [trace=7f3a n\x1b=2]  hi"


@pytest.mark.parametrize("width", range(1, 90, 4))
def test_a_map_never_exceeds_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    value = {"日本" * 30: {"a": "日本" * 40, "b": [[["日本" * 9]]]}, "k": 7}
    rendered = line(width).render(fields(value, topic="日.本"))
    assert all(cell_len(row) <= width for row in rendered.splitlines())


def test_a_dumb_terminal_gets_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in line(200).render(fields("hi"))


def test_forced_colour_does_not_cut_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    rendered = line().render(fields("x" * 500))
    assert rendered.endswith("x" * 500)
    assert rendered.startswith("\x1b[2m")


def test_line_follows_the_width_of_the_terminal() -> None:
    console = Console(file=Terminal(), width=200, no_color=True)
    resized = Line(console)
    assert cell_len(resized.render(fields("x" * 500))) == 200
    console.width = 70
    assert cell_len(resized.render(fields("x" * 500))) == 70


@pytest.mark.parametrize("width", range(1, 90))
def test_a_line_never_exceeds_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    rendered = line(width).render(fields("日本" * 40, topic="日.本"))
    assert cell_len(rendered) <= width
    assert rendered.endswith("…")


def test_dump_stands_in_place_of_the_value() -> None:
    assert line(dump=True).render(fields(b"\x00\x01")) == (
        "03:53:20.123  logs.web1  web1#42  4 B  250ms\n"
        "  00000000  00 01                                             |..|"
    )
    assert line(dump=True).render(fields({"a": 1})).splitlines()[1:] == [
        "  00000000  81 a1 61 01                                       |..a.|"
    ]
    assert line(dump=True).render(fields(b"")) == "03:53:20.123  logs.web1  web1#42  2 B  250ms"
    assert line(dump=True).render(fields(2**64)) == "03:53:20.123  logs.web1  web1#42  ?  250ms"


SGR = re.compile(r"\x1b\[[0-9;]*m")


@settings(max_examples=150)
@given(VALUES, TEXTS, TEXTS.filter(bool), st.integers(1, 200) | st.none(), st.booleans())
def test_no_message_can_steer_the_terminal(value: Any, topic: str, node: str, width: int | None, dump: bool) -> None:
    rendered = line(width, dump=dump).render(fields(value, topic=topic, node=node))
    if width is None:
        assert "\x1b" not in rendered
    # Our colours come in pairs and are the only control sequences; a peer's ESC would be left over.
    plain = SGR.sub("", rendered)
    assert all(row.isprintable() for row in plain.split("\n"))
    assert dump or (width is not None and type(value) in (dict, list)) or "\n" not in plain
    assert set(SGR.findall(rendered)) <= {"\x1b[2m", "\x1b[36m", "\x1b[32m", "\x1b[33m", "\x1b[0m"}


def test_a_peers_own_colours_are_shown_as_text() -> None:
    hostile = "\x1b[2mfake\x1b[0m"  # even sequences that a line itself uses
    benign = line(200).render(fields("x", topic="t", node="n"))
    attack = line(200).render(fields(hostile, topic=hostile, node=hostile))
    assert attack.count("\x1b") == benign.count("\x1b")
    assert attack.count(r"\x1b[2mfake\x1b[0m") == 3


# --- templates ---------------------------------------------------------------------------------

RICH = {
    "status": 500,
    "ok": True,
    "none": None,
    "ratio": 0.123456,
    "text": "a\n\x1b[31mb",
    "raw": b"\x00\xff",
    "list": [1, {"x": 2}],
    "a b": {"c": [10, 20]},
    7: "seven",
    "big": 2**63,
    "esc": 27,
    "at": datetime(2026, 1, 1, tzinfo=UTC),
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain {{braces}}", "plain {braces}"),
        ("{topic} {seq} {origin} {node} {size}", "logs.web1 42 0000000000000abc web1 113"),
        ("{headers} {headers.k} {headers.nope}", '{"k":"v"} v '),
        ("{age} {age:.1f} {age:>8.2f}", "0.250 0.2     0.25"),
        ("{time}", "2025-11-23T03:53:20.123456Z"),
        ("{time:%H:%M:%S} {time:.3f} {time:.0f}", "03:53:20 1763870000.123 1763870000"),
        ("{value.status} {value[status]} {value['status']} {value[\"status\"]}", "500 500 500 500"),
        ("{value.status:>6}|{value.status:05d}|{value.status:x}|{value.status:.1f}", "   500|00500|1f4|500.0"),
        ("{value.ratio:.2f} {value.ratio:.1%} {value.ratio}", "0.12 12.3% 0.123456"),
        ("{value.ok} {value.none} {value.raw} {value.list}", 'true null 00ff [1,{"x":2}]'),
        ("{value.ok:>6}|{value.none:>6}|{value.raw:>6}|{value.list:<14}|", '  true|  null|  00ff|[1,{"x":2}]   |'),
        ("{value.at} {value.at:>30}", "2026-01-01T00:00:00.000000Z    2026-01-01T00:00:00.000000Z"),
        ("{value[a b].c[0]} {value[a b][c][-1]} {value.list.0} {value.list[1].x} {value.7}", "10 20 1 2 seven"),
        ("[{value.nope}|{value.nope.deeper:>9}|{value.list[9]:.1f}|{value.status.real}]", "[|||]"),
        ("{value.text}", r"a\n\x1b[31mb"),
        ("{value.text:.3}", r"a\n"),
        ("{value.text:d} {value.status:>8s}", r"a\n\x1b[31mb      500"),
        ("{value.esc:c}", r"\x1b"),
        ("{value.ok:d}", "1"),
        ("{value.big:c}", "9223372036854775808"),
        (r"{topic}\t{seq}\n\\n\0\d", "logs.web1\t42\n\\n\0\\d"),
    ],
)
def test_template(template: str, text: str) -> None:
    rendered = FormatString(template).render(fields(RICH, headers={"k": "v"}))
    assert rendered == text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("", "it is empty"),
        ("{status}", "unknown field 'status'; there are topic, value, seq, origin, node, time, age, size, headers"),
        ("{}", "is not a field"),
        ("{0}", "unknown field '0'"),
        ("{ topic }", "is not a field"),
        ("{value.}", "is not a field"),
        ("{value..a}", "is not a field"),
        ("{value[]}", "is not a field"),
        ("{value[a}", "expected '}'"),
        ("{topic", "expected '}' before end of string; a brace itself is written {{ or }}"),
        ("topic}", "Single '}'"),
        ("{topic!r}", "!r is not supported"),
        ("{value.x!s}", "!s is not supported"),
        ("{topic:{seq}}", "a field within a format specification"),
        ("{value:{value.width}}", "a field within a format specification"),
        ("{topic:.1f}", "'.1f' does not format topic"),
        ("{seq:zz}", "'zz' does not format seq"),
        ("{age:s}", "'s' does not format age"),
        ("{value.x:zz}", "'zz' does not format value"),
        ("{value:1000}", "wider than 999"),
        ("{value.x:.99999999999f}", "wider than 999"),
        ("{value.__class__.x", "expected '}'"),
    ],
)
def test_a_bad_template_says_what_is_wrong(template: str, reason: str) -> None:
    with pytest.raises(FormatError) as caught:
        FormatString(template)
    assert isinstance(caught.value, ZmqbusError)
    assert reason in str(caught.value)
    assert caught.value.template == template


def test_a_template_shows_bytes_that_are_text() -> None:
    assert FormatString("{value}").render(fields(b"caf\xe9 au lait")) == r"caf\xe9 au lait"
    assert FormatString("{value}").render(fields(b"\x00\x01")) == "0001"


def test_a_template_reaches_no_python_attributes() -> None:
    assert FormatString("[{value.__class__}{topic.__len__}{value.keys}]").render(fields(RICH)) == "[]"


def test_a_size_that_is_not_known_prints_as_nothing() -> None:
    assert FormatString("[{size:>5}]").render(fields(2**64)) == "[]"


SPECS = st.sampled_from(
    ["", "d", "x", "c", "n", "s", ".1f", ">9", "^9", "+", ",", "_", "#x", ".0%", "=9", "e", "%H", "%c"]
)
PATHS = st.sampled_from(["", ".a", "[a b]", ".0", "[-1]", ".a.b", "['x'][0]"])


@settings(max_examples=150)
@given(
    st.text(max_size=20)
    | st.lists(st.builds("{{{}{}:{}}}".format, st.sampled_from(list(FIELDS)), PATHS, SPECS), max_size=3).map("".join),
    VALUES | st.dictionaries(st.sampled_from(["a", "a b", "x"]), VALUES),
    TEXTS,
)
def test_any_template_is_refused_or_renders_printably(template: str, value: Any, topic: str) -> None:
    try:
        form = FormatString(template)
    except FormatError:
        return
    rendered = form.render(fields(value, topic=topic, node=topic, headers={"a": value}))
    if template.isprintable() and "\\" not in template:
        assert rendered.isprintable()
