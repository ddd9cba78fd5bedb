"""PUB frames: pinned byte by byte, round trips checked against another msgpack library, and fuzzed."""

from __future__ import annotations

import dataclasses
import datetime
import math
import tracemalloc
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zmqbus.errors import RemoteProtocolError, UnsupportedValue
from zmqbus.protocol import frames
from zmqbus.protocol.frames import (
    DATA,
    EXTERNAL,
    HEAD,
    HEADER_BYTES,
    HEADERS,
    HEARTBEAT,
    HEARTBEAT_PREFIX,
    QUEUED,
    RAW,
    SEQ_MAX,
    Batch,
    ValueDecoder,
    array_body,
    array_header,
    decode_batches,
    encode_frame,
    encode_value,
    encode_values,
    parse_header,
)

ORIGIN = 0x1122334455667788
TIME = 1_700_000_000_000_000_000


def data(payload: bytes, *, flags: int = 0, count: int = 1, first: int = 1, topic: bytes = b"t") -> bytes:
    return encode_frame(topic + b"\0", DATA, flags, count, ORIGIN, first, TIME, payload)


def batch(payload: bytes, *, flags: int = 0, count: int = 1, external: bytes | None = None) -> Batch:
    frame = data(payload, flags=flags, count=count)
    (made,) = decode_batches([frame] if external is None else [frame, external])
    return made


# --- golden bytes ------------------------------------------------------------------------------

