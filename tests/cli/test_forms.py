"""Forms: fields of a message, the JSON form there and back, sizes, rates, ages and durations."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.msgpack import Ext

from zmqbus.cli.messages.forms import (
    DURATION_S_MAX,
    FIELDS,
    JSON_DEPTH_MAX,
    SIZE_BYTES_MAX,
    Fields,
    human_age,
    human_bytes,
    human_rate,
    moment,
    parse_duration,
    parse_size,
    parse_value,
    rfc3339,
    to_json,
    value_to_json,
)
from zmqbus.errors import ParseError, ZmqbusError
from zmqbus.protocol.message import Message


def message(value: Any, **others: Any) -> Message:
    return Message("logs.web1", value, 42, 0xABC, 1_763_870_000.123456, **others)


# --- fields ------------------------------------------------------------------------------------


def test_fields_name_everything_of_a_message() -> None:
    fields = Fields(message("hello", headers={"k": 1}), now=1_763_870_002.0, node="web1")
    assert list(fields) == list(FIELDS)
    assert len(fields) == len(FIELDS)
    assert dict(fields) == {
        "topic": "logs.web1",
        "value": "hello",
        "seq": 42,
        "origin": "0000000000000abc",
        "node": "web1",
        "time": 1_763_870_000.123456,
        "age": 1_763_870_002.0 - 1_763_870_000.123456,
        "size": 6,
        "headers": {"k": 1},
        "offset": None,
        "attempt": None,
    }
    with pytest.raises(KeyError):
        fields["nope"]


def test_size_is_worked_out_once_and_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []
    monkeypatch.setattr(msgspec.msgpack, "encode", lambda value: encoded.append(value) or b"12345")
    fields = Fields(message("hello"), now=0.0)
    assert fields["topic"] == "logs.web1"
    assert encoded == []
    assert fields["size"] == fields["size"] == 5
    assert encoded == ["hello"]


def test_a_value_that_cannot_be_encoded_has_no_size() -> None:
    assert Fields(message(object()), now=0.0)["size"] is None
    assert Fields(message(2**64), now=0.0)["size"] is None


def test_moment_and_rfc3339() -> None:
    assert rfc3339(moment(0)) == "1970-01-01T00:00:00.000000Z"
    assert rfc3339(moment(1_763_870_000.123456)) == "2025-11-23T03:53:20.123456Z"
    assert rfc3339(moment((2**64 - 1) / 1e9)) == "2554-07-21T23:34:33.709553Z"  # the last that a frame can carry
    east = datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=1)))
    assert rfc3339(east) == "2026-01-01T00:00:00.000000Z"
    for unreachable in (1e300, -1e300, math.nan, math.inf):
        assert moment(unreachable) == datetime(1970, 1, 1, tzinfo=UTC)


# --- JSON --------------------------------------------------------------------------------------


def test_to_json_golden() -> None:
    fields = Fields(message({"status": 500, "raw": b"\x00\x01"}, headers={"k": b"v"}), now=0.0, node="web1")
    assert to_json(fields) == (
        '{"topic":"logs.web1","seq":42,"origin":"0000000000000abc","node":"web1",'
        '"time":"2025-11-23T03:53:20.123456Z","size":19,"headers":{"k":{"$bytes":"dg=="}},'
        '"value":{"status":500,"raw":{"$bytes":"AAE="}}}'
    )
    assert '"headers":{}' in to_json(Fields(message(None), now=0.0))


GOLDEN_FORMS: list[tuple[Any, str]] = [
    (None, "null"),
    (True, "true"),
    ("text", '"text"'),
    (7, "7"),
    (2**53 - 1, "9007199254740991"),
    (-(2**53) + 1, "-9007199254740991"),
    (2**53, '{"$int":"9007199254740992"}'),
    (2**64 - 1, '{"$int":"18446744073709551615"}'),
    (-(2**63), '{"$int":"-9223372036854775808"}'),
    (1.0, "1.0"),
    (-0.0, "-0.0"),
    (math.nan, '{"$float":"nan"}'),
    (math.inf, '{"$float":"inf"}'),
    (-math.inf, '{"$float":"-inf"}'),
    (b"", '{"$bytes":""}'),
    (b"\xff\x00", '{"$bytes":"/wA="}'),
    (datetime(2026, 11, 23, 3, 54, 31, 300401, tzinfo=UTC), '{"$time":"2026-11-23T03:54:31.300401Z"}'),
    (datetime(1, 1, 1, tzinfo=UTC), '{"$time":"0001-01-01T00:00:00.000000Z"}'),
    (Ext(-5, b"\x01"), '{"$ext":[-5,"AQ=="]}'),
    ([1, [2]], "[1,[2]]"),
    ({"a": {"b": 1}}, '{"a":{"b":1}}'),
    ({}, "{}"),
    ({1: "one"}, '{"$map":[[1,"one"]]}'),
    ({"a": 1, None: 2}, '{"$map":[["a",1],[null,2]]}'),
    ({(1, (b"x", 2.5)): 3}, '{"$map":[[[1,[{"$bytes":"eA=="},2.5]],3]]}'),
    ({"$bytes": 7}, '{"$map":[["$bytes",7]]}'),
    ({"$map": []}, '{"$map":[["$map",[]]]}'),
    ({"$ref": 7}, '{"$ref":7}'),  # none of the forms: not touched
    ({"$bytes": 7, "a": 1}, '{"$bytes":7,"a":1}'),  # the forms have exactly one key
]


@pytest.mark.parametrize(("value", "text"), GOLDEN_FORMS, ids=[text for _, text in GOLDEN_FORMS])
def test_each_kind_of_value_has_its_form(value: Any, text: str) -> None:
    assert value_to_json(value) == text
    assert same(parse_value(text, True), value)


class Reading(msgspec.Struct):
    sensor: str
    values: set[int]


def test_what_only_typed_subscriptions_hand_out_is_written_as_it_travels() -> None:
    assert value_to_json(Reading("a", {1})) == '{"sensor":"a","values":[1]}'
    assert value_to_json([(1, bytearray(b"x"))]) == '[[1,{"$bytes":"eA=="}]]'
    assert value_to_json(datetime(2026, 1, 1)) == '"2026-01-01T00:00:00"'


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_depth_is_bounded() -> None:
    assert parse_value(value_to_json(nested(JSON_DEPTH_MAX)), True) == nested(JSON_DEPTH_MAX)
    cut = value_to_json(nested(JSON_DEPTH_MAX + 1))
    assert cut == "[" * JSON_DEPTH_MAX + '{"$deep":null}' + "]" * JSON_DEPTH_MAX
    assert json.loads(value_to_json(nested(50_000)))  # deeper than the stack
    with pytest.raises(ParseError, match="nothing to read"):
        parse_value(cut, True)
    with pytest.raises(ParseError, match="nested too deep"):
        parse_value("[" * 5_000 + "]" * 5_000, True)


@pytest.mark.parametrize(
    ("character", "escaped"),
    [
        ("\x1b", "\\u001b"),
        ("\x7f", "\\u007f"),
        ("\x9b", "\\u009b"),  # CSI in one character
        ("\u2028", "\\u2028"),
        ("\u202e", "\\u202e"),  # right-to-left override
        ("\u200b", "\\u200b"),
        ("\U000e0041", "\\udb40\\udc41"),  # an invisible tag
    ],
)
def test_json_cannot_steer_the_terminal(character: str, escaped: str) -> None:
    value = {character: [character]}
    text = to_json(Fields(Message(f"t{character}", value, 1, 1, 0.0, value), now=0.0, node=character))
    assert text.isprintable()
    assert text.count(escaped) == 6
    row = json.loads(text)
    assert row["topic"] == f"t{character}"
    assert row["value"] == row["headers"] == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "truncated"),
        ("{", "truncated"),
        ("NaN", "malformed"),
        ("'a'", "malformed"),
        ("1 2", "trailing"),
        ("1e999", "out of range"),
        ('"\\ud800"', "JSON value"),
        ("18446744073709551616", "more than 64 bits"),
        ("-9223372036854775809", "more than 64 bits"),
        ('{"$int": 5}', "$int takes an integer as text"),
        ('{"$int": "5.0"}', "$int takes an integer as text"),
        ('{"$int": "18446744073709551616"}', "more than 64 bits"),
        ('{"$float": "1.5"}', '$float takes "nan"'),
        ('{"$float": []}', '$float takes "nan"'),
        ('{"$bytes": "A"}', "$bytes takes base64"),
        ('{"$bytes": "é"}', "$bytes takes base64"),
        ('{"$bytes": 5}', "$bytes takes base64"),
        ('{"$time": "yesterday"}', "Invalid RFC3339"),
        ('{"$time": "2026-01-01T00:00:00"}', "with a zone"),
        ('{"$time": 5.5e300}', "JSON value"),
        ('{"$ext": [128, ""]}', "$ext takes a code"),
        ('{"$ext": [-1, ""]}', "$ext takes a code"),
        ('{"$ext": [1]}', "$ext takes a code"),
        ('{"$ext": 1}', "$ext takes a code"),
        ('{"$map": {}}', "$map takes pairs"),
        ('{"$map": [[1]]}', "$map takes pairs"),
        ('{"$map": [[{}, 1]]}', "cannot be a key"),
        ('{"$map": [[[{"$ext": [1, ""]}], 1]]}', "cannot be a key"),
        ('{"$deep": null}', "nothing to read"),
    ],
)
def test_what_is_no_value_says_why(text: str, reason: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_value(text, True)
    assert isinstance(caught.value, ZmqbusError)
    assert reason in str(caught.value)
    assert caught.value.text == text


def test_without_json_the_text_is_the_value() -> None:
    assert parse_value('{"a": 1}', False) == '{"a": 1}'
    assert parse_value("", False) == ""
    for as_json in (False, True):
        with pytest.raises(ParseError, match="not UTF-8"):
            parse_value("caf\udce9", as_json)  # a Latin-1 argument, as Python hands it over


def test_unknown_one_key_maps_pass_through() -> None:
    assert parse_value('{"$ref": "#/x", "$bytes": 1}', True) == {"$ref": "#/x", "$bytes": 1}
    assert parse_value('{"$ref": [9007199254740993]}', True) == {"$ref": [2**53 + 1]}


def same(a: Any, b: Any) -> bool:
    """Equal in value and type as msgpack tells them apart, NaN included: 1, 1.0 and True differ."""
    return msgspec.msgpack.encode(a) == msgspec.msgpack.encode(b)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.just(math.nan)
    | st.text()
    | st.binary()
    | st.datetimes(timezones=st.just(UTC))
)
KEYS = SCALARS | st.tuples(SCALARS, st.tuples(SCALARS)) | st.sampled_from(["$bytes", "$int", "$map", "$deep"])
VALUES = st.recursive(
    SCALARS | st.builds(Ext, st.integers(-128, 127).filter(lambda code: code != -1), st.binary()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@settings(max_examples=150)
@given(VALUES, st.none() | st.dictionaries(st.text(), VALUES, max_size=2), st.text(), st.text())
def test_any_message_is_one_printable_line_of_json_that_reads_back(
    value: Any, headers: Any, topic: str, node: str
) -> None:
    text = to_json(Fields(Message(topic, value, 7, 2**64 - 1, 1.5, headers), now=2.0, node=node))
    assert text.isprintable()
    row = strict_json(text)
    assert list(row) == ["topic", "seq", "origin", "node", "time", "size", "headers", "value"]
    assert (row["topic"], row["node"], row["origin"]) == (topic, node, "f" * 16)
    assert same(parse_value(json.dumps(row["value"]), True), value)
    assert same(parse_value(json.dumps(row["headers"]), True), headers or {})
    assert same(parse_value(value_to_json(value), True), value)


@settings(max_examples=150)
@given(st.text() | VALUES.map(value_to_json) | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")))
def test_any_text_is_a_value_or_a_parse_error(text: str) -> None:
    try:
        value = parse_value(text, True)
    except ParseError:
        return
    msgspec.msgpack.encode(value)


# --- numbers for people ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10_200, "10 KiB"),
        (1023 * 1024, "1023 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (64 * 2**20, "64 MiB"),
        (2**30, "1 GiB"),
        (2**40, "1 TiB"),
        (2**63, "8192 PiB"),
    ],
)
def test_human_bytes(n: int, text: str) -> None:
    assert human_bytes(n) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0, "0/s"),
        (0.2, "0.2/s"),
        (9.94, "9.9/s"),
        (9.96, "10/s"),
        (350, "350/s"),
        (999.6, "1.0k/s"),
        (1234, "1.2k/s"),
        (2.6e6, "2.6M/s"),
        (5e12, "5000G/s"),
    ],
)
def test_human_rate(rate: float, text: str) -> None:
    assert human_rate(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0ms"),
        (0.0003, "0.3ms"),
        (0.00994, "9.9ms"),
        (0.00996, "10ms"),
        (0.9994, "999ms"),
        (0.9996, "1.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.7, "1h00m"),
        (7800, "2h10m"),
        (86_399.9, "1d00h"),
        (273_600, "3d04h"),
        (-0.5, "-500ms"),
        (math.nan, "?"),
        (math.inf, "?"),
        (-math.inf, "?"),
    ],
)
def test_human_age(seconds: float, text: str) -> None:
    assert human_age(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10.0),
        ("10", 10.0),
        (" 1.5 ", 1.5),
        ("500ms", 0.5),
        ("250us", 0.00025),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        ("1.5h", 5400.0),
        ("2d", 172_800.0),
        ("1w2d3h4m5s6ms", 788_645.006),
        (" 0s ", 0.0),
        ("36500d", DURATION_S_MAX),
    ],
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "write a number and a unit"),
        ("s", "write a number and a unit"),
        ("1h30", "write a number and a unit"),
        ("-1h", "write a number and a unit"),
        ("1 h", "write a number and a unit"),
        ("1e3s", "write a number and a unit"),
        (".5s", "write a number and a unit"),
        ("10S", "write a number and a unit"),
        ("٣s", "write a number and a unit"),
        ("infs", "write a number and a unit"),
        ("30m1h", "larger units come first"),
        ("1h1h", "larger units come first"),
        ("36501d", "longer than a century"),
        ("9" * 400 + "d", "longer than a century"),
    ],
)
def test_parse_duration_refuses(text: str, reason: str) -> None:
    with pytest.raises(ParseError, match=reason) as caught:
        parse_duration(text)
    assert caught.value.what == "duration"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("64K", 65_536),
        ("64k", 65_536),
        ("64KiB", 65_536),
        ("64Ki", 65_536),
        ("64KB", 64_000),
        ("10G", 10 * 2**30),
        ("1.5MiB", 1_572_864),
        (" 2 TiB ", 2 * 2**40),
        ("1.1GiB", 1_181_116_006),
        (str(SIZE_BYTES_MAX), SIZE_BYTES_MAX),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "write a number of bytes"),
        ("K", "write a number of bytes"),
        ("-1", "write a number of bytes"),
        ("1.5", "write a number of bytes"),
        ("1.5B", "write a number of bytes"),
        ("1e6", "write a number of bytes"),
        ("1,000", "write a number of bytes"),
        ("64X", "write a number of bytes"),
        ("64Kx", "write a number of bytes"),
        ("٣K", "write a number of bytes"),
        ("9" * 50, "write a number of bytes"),
        (str(SIZE_BYTES_MAX + 1), "more than any disk"),
        ("8388608T", "more than any disk"),
    ],
)
def test_parse_size_refuses(text: str, reason: str) -> None:
    with pytest.raises(ParseError, match=reason) as caught:
        parse_size(text)
    assert caught.value.what == "size"


@settings(max_examples=150)
@given(st.text(max_size=30) | st.from_regex(r"[0-9.]{1,25}\s?[kKmMgGtTiIbBsdhwu]{0,3}", fullmatch=True))
def test_any_text_is_a_number_in_range_or_a_parse_error(text: str) -> None:
    for parse, limit in ((parse_duration, DURATION_S_MAX), (parse_size, SIZE_BYTES_MAX)):
        try:
            number = parse(text)
        except ParseError as error:
            assert repr(text)[:20] in str(error)  # noqa: PT017 (either outcome is right)
        else:
            assert 0 <= number <= limit


def test_a_long_text_is_shown_in_part() -> None:
    with pytest.raises(ParseError) as caught:
        parse_size("x" * 1000)
    assert len(str(caught.value)) < 300
    assert caught.value.text == "x" * 1000
