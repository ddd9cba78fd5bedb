"""`--where`: what it says of a message, what it refuses, and that neither text nor message can hurt it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext

from zmqbus.cli.messages.forms import FIELDS, Fields
from zmqbus.cli.messages.where import (
    DEPTH_MAX,
    INT_BITS_MAX,
    MATCH_CHARS_MAX,
    MISSING,
    NUMBER_CHARS_MAX,
    TEXT_CHARS_MAX,
    compile_where,
    lookup,
)
from zmqbus.errors import WhereError, ZmqbusError
from zmqbus.protocol.message import Message

VALUE = {
    "status": 500,
    "path": "/Index.html",
    "ok": True,
    "none": None,
    "tags": ["slow", "retry"],
    "a b": [10, 20, {"c": "deep"}],
    "raw": b"\x00error",
    "ratio": 0.5,
    "number": "42",
    "from": "x",
    "at": datetime(2026, 1, 1, tzinfo=UTC),
    7: "seven",
    "é": 1,
}
MESSAGE = Message("logs.web1.nginx", VALUE, 42, 0xABC, 100.0, {"k": "v"})
FIELDS_OF_MESSAGE = Fields(MESSAGE, now=103.5, node="web1")


def where(text: str, fields: Any = FIELDS_OF_MESSAGE) -> bool:
    result = compile_where(text)(fields)
    assert type(result) is bool
    return result


@pytest.mark.parametrize(
    "text",
    [
        # names
        'topic == "logs.web1.nginx"',
        "seq == 42",
        'origin == "0000000000000abc"',
        'node == "web1"',
        "time == 100",
        "age == 3.5",
        "size > 100",
        'headers.k == "v"',
        "value",
        # lookup
        "value.status == 500",
        'value["status"] == 500',
        'value["a b"][0] == 10',
        'value["a b"][-1].c == "deep"',
        'value[7] == "seven"',
        'value["from"] == "x"',
        'value.é == 1 and value["é"] == 1',
        'value.path[0] == "/"',
        "value.raw[0] == 0",
        # comparison
        "400 < value.status <= 500",
        "0 < 1 < 2 < 3",
        '"slow" in value.tags',
        '"x" not in value.tags',
        '"status" in value',
        "value.status in [500, 501]",
        "value.status in (500, 501)",
        "value.status in {500, 501}",
        "value.status not in {200, -1}",
        'value.tags == ["slow", "retry"]',
        'value.tags == ("slow", "retry")',
        '[["slow", 1], {2}, -3.5] != value.tags',
        # logic
        "value.status == 1 or value.status == 500",
        "not value.status == 1",
        "not has(value.nope) and value.ok == true and value.ok and value.none == null and value.none == None",
        "not false",
        # arithmetic
        "value.status + 1 == 501",
        "value.status - 1 == 499",
        "value.status * 2 == 1000",
        "value.status / 200 == 2.5",
        "value.status // 200 == 2",
        "value.status % 7 == 3",
        "-value.status == -500",
        "+value.status == 500",
        # functions
        'startswith(topic, "logs.")',
        'endswith(topic, ".nginx")',
        'contains(topic, "web")',
        'contains(value.tags, "slow")',
        'contains(value.raw, b"error")',
        'startswith(value.raw, b"\\x00")',
        'contains(str(value.raw), "error")',
        r'matches(topic, r"web\d\.")',
        'matches(lower(value.path), "^/index")',
        "len(value.tags) == 2 and len(topic) == 15 and len(value.raw) == 6 and len(value) == 13",
        "has(value.none) and has(topic) and has(value['a b'][2].c)",
        "int(value.number) == 42 and int(2.9) == 2",
        'float(value.number) == 42 and str(value.status) == "500"',
        # blanks and comments around
        "  \t value.status\n == 500  # why not",
    ],
)
def test_true_of_the_message(text: str) -> None:
    assert where(text)
    assert not where(f"not ({text.split('#')[0]})")


@pytest.mark.parametrize(
    "text",
    [
        # missing: every comparison is false
        "value.nope == 1",
        "value.nope != 1",
        "value.nope < 1",
        "value.nope == value.nope",
        "value.nope in [1]",
        "value.nope not in [1]",
        "1 in value.nope",
        "1 not in value.nope",
        "value.nope.deeper[3] == null",
        "value.nope",
        "has(value.nope)",
        'has(value["a b"][99])',
        'has(value["a b"]["0"])',
        "has(value.status.real)",
        "has(value.tags.append)",
        "has(topic.upper)",
        "has(value[[1]])",
        "has(value.tags[true])",
        "1 + value.nope == 1",
        "-value.nope == 0",
        "len(value.nope) == 0",
        # types without an order, or that cannot be reckoned with
        'value.status < "500"',
        'value.status > "500"',
        '"500" in value.status',
        '"500" not in value.status',
        "5 in topic",
        "value.tags in {1}",
        "value.at > 5",
        "value.status + topic == 1",
        'value.path * 2 == "/Index.html/Index.html"',
        'value.path + "x" == "/Index.htmlx"',
        'value.path % 1 == "/Index.html"',
        "value.tags + value.tags != 1",
        "len(5) >= 0",
        'lower(5) == "5"',
        "int(topic) == 0",
        "int(value.tags) == 0",
        "float(value.none) == 0",
        'str(value.tags) != ""',
        "startswith(value.status, 5)",
        'startswith(value.raw, "x")',
        'matches(value.status, "5")',
        'matches(value.raw, "e")',
        'contains(value.status, "5")',
        # arithmetic without a result
        "1 / 0 == 1",
        "1 // 0 != 1",
        "1 % 0 != 1",
        "1e308 * 10 == 1",
        "int(1e999) >= 0",
        'int(float("nan")) != 1',
        'float("nan") == float("nan")',
        # empty things
        '""',
        "[]",
        "0",
        "null",
    ],
)
def test_false_rather_than_an_error(text: str) -> None:
    assert not where(text)


ATTACKS: list[tuple[str, int | None]] = [
    # Python's innards
    ("().__class__.__bases__[0].__subclasses__()", 0),
    ("value.__class__", 0),
    ("topic.__class__.__mro__", 0),
    ("value.x.__init__.__globals__", 0),
    ('topic.format("x")', 0),
    ("value.tags.append(1)", 0),
    ("value.get('status')", 0),
    ("__builtins__", 0),
    ("__import__('os').system('true')", 0),
    ("(topic).upper()", 0),
    ("len.__self__", 0),
    ("getattr(value, 'x')", 0),
    ("eval('1')", 0),
    ("open('/etc/passwd')", 0),
    ("has.__call__", 0),
    # syntax that computes, binds or defers
    ("lambda: 1", 0),
    ("(lambda x: x)(1)", 0),
    ("[x for x in value]", 0),
    ("{x for x in value}", 0),
    ("{x: 1 for x in value}", 0),
    ("len(x for x in value)", 3),
    ("(x := 5)", 1),
    ("f'{topic}'", 0),
    ('f"{topic.__class__}"', 0),
    ("1 if topic else 2", 0),
    ("{'a': 1}", 0),
    ("await topic", None),
    ("(yield)", None),
    ("import os", None),
    ("seq = 5", None),
    ("seq == 1; seq", None),
    ("del value", None),
    ("*value", None),
    ("[*value]", 1),
    ("len(*value)", 0),
    ("len(topic, x=1)", 0),
    ("len(**value)", 0),
    ("topic is None", 0),
    ("topic is not None", 0),
    ("~seq", 0),
    ("value[1:2]", 6),
    ("value[::]", 6),
    ("value[1, topic]", 9),
    ("[topic]", 1),
    ("{[1]}", 0),
    ("{(1,)}", 0),
    ("1j", 0),
    ("...", 0),
    # work without bound
    ("9 ** 9 ** 9", 0),
    ("2 ** 99999999", 0),
    ("1 << 99999999", 0),
    ("1 | 2", 0),
    ("1 @ 2", 0),
    ("0x" + "f" * 600, 0),
    ("9" * 900, 0),
    # misuse of functions
    ("foo(1)", 0),
    ("len()", 0),
    ("len(1, 2)", 0),
    ("has(1)", 0),
    ("has(len(topic))", 0),
    ("matches(topic, topic)", 15),
    ("matches(topic, b'x')", 15),
    ("matches(topic, '(')", 15),
    ("matches(topic, 'a{99999999999}')", 15),
    ("len(nope)", 4),
    # no expression at all
    ("", 0),
    ("   ", 0),
    ("(", None),
    ("seq ==", 6),
    ("seq\x00", None),
    ("\ud800", 0),
    ("'" + "\ud800" + "'", 0),
    ("seq &&& topic", None),
]


@pytest.mark.parametrize(("text", "position"), ATTACKS, ids=[repr(text)[:40] for text, _ in ATTACKS])
def test_whatever_is_not_on_the_list_is_refused(text: str, position: int | None) -> None:
    with pytest.raises(WhereError) as caught:
        compile_where(text)
    assert isinstance(caught.value, ZmqbusError)
    assert caught.value.text == text
    assert position is None or caught.value.position == position  # None: where Python's parser stops, by version
    caret = str(caught.value).splitlines()[-1]
    assert caret == "  " + " " * min(caught.value.position, 50) + "^"


@pytest.mark.parametrize(
    "text",
    [
        "(" * 300 + "seq" + ")" * 300,
        "-" * 500 + "1",
        "not " * 240 + "seq",
        "1" + "+1" * 400,
        "value" + "[0]" * 300,
        "value" + ".a" * 400,
        "[" * 60 + "]" * 60,
        "[" + "-" * 60 + "1]",
        "lower(" * 100 + "topic" + ")" * 100,
        "[" * 400,
    ],
)
def test_deep_nesting_is_refused(text: str) -> None:
    assert len(text) <= TEXT_CHARS_MAX
    with pytest.raises(WhereError):
        compile_where(text)


def test_the_deepest_expression_that_is_taken_also_evaluates() -> None:
    assert where("not " * (DEPTH_MAX - 1 - (DEPTH_MAX - 1) % 2) + "true")
    with pytest.raises(WhereError, match="nested deeper than 50 levels"):
        compile_where("not " * DEPTH_MAX + "true")


def test_length_is_bounded() -> None:
    assert where("1" + " " * (TEXT_CHARS_MAX - 1))
    with pytest.raises(WhereError, match="1,001 characters; the limit is 1,000"):
        compile_where("1" + " " * TEXT_CHARS_MAX)


def test_numbers_stay_bounded() -> None:
    big = 2**64 - 1
    product = "*".join(["value"] * 16)
    assert where(f"{product} > 0", {"value": big})  # 1,024 bits
    assert not where(f"{product} * value > 0", {"value": big})  # more: missing
    assert big**16 < 2**INT_BITS_MAX
    digits = "9" * (NUMBER_CHARS_MAX + 1)
    assert not where("int(value) > 0", {"value": digits})
    assert where("float(value) > 0", {"value": digits[:300]})
    assert where("int(value) > 0", {"value": digits[:300]})
    assert not where("int(value) > 0", {"value": digits[:-1]})  # 400 digits are read, and are over 1,024 bits


def test_matches_looks_at_a_bounded_part() -> None:
    assert where('matches(value, "needle")', {"value": "x" * (MATCH_CHARS_MAX - 6) + "needle"})
    assert not where('matches(value, "needle")', {"value": "x" * (MATCH_CHARS_MAX - 5) + "needle"})


def test_operands_are_evaluated_once_and_only_as_far_as_needed() -> None:
    asked = []

    class Spy(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.append(key)
            return super().get(key, default)

    assert where("1 < seq < 9 and (topic == 'a' or size == 1)", Spy(seq=5, topic="a", size=0))
    assert asked == ["seq", "topic"]


def test_fields_that_are_not_there_are_missing() -> None:
    assert not where("topic == topic", {})
    assert where("not has(value)", {})


def test_size_of_a_value_that_cannot_be_encoded_is_missing() -> None:
    assert not where("size >= 0", Fields(Message("t", object(), 1, 1, 0.0), now=0.0))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("value.status = 500", "write == to compare"),
        ("value.from == 1", 'as a key, write ["from"]'),
        ("value.class", 'as a key, write ["class"]'),
        ("value.content-type == 1", 'value["content-type"]'),
        ("value.__x", 'for a key, write ["__x"]'),
        ("status == 5", "unknown name 'status'; a message has topic, value, seq,"),
        ('topic.startswith("x")', 'write contains(topic, "web"), not topic.contains("web")'),
        ("regex(topic)", "unknown function 'regex'; there are has, matches, len"),
        ("value.x is None", "write == or != instead of is"),
        ("seq ** 2", "the operators are + - * / // %"),
        ("lambda: 1", "Lambda is not part of this language"),
        ("matches(topic, '[')", "bad regular expression: unterminated character set"),
        (" ", "it is empty"),
    ],
)
def test_errors_say_what_to_write_instead(text: str, reason: str) -> None:
    with pytest.raises(WhereError) as caught:
        compile_where(text)
    assert reason in str(caught.value)


def test_the_caret_stands_under_the_fault() -> None:
    with pytest.raises(WhereError) as caught:
        compile_where('  value.é == "ü" and sttus')
    assert str(caught.value).splitlines()[1:] == [
        '    value.é == "ü" and sttus',
        "                       ^",
    ]
    with pytest.raises(WhereError) as caught:
        compile_where("seq == 1 or " * 20 + "nope")
    *_, shown, caret = str(caught.value).splitlines()
    assert shown[caret.index("^") :] == "nope"


def test_the_message_of_an_error_cannot_steer_the_terminal() -> None:
    with pytest.raises(WhereError) as caught:
        compile_where("seq == '\x1b[31m' +")
    assert "\x1b" not in str(caught.value)


def test_every_field_has_a_name_here() -> None:
    for name in FIELDS:
        assert where(f"has({name})")


@pytest.mark.parametrize(
    ("container", "key"),
    [
        ({}, "x"),
        ([], 0),
        ([1], "0"),
        ([1], True),
        ({1: 1}, []),
        (5, 0),
        (None, "x"),
        (MISSING, 0),
        (object(), "__class__"),
    ],
)
def test_lookup_misses(container: object, key: object) -> None:
    assert lookup(container, key) is MISSING


# --- fuzz --------------------------------------------------------------------------------------

# fmt: off
TOKENS = st.sampled_from([
    "topic", "value", "seq", "age", "size", "headers", "true", "None", ".a", ".__class__", '["a b"]', "[0]", "[-1]",
    "[", "]", "(", ")", ",", ".", "==", "!=", "<", "<=", ">", ">=", "in", "not", "not in", "and", "or", "is",
    "+", "-", "*", "/", "//", "%", "**", "<<", "|", "~", "@", "=", ":=", ":", ";", "#", "\\", "\n", "\f", "\x00",
    "0", "1", "2.5", "1e999", "0xff", "1j", "...", "'x'", "b'z'", "r'a.*b'", "f'{topic}'", "\'\'\'", "'['", "é",
    "len(", "lower(", "int(", "float(", "str(", "has(", "matches(", "startswith(", "contains(", "()", "{}", "[1,2]",
    "lambda", "if", "else", "for", "await", "yield", "import", "{1}", "{1:2}", "__import__('os')", "\ud800",
])
OPERATORS = st.sampled_from([
    "==", "!=", "<", "<=", ">", ">=", "in", "not in", "and", "or", "+", "-", "*", "/", "//", "%",
])
# fmt: on
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary()
    | st.datetimes(timezones=st.just(UTC))
    | st.builds(Ext, st.integers(-128, 127), st.binary())
)
KEYS = st.text() | st.sampled_from(["a", "a b", 0, -1, None, 2.5, b"z", (1, "x")])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS | st.integers(), inner), max_leaves=8
)


@settings(max_examples=150)
@given(
    st.text(max_size=40) | st.lists(TOKENS, max_size=12).map(" ".join) | st.lists(TOKENS, max_size=12).map("".join),
    VALUES,
    st.none() | st.dictionaries(st.text(), VALUES, max_size=2),
)
def test_any_text_is_refused_or_answers_without_raising(text: str, value: Any, headers: Any) -> None:
    try:
        test = compile_where(text)
    except WhereError:
        return
    assert type(test(Fields(Message("t.x", value, 1, 1, 0.0, headers), now=1.0))) is bool


PATHS = st.sampled_from(
    ["value", "value.a", 'value["a b"]', "value[0]", "topic", "seq", "age", "headers.x", "1.5", "'x'"]
)
CALLS = st.sampled_from(["len({})", "lower({})", "int({})", "float({})", "str({})", "({})", "(not ({}))", "-({})"])
EXPRESSIONS = st.recursive(
    PATHS,
    lambda inner: (
        st.tuples(inner, OPERATORS, inner).map(lambda parts: f"({' '.join(parts)})")
        | st.tuples(CALLS, inner).map(lambda parts: parts[0].format(parts[1]))
        | st.tuples(st.sampled_from(["startswith", "endswith", "contains"]), inner, inner).map(
            lambda parts: f"{parts[0]}({parts[1]}, {parts[2]})"
        )
    ),
    max_leaves=12,
).filter(lambda text: len(text) <= TEXT_CHARS_MAX)


@settings(max_examples=150)
@given(EXPRESSIONS, VALUES | st.dictionaries(st.sampled_from(["a", "a b"]), VALUES))
def test_any_well_formed_expression_answers_for_any_value(text: str, value: Any) -> None:
    test = compile_where(text)
    assert type(test(Fields(Message("t.x", value, 1, 1, 0.0), now=1.0))) is bool


def test_values_nested_as_deep_as_the_stack_are_compared_without_harm() -> None:
    deep: Any = []
    other: Any = []
    for _ in range(50_000):
        deep, other = [deep], [other]
    assert where("value.a == value.b or not (value.a == value.b)", {"value": {"a": deep, "b": other}})
    assert not where("size > 0", Fields(Message("t", deep, 1, 1, 0.0), now=0.0))