#        topic  0   version, kind, flags, count     origin            first seq         time_ns
GOLDEN = {
    "one value": (
        "6c 6f 67 73  00  01 01 0000 01000000  8877665544332211  0500000000000000  00002a36fe9c9717  91 a2 6869",
        lambda: encode_frame(b"logs\0", DATA, 0, 1, ORIGIN, 5, TIME, encode_values(["hi"])),
    ),
    "a batch": (
        "61  00  01 01 0000 03000000  8877665544332211  0100000000000000  00002a36fe9c9717  93 01 c4 01 ff c0",
        lambda: encode_frame(b"a\0", DATA, 0, 3, ORIGIN, 1, TIME, encode_values([1, b"\xff", None])),
    ),
    "headers": (
        "61  00  01 01 0100 02000000  8877665544332211  0100000000000000  00002a36fe9c9717"
        "92  92 01 02  92 c0 81 a1 6b a1 76",
        lambda: encode_frame(b"a\0", DATA, HEADERS, 2, ORIGIN, 1, TIME, encode_values([[1, 2], [None, {"k": "v"}]])),
    ),
    "external": (
        "61  00  01 01 0200 01000000  8877665544332211  0700000000000000  00002a36fe9c9717",
        lambda: encode_frame(b"a\0", DATA, EXTERNAL, 1, ORIGIN, 7, TIME),
    ),
    "external and raw": (
        "61  00  01 01 0600 01000000  8877665544332211  ffffffffffffffff  00002a36fe9c9717",
        lambda: encode_frame(b"a\0", DATA, EXTERNAL | RAW, 1, ORIGIN, SEQ_MAX, TIME),
    ),
    "jobs": (
        "61  00  01 01 0800 02000000  8877665544332211  0300000000000000  00002a36fe9c9717  92 a1 78 a1 79",
        lambda: encode_frame(b"a\0", DATA, QUEUED, 2, ORIGIN, 3, TIME, encode_values(["x", "y"])),
    ),
    "head": (
        "61  00  01 02 0000 00000000  8877665544332211  0800000000000000  00002a36fe9c9717",
        lambda: encode_frame(b"a\0", HEAD, 0, 0, ORIGIN, 8, TIME),
    ),
    "heartbeat": (
        "24 68 62  00  01 03 0000 00000000  8877665544332211  2a00000000000000  00002a36fe9c9717",
        lambda: encode_frame(HEARTBEAT_PREFIX, HEARTBEAT, 0, 0, ORIGIN, 42, TIME),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frames(name: str) -> None:
    expected, make = GOLDEN[name]
    assert make() == bytes.fromhex(expected)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frames_are_read(name: str) -> None:
    frame = bytes.fromhex(GOLDEN[name][0])
    cut, kind, flags, count, origin, first, time_ns = parse_header(frame)
    assert encode_frame(frame[: cut + 1], kind, flags, count, origin, first, time_ns, frame[cut + 33 :]) == frame
    assert (origin, time_ns) == (ORIGIN, TIME)


def test_header_is_32_bytes_little_endian_without_padding() -> None:
    assert HEADER_BYTES == 32
    assert frames.HEADER.format == "<BBHIQQQ"


# --- the rules of the header -------------------------------------------------------------------


def broken(frame: bytes) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_header(frame)
    return str(caught.value)


def test_topic_is_1_to_255_bytes_and_ends_in_a_zero() -> None:
    assert parse_header(data(b"\x91\xc0", topic=b"x" * 255))[0] == 255
    assert "no topic" in broken(data(b"\x91\xc0", topic=b"x" * 256))
    assert "no topic" in broken(data(b"\x91\xc0", topic=b""))
    assert "no topic" in broken(b"")
    assert "no topic" in broken(b"no zero anywhere")


@pytest.mark.parametrize("size", range(HEADER_BYTES))
def test_header_cut_short_is_refused(size: int) -> None:
    frame = data(b"\x91\xc0")
    assert "too short" in broken(frame[: 2 + size])


def test_other_versions_are_refused() -> None:
    frame = bytearray(data(b"\x91\xc0"))
    for version in (0, 2, 255):
        frame[2] = version
        assert f"version {version}" in broken(bytes(frame))


@pytest.mark.parametrize(
    ("count", "first", "good"),
    [(1, 1, True), (1, 0, False), (0, 1, False), (1, SEQ_MAX, True), (2, SEQ_MAX, False), (2, SEQ_MAX - 1, True)],
)
def test_seqs_begin_at_1_and_end_within_64_bits(count: int, first: int, good: bool) -> None:
    frame = data(bytes([0x90 | count]) + b"\xc0" * count, count=count, first=first)
    if good:
        assert parse_header(frame)[5] == first
    else:
        assert "bad seq range" in broken(frame)


@pytest.mark.parametrize("count", [1, 2, 15, 200])
def test_count_must_fit_the_payload(count: int) -> None:
    frame = data(array_header(count) + b"\xc0" * count, count=count)
    assert parse_header(frame)[3] == count
    tight = array_header(count) if count < 16 else b"\x90"  # the least that could hold so many
    assert parse_header(data(tight + b"\xc0" * count, count=count))[3] == count
    assert "cannot be in" in broken(data(tight + b"\xc0" * (count - 1), count=count))


def test_four_billion_values_are_refused_before_anything_is_allocated() -> None:
    assert "4294967295 values cannot be in" in broken(data(b"\x91\xc0", count=0xFFFFFFFF))


@pytest.mark.parametrize("flags", range(32))
def test_only_flags_with_a_meaning_are_let_in(flags: int) -> None:
    frame = data(b"" if flags & EXTERNAL else b"\x92\x91\xc0\x91\xc0", flags=flags)
    if flags & ~QUEUED in (0, HEADERS, EXTERNAL, EXTERNAL | HEADERS, EXTERNAL | RAW):
        assert parse_header(frame)[2] == flags
    else:
        assert "have no meaning" in broken(frame)


def test_later_flags_are_refused() -> None:
    assert "0x8000" in broken(data(b"\x91\xc0", flags=0x8000))


def test_external_value_stands_alone() -> None:
    assert "must be alone" in broken(data(b"", flags=EXTERNAL, count=2))
    assert "must be alone" in broken(data(b"\xc0", flags=EXTERNAL))


def test_head_names_a_seq() -> None:
    assert "HEAD without a seq" in broken(encode_frame(b"t\0", HEAD, 0, 0, ORIGIN, 0, TIME))


@pytest.mark.parametrize("kind", [0, 4, 255])
def test_unknown_kinds_can_be_recognised_and_ignored(kind: int) -> None:
    assert parse_header(encode_frame(b"t\0", kind, 0xFFFF, 7, ORIGIN, 0, TIME, b"anything"))[1] == kind


# --- batches -----------------------------------------------------------------------------------


def test_batches_come_back_verbatim_with_their_external_values() -> None:
    parts = [data(b"\x92\x01\x02", count=2), data(b"", flags=EXTERNAL | RAW, first=3), b"raw", data(b"\x91\x01")]
    first, second, third = decode_batches(parts)
    assert (first.parts, first.topic, first.first, first.end, first.size) == ((parts[0],), b"t", 1, 3, len(parts[0]))
    assert (second.parts, second.first, second.end) == ((parts[1], b"raw"), 3, 4)
    assert third.parts == (parts[3],)
    assert decode_batches([]) == []


def test_batches_are_data_and_complete() -> None:
    with pytest.raises(RemoteProtocolError, match="kind 2"):
        decode_batches([encode_frame(b"t\0", HEAD, 0, 0, ORIGIN, 1, TIME)])
    with pytest.raises(RemoteProtocolError, match="missing"):
        decode_batches([data(b"", flags=EXTERNAL)])
    with pytest.raises(RemoteProtocolError, match="no topic"):
        decode_batches([data(b"\x91\x01"), b"not a frame"])


# --- values ------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=40)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5), max_leaves=10
)


def same(one: Any, two: Any) -> bool:
    """Equal, and of the same types all the way down: True is not 1, and 1.0 is not 1."""
    if type(one) is not type(two):
        return False
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    return bool(one == two)


@given(st.lists(VALUES, min_size=1, max_size=40))
@example([-(2**63), 2**64 - 1, 0, -1, 2**63, 127, 128, -32, -33])
@example([math.inf, -math.inf, 0.0, 5e-324, 1.7976931348623157e308])
@example([True, 1, 1.0, b"1", "1", None, [], {}, b"", ""])
@example(["\0", "ä€😀", {"": {"": [[]]}}, [None] * 20, {str(n): n for n in range(20)}])
def test_values_come_back_exactly(values: list[Any]) -> None:
    payload = encode_values(values)
    assert same(msgpack.unpackb(payload), values)  # what another library makes of our bytes
    for made in (payload, msgpack.packb(values), array_header(len(values)) + array_body(values)):
        decoded, headers = ValueDecoder().decode(batch(made, count=len(values)))
        assert same(decoded, values)
        assert headers is None


def test_nan_and_negative_zero_come_back() -> None:
    (nan, zero), _ = ValueDecoder().decode(batch(encode_values([math.nan, -0.0]), count=2))
    assert math.isnan(nan)
    assert math.copysign(1, zero) == -1
    assert math.isnan(msgpack.unpackb(encode_value(math.nan)))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 65535, 65536, 70000])
def test_array_header_and_body_make_the_array(count: int) -> None:
    values = ["x", 7] * count
    values = values[:count]
    assert array_header(count) + array_body(values) == encode_values(values) == msgpack.packb(values)


def test_largest_array_header() -> None:
    assert array_header(2**32 - 1) == b"\xdd\xff\xff\xff\xff"


def test_headers_come_back() -> None:
    headers = [None, {"trace": "ab", "n": 1}]
    made = batch(b"\x92" + encode_values(["a", "b"]) + encode_values(headers), flags=HEADERS, count=2)
    assert ValueDecoder().decode(made) == (["a", "b"], headers)
    assert ValueDecoder().decode_each(made) == (["a", "b"], headers)
    assert ValueDecoder(str).decode(made) == (["a", "b"], headers)


def test_external_values_come_back() -> None:
    big = "x" * 20_000
    packed = batch(b"", flags=EXTERNAL, external=encode_values([big]))
    with_headers = batch(b"", flags=EXTERNAL | HEADERS, external=encode_values([[big], [{"k": 1}]]))
    for decoder in (ValueDecoder(), ValueDecoder(str)):
        assert decoder.decode(packed) == decoder.decode_each(packed) == ([big], None)
        assert decoder.decode(with_headers) == decoder.decode_each(with_headers) == ([big], [{"k": 1}])


def test_raw_value_is_handed_over_without_a_copy() -> None:
    big = b"x" * 20_000
    made = batch(b"", flags=EXTERNAL | RAW, external=big)
    for decoder in (ValueDecoder(), ValueDecoder(bytes)):
        assert decoder.decode(made)[0][0] is big
        assert decoder.decode_each(made)[0][0] is big


@dataclasses.dataclass
class Point:
    x: int
    y: int


def test_structured_values_travel_as_maps_and_lists() -> None:
    assert msgpack.unpackb(encode_value(Point(1, 2))) == {"x": 1, "y": 2}
    assert msgpack.unpackb(encode_value((1, (2, 3)))) == [1, [2, 3]]
    assert msgpack.unpackb(encode_value(bytearray(b"ab"))) == b"ab"
    assert msgpack.unpackb(encode_value({1: "one"}), strict_map_key=False) == {1: "one"}


class Opaque:
    pass


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Opaque(), "Opaque"),
        ([1, {"k": Opaque()}], "Opaque"),
        (2**64, "int"),
        (-(2**63) - 1, "int"),
        ({"k": 2**64}, "dict"),
        (1j, "complex"),
        (lambda: 0, "function"),
        ("half \ud800", "str"),
        ({Opaque(): 1}, "Opaque"),
        (LOOP, "list"),
        (range(3), "range"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_values_are_refused_by_name(value: Any, named: str) -> None:
    with pytest.raises(UnsupportedValue, match=named) as caught:
        encode_value(value)
    assert caught.value.value_type is type(value)


def test_errors_of_a_users_own_types_become_unsupported_value() -> None:
    class Spiteful(dict[str, int]):
        def items(self) -> Any:
            raise RuntimeError("no")

    class Late(datetime.tzinfo):
        def utcoffset(self, moment: datetime.datetime | None) -> Any:
            raise RuntimeError("which zone?")

    assert encode_value(Spiteful(a=1)) == b"\x81\xa1a\x01"  # dicts are read as dicts
    with pytest.raises(UnsupportedValue, match="which zone"):
        encode_value(datetime.datetime(2024, 1, 1, tzinfo=Late()))


# --- typed decoding ----------------------------------------------------------------------------


class Reading(msgspec.Struct):
    sensor: str
    celsius: float
    tags: list[str] = []


def test_typed_values() -> None:
    made = batch(encode_values([{"sensor": "a", "celsius": 1.5}, {"sensor": "b", "celsius": 2, "new": 0}]), count=2)
    assert ValueDecoder(Reading).decode(made)[0] == [Reading("a", 1.5), Reading("b", 2.0)]
    assert ValueDecoder(Reading).plain(made.parts[0][34:]) == [Reading("a", 1.5), Reading("b", 2.0)]
    assert ValueDecoder(dict[str, Any]).decode(made)[0][1] == {"sensor": "b", "celsius": 2, "new": 0}


def test_a_value_of_another_type_is_told_from_the_others() -> None:
    good, bad = {"sensor": "a", "celsius": 1.5}, {"sensor": "a"}
    for flags, payload in (
        (0, encode_values([good, bad, 7, good])),
        (HEADERS, encode_values([[good, bad, 7, good], [None, {"k": 1}, None, None]])),
    ):
        made = batch(payload, flags=flags, count=4)
        decoder = ValueDecoder(Reading)
        with pytest.raises(msgspec.ValidationError):
            decoder.decode(made)
        values, headers = decoder.decode_each(made)
        assert values[0] == values[3] == Reading("a", 1.5)
        assert isinstance(values[1], msgspec.ValidationError)
        assert "celsius" in str(values[1])
        assert isinstance(values[2], msgspec.ValidationError)
        assert headers == ([None, {"k": 1}, None, None] if flags else None)


def test_raw_bytes_for_a_subscription_of_another_type() -> None:
    made = batch(b"", flags=EXTERNAL | RAW, external=b"x" * 20_000)
    with pytest.raises(msgspec.ValidationError):
        ValueDecoder(Reading).decode(made)
    ((value,), _) = ValueDecoder(Reading).decode_each(made)
    assert isinstance(value, msgspec.ValidationError)
    assert ValueDecoder(bytearray).decode(made)[0] == [bytearray(b"x" * 20_000)]


# --- hostile payloads --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc0",  # not an array
        b"\x81\xa1k\x01",
        b"\x91",  # cut short
        b"\x91\xc1",  # never used in msgpack
        b"\x91\x01\x02",  # more after the end
        b"\x92\x01\x02",  # more than the header says
        b"\x90\xc0",
        b"\x91\xa2\xff\xfe",  # not UTF-8
        b"\x91\x81\x80\x01",  # a map for a key
        b"\x91\xdd\xff\xff\xff\xff\x00",  # four billion values
        b"\x91\xdf\xff\xff\xff\xff\x00",
        b"\x91\xdb\xff\xff\xff\xff\x00",
        b"\x91" * 100_000 + b"\x01",  # deep
        b"\x91" + b"\x81\xa1k" * 50_000 + b"\x01",
    ],
    ids=range(15),
)
@pytest.mark.parametrize("value_type", [None, bytes, list[int], Reading], ids=str)
@pytest.mark.parametrize("flags", [0, HEADERS, EXTERNAL, EXTERNAL | HEADERS])
def test_payloads_that_are_not_the_values_promised(payload: bytes, value_type: Any, flags: int) -> None:
    if flags & HEADERS:
        payload = b"\x92" + payload + b"\x91\xc0"
    frame = encode_frame(b"t\0", DATA, flags, 1, ORIGIN, 1, TIME, b"" if flags & EXTERNAL else payload)
    made = Batch(b"t", flags, 1, ORIGIN, 1, TIME, (frame, payload) if flags & EXTERNAL else (frame,))
    decoder = ValueDecoder(value_type)
    with pytest.raises((RemoteProtocolError, msgspec.ValidationError)):
        decoder.decode(made)
    try:
        values, _ = decoder.decode_each(made)
    except RemoteProtocolError:
        return
    assert value_type is not None  # of the wrong type already, whatever is in it
    assert list(map(type, values)) == [msgspec.ValidationError]


def test_wrong_number_of_headers() -> None:
    made = batch(b"\x92\x92\x01\x02\x91\xc0", flags=HEADERS, count=2)
    for decode in (ValueDecoder().decode, ValueDecoder().decode_each):
        with pytest.raises(RemoteProtocolError, match="where the header says 2"):
            decode(made)


@pytest.mark.parametrize("headers", [b"\x91\x01", b"\x91\xa1k", b"\x91\x81\x01\x01", b"\x01", b"\x80"])
def test_headers_that_are_no_maps(headers: bytes) -> None:
    made = batch(b"\x92\x91\x01" + headers, flags=HEADERS)
    with pytest.raises((RemoteProtocolError, msgspec.ValidationError)):
        ValueDecoder().decode(made)
    with pytest.raises(RemoteProtocolError):
        ValueDecoder().decode_each(made)


def test_nested_claims_of_billions_allocate_nothing() -> None:
    payload = b"\x91" + b"\xdd\x00\x0f\x42\x40" * 500 + b"\xc0" * 1_000_000  # each level claims all that is left
    made = batch(payload)
    decoder = ValueDecoder()
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            decoder.decode(made)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(payload)


# --- fuzz --------------------------------------------------------------------------------------

DECODERS = [ValueDecoder(value_type) for value_type in (None, bytes, str, dict[str, int], list[float], Reading)]


def digest(parts: list[bytes]) -> None:
    """What a node does with parts from the network: refuse them, or get well-formed batches with `count` values."""
    try:
        batches = decode_batches(parts)
    except RemoteProtocolError:
        return
    assert [part for made in batches for part in made.parts] == parts
    for made in batches:
        assert 1 <= len(made.topic) <= 255
        assert made.count >= 1
        assert 1 <= made.first < made.end <= SEQ_MAX + 1
        assert made.count <= made.size
        for decoder in DECODERS:
            for decode in (decoder.decode, decoder.decode_each):
                try:
                    values, headers = decode(made)
                except RemoteProtocolError:
                    continue
                except msgspec.ValidationError:
                    assert decode == decoder.decode  # decode_each has them in their places
                    continue
                assert len(values) == made.count
                assert headers is None or len(headers) == made.count


@given(st.binary(max_size=200))
def test_random_bytes(junk: bytes) -> None:
    digest([junk])
    digest([b"t\0" + bytes([1, 1]) + junk])


HINTS = [0x80, 0x81, 0x90, 0x91, 0x92, 0xA1, 0xC0, 0xC1, 0xC4, 0xC7, 0xD4, 0xD7, 0xD9, 0xDC, 0xDD, 0xDF, 0xFF]
HOSTILE = st.lists(st.sampled_from(HINTS) | st.integers(0, 255), max_size=30).map(bytes)


@given(
    HOSTILE,
    st.sampled_from([0, HEADERS, EXTERNAL, EXTERNAL | HEADERS, EXTERNAL | RAW, QUEUED, QUEUED | EXTERNAL | RAW]),
    st.integers(1, 4),
)
@settings(max_examples=300)
@example(b"\x93\xa1y\x02\xa1\x80", 0, 3)  # a wrong type before a wrong encoding
def test_random_payloads(payload: bytes, flags: int, count: int) -> None:
    if flags & EXTERNAL:
        digest([data(b"", flags=flags), payload])
    else:
        digest([data(payload, flags=flags, count=count)])


CANNED = [
    1,
    -(2**63),
    1.5,
    None,
    True,
    "text",
    b"bytes",
    "ä€😀" * 9,
    [1, [2, "x"]],
    {"k": {"k": [b"", ""]}},
    {"sensor": 0},
]


def frames_of(values: list[Any], flags: int) -> list[bytes]:
    payload = encode_values([values, [{"k": "v"}] * len(values)] if flags & HEADERS else values)
    if flags & EXTERNAL:
        return [data(b"", flags=flags), payload]
    return [data(payload, flags=flags, count=len(values))]


GOOD = st.builds(
    frames_of, st.lists(st.sampled_from(CANNED), min_size=1, max_size=5), st.sampled_from([0, HEADERS])
) | st.builds(
    lambda value, flags: frames_of([value], flags),
    st.sampled_from(CANNED),
    st.sampled_from([EXTERNAL, EXTERNAL | HEADERS]),
)


@given(GOOD, st.data())
@settings(max_examples=200)
def test_frames_mutated_cut_and_extended(parts: list[bytes], choose: st.DataObject) -> None:
    digest(parts)
    which = choose.draw(st.integers(0, len(parts) - 1))
    part = bytearray(parts[which])
    match choose.draw(st.sampled_from(["mutate", "cut", "extend", "insert", "drop"])):
        case "mutate":
            for at in choose.draw(st.lists(st.integers(0, len(part) - 1), min_size=1, max_size=3)):
                part[at] = choose.draw(st.sampled_from(HINTS) | st.integers(0, 255))
        case "cut":
            del part[choose.draw(st.integers(0, len(part) - 1)) :]
        case "extend":
            part += choose.draw(HOSTILE)
        case "insert":
            at = choose.draw(st.integers(0, len(part)))
            part[at:at] = choose.draw(HOSTILE)
        case "drop":
            digest(parts[:which] + parts[which + 1 :])
    digest([*parts[:which], bytes(part), *parts[which + 1 :]])


@pytest.mark.parametrize("parts", [[data(b"\x93\x01\xa1x\xc0", count=3)], [data(b"", flags=EXTERNAL), b"\x91\xa1x"]])
def test_every_prefix_of_a_frame_is_refused(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    for size in range(len(whole)):
        cut = [whole[:size]] if len(parts) == 1 else [whole[:size][: len(parts[0])], whole[len(parts[0]) : size]]
        refused = False
        try:
            for made in decode_batches(cut):
                ValueDecoder().decode(made)
        except RemoteProtocolError:
            refused = True
        assert refused, size
