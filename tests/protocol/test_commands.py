"""ROUTER commands: pinned byte by byte, every bound at its edge, read by another msgpack library, and fuzzed."""

from __future__ import annotations

import tracemalloc
from typing import Any, get_type_hints

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqbus.errors import RemoteProtocolError
from zmqbus.protocol import commands
from zmqbus.protocol.commands import (
    BODIES,
    BODY_BYTES_MAX,
    ENVELOPE,
    HEADS_PER_COMMAND,
    LOG_BATCHES_MAX,
    PATTERNS_MAX,
    PEERS_PER_HELLO,
    SERVICES_MAX,
    SUBSCRIPTIONS_MAX,
    Body,
    Command,
    UnknownCommand,
    decode_command,
    encode_command,
)

BIG = 2**64 - 1

# Of each command: a body, and its bytes.
INTRODUCTION: dict[str, Any] = {
    "origin": 1,
    "name": "n",
    "bus": "b",
    "epoch": 2,
    "inbox": ["tcp://127.0.0.1:5"],
    "pub_port": 6,
    "host": "h",
    "pid": 7,
    "release": "0.1",
}
INTRODUCTION_HEX = (
    "de0009 a6 6f726967696e 01  a4 6e616d65 a1 6e  a3 627573 a1 62  a5 65706f6368 02"
    "a5 696e626f78 91 b1 7463703a2f2f3132372e302e302e313a35  a8 7075625f706f7274 06  a4 686f7374 a1 68"
    "a3 706964 07  a7 72656c65617365 a3 302e31"
)
GOLDEN: list[tuple[Body, str]] = [
    (commands.Hello(**INTRODUCTION), INTRODUCTION_HEX),
    (commands.Welcome(**INTRODUCTION), INTRODUCTION_HEX),
    (commands.Bye(), "80"),
    (commands.Subscribe(3, ["a.*", "b.>"]), "82 a2 6964 03 a8 7061747465726e73 92 a3 612e2a a3 622e3e"),
    (commands.Unsubscribe(BIG), "81 a2 6964 cf ffffffffffffffff"),
    (
        commands.Heads(3, [(b"a.b", 1), (b"c", 2**63)], True),
        "83 a2 6964 03 a5 6865616473 92 92 c4 03 612e62 01 92 c4 01 63 cf 8000000000000000 a4 6d6f7265 c3",
    ),
    (
        commands.Fetch(b"a", 0x1122334455667788, 5, 9, 4096),
        "85 a5 746f706963 c4 01 61 a6 6f726967696e cf 1122334455667788 a5 6669727374 05 a4 6c617374 09"
        "a5 6279746573 cd 1000",
    ),
    (
        commands.Batches(b"a", 0x1122334455667788, 5, 9),
        "84 a5 746f706963 c4 01 61 a6 6f726967696e cf 1122334455667788 a5 6669727374 05 a4 6c617374 09",
    ),
    (
        commands.Ack(5, 0x1122334455667788, [(b"a", 9), (b"b", 0)], True),
        "84 a7 6a6f75726e616c 05 a6 6f726967696e cf 1122334455667788"
        "a5 6865616473 92 92 c4 01 61 09 92 c4 01 62 00 a4 66756c6c c3",
    ),
    (
        commands.Read(3, ["a.*"], 65536, "indexer", 7, 8),
        "86 a2 6964 03 a8 7061747465726e73 91 a3 612e2a a6 637265646974 ce 00010000"
        "a6 637572736f72 a7 696e6465786572 a7 74696d655f6e73 07 a6 6f6666736574 08",
    ),
    (
        commands.Log(3, 5, 12, 40, [(9, 60, 0), (11, 50, 2**32)], [(7, 8)]),
        "86 a2 6964 03 a7 6a6f75726e616c 05 a4 6e657874 0c a3 656e64 28"
        "a7 62617463686573 92 93 09 3c 00 93 0b 32 cf 0000000100000000 a7 64726f70706564 91 92 07 08",
    ),
    (commands.Credit(3, 65536), "82 a2 6964 03 a5 6279746573 ce 00010000"),
    (
        commands.Commit("indexer", 12, 3, True),
        "84 a6 637572736f72 a7 696e6465786572 a6 6f6666736574 0c a2 6964 03 a6 666f72676574 c3",
    ),
    (commands.Unread(3), "81 a2 6964 03"),
    (
        commands.Offer(0x1122334455667788, [(b"a", 9)]),
        "82 a6 6f726967696e cf 1122334455667788 a5 6865616473 91 92 c4 01 61 09",
    ),
    (
        commands.Join(3, ["a.*"], "g", 500, 7),
        "85 a2 6964 03 a8 7061747465726e73 91 a3 61 2e 2a a5 67726f7570 a1 67 "
        "a8 6c656173655f6d73 cd 01 f4 a6 637265646974 07",
    ),
    (commands.Job(3, [(1, 2)]), "82 a2 6964 03 aa 64656c69766572696573 91 92 01 02"),
    (commands.Done(3, [(1, 5, 9)], 8), "83 a2 6964 03 a4 646f6e65 91 93 01 05 09 a6 637265646974 08"),
    (commands.Settled(3, [(1, 5, 9)]), "82 a2 6964 03 a7 72656675736564 91 93 01 05 09"),
    (
        commands.Fail(3, [(1, 5, 5)], "reject", -1, "no"),
        "84 a2 6964 03 a4 6a6f6273 91 93 01 05 05 a3 686f77 a6 72 65 6a 65 63 74 a6 726561736f6e a2 6e 6f",
    ),
    (commands.Extend(3, 1, 500), "83 a2 6964 03 a8 64656c6976657279 01 a8 6c656173655f6d73 cd 01 f4"),
    (commands.Leave(3), "81 a2 6964 03"),
    (commands.Stats(True, 1000), "82 a6 746f70696373 c3 a4 736b6970 cd 03e8"),
    (
        commands.Statistics({"peers": 2, "load": 0.5, "os": "x"}, [(b"a", 0, 300)], True, [("i", 12, True)]),
        "84 a8 636f756e74657273 83 a5 7065657273 02 a4 6c6f6164 cb 3fe0000000000000 a2 6f73 a1 78"
        "a6 746f70696373 91 93 c4 01 61 00 cd 012c a4 6d6f7265 c3 a7 637572736f7273 91 93 a1 69 0c c3",
    ),
    (
        commands.Request("a.b", 300, 0x1122334455667788),
        "83 a7 73657276696365 a3 612e62 aa 74696d656f75745f6d73 cd 012c a6 6f726967696e cf 1122334455667788",
    ),
    (commands.Reply("E", "no"), "82 a5 6572726f72 a1 45 a4 74657874 a2 6e6f"),
    (commands.Serve(["a", "b.c"]), "81 a8 7365727669636573 92 a1 61 a3 622e63"),
    (commands.Error("bus", "no"), "82 a4 636f6465 a3 627573 a6 726561736f6e a2 6e6f"),
]
FULL = commands.Hello(
    **INTRODUCTION
    | {"version_max": 2, "role": "forwarder", "claims": ["logs.>"], "journal": 5, "peers": [(9, "tcp://10.0.0.6:7")]}
    | {"subscriptions": [commands.Subscribed(3, ["a.*"])]}
)
CODES = {body: code for code, body in BODIES.items()}
BY_NAME = {type(body).__name__: body for body, _ in GOLDEN}


def wire(code: int, body: Any, *, version: int = 1, request: int = 7) -> bytes:
    packed = body if isinstance(body, bytes) else msgpack.packb(body)
    return ENVELOPE.pack(code, version, request, 0, len(packed)) + packed


def packed_body(body: Body) -> bytes:
    return encode_command(body)[ENVELOPE.size :]


def refusal(frame: bytes) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_command(frame)
    assert len(str(caught.value)) <= 1000  # it goes into an ERROR
    return str(caught.value)


# --- golden bytes ------------------------------------------------------------------------------


def test_every_command_has_a_vector() -> None:
    assert {type(body) for body, _ in GOLDEN} >= set(BODIES.values())


@pytest.mark.parametrize(("body", "expected"), GOLDEN, ids=BY_NAME)
def test_golden_commands(body: Body, expected: str) -> None:
    code = CODES[type(body)]
    packed = bytes.fromhex(expected)
    envelope = bytes([code, 1]) + bytes.fromhex("0102000000000080 00000000") + len(packed).to_bytes(4, "little")
    frame = encode_command(body, 0x8000000000000201)
    assert frame == envelope + packed
    assert decode_command(frame) == Command(0x8000000000000201, body, [])


def test_codes_are_for_ever() -> None:
    assert {body.__name__: code for code, body in BODIES.items()} == {
        "Hello": 1,
        "Welcome": 2,
        "Bye": 3,
        "Subscribe": 4,
        "Unsubscribe": 5,
        "Heads": 6,
        "Fetch": 7,
        "Batches": 8,
        "Ack": 9,
        "Read": 10,
        "Log": 11,
        "Credit": 12,
        "Commit": 13,
        "Unread": 14,
        "Offer": 15,
        "Join": 16,
        "Job": 17,
        "Done": 18,
        "Settled": 19,
        "Fail": 20,
        "Extend": 21,
        "Leave": 22,
        "Stats": 24,
        "Statistics": 25,
        "Request": 26,
        "Reply": 27,
        "Serve": 28,
        "Error": 255,
    }


def test_another_library_reads_and_writes_the_same() -> None:
    for body, _ in [*GOLDEN, (FULL, "")]:
        understood = msgpack.unpackb(packed_body(body))
        assert isinstance(understood, dict)
        code = CODES[type(body)]
        assert decode_command(wire(code, understood)).body == body
        reversed_fields = dict(reversed(understood.items()))
        assert decode_command(wire(code, reversed_fields)).body == body


def test_batches_ride_along_verbatim() -> None:
    body = commands.Batches(b"a", 1, 1, 2)
    frame = encode_command(body, 5, [b"one", b"", b"three"])
    assert frame[10:30] == bytes.fromhex("03000000") + frame[14:18] + bytes.fromhex("03000000 00000000 05000000")
    assert frame.endswith(b"onethree")
    assert decode_command(frame) == Command(5, body, [b"one", b"", b"three"])


def test_a_frame_is_as_long_as_it_says() -> None:
    frame = encode_command(commands.Batches(b"a", 1, 1, 2), 5, [b"one", b"", b"three"])
    for size in range(ENVELOPE.size, len(frame)):
        assert "is not as long as it says" in refusal(frame[:size])
    assert "is not as long as it says" in refusal(frame + b"\0")
    for at in range(10, 30):
        wrong = bytearray(frame)
        wrong[at] ^= 0x40
        assert refusal(bytes(wrong))


def test_a_number_of_parts_that_cannot_be_allocates_nothing() -> None:
    tracemalloc.start()
    try:
        assert refusal(ENVELOPE.pack(3, 1, 0, 2**32 - 1, 1) + b"\x80" * 1000)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_absent_fields_have_their_defaults() -> None:
    body = decode_command(wire(1, INTRODUCTION)).body
    assert isinstance(body, commands.Hello)
    assert (body.version_min, body.version_max, body.role, body.journal) == (1, 1, "node", 0)
    assert body.claims == body.subscriptions == body.peers == []
    fetch = decode_command(wire(7, {"topic": b"a", "origin": 1, "first": 1, "last": 1})).body
    assert isinstance(fetch, commands.Fetch)
    assert fetch.bytes == 1024 * 1024
    assert decode_command(wire(24, {})).body == commands.Stats(False, 0)
    assert decode_command(wire(6, {"id": 1, "heads": []})).body == commands.Heads(1, [], False)
    assert decode_command(wire(9, {"journal": 1, "origin": 2})).body == commands.Ack(1, 2, [], False)
    reading = {"id": 1, "patterns": ["a"], "credit": 0}
    assert decode_command(wire(10, reading)).body == commands.Read(1, ["a"], 0, "", 0, BIG)
    log = {"id": 1, "journal": 2, "next": 3, "end": 4}
    assert decode_command(wire(11, log)).body == commands.Log(1, 2, 3, 4, [], [])
    assert decode_command(wire(13, {"cursor": "i", "offset": 1})).body == commands.Commit("i", 1, 0, False)
    assert decode_command(wire(25, {"counters": {}})).body == commands.Statistics({}, [], False, [])


# --- the envelope ------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(BODIES))
def test_unknown_fields_are_ignored(code: int) -> None:
    body = msgpack.unpackb(packed_body(BY_NAME[BODIES[code].__name__]))
    more = {**body, "later": {"deep": [1, [2]], "raw": b"\xff"}, "": None}
    assert decode_command(wire(code, more)) == decode_command(wire(code, body))


@pytest.mark.parametrize("code", sorted(set(range(256)) - set(BODIES)))
def test_unknown_commands_are_told_from_broken_ones(code: int) -> None:
    with pytest.raises(UnknownCommand, match=f"command {code} is not known") as caught:
        decode_command(wire(code, b"whatever that body is", request=BIG))
    assert caught.value.request == BIG


@pytest.mark.parametrize("size", range(ENVELOPE.size))
def test_a_frame_that_is_too_short_for_an_envelope(size: int) -> None:
    assert "too short for an envelope" in refusal(ENVELOPE.pack(3, 1, 0, 0, 0)[:size])


@pytest.mark.parametrize("code", sorted(BODIES))
def test_other_versions_are_refused_except_where_they_are_negotiated(code: int) -> None:
    body = packed_body(BY_NAME[BODIES[code].__name__])
    for version in (0, 2, 255):
        if code in (1, 2):
            assert type(decode_command(wire(code, body, version=version)).body) is BODIES[code]
        else:
            assert f"version {version}" in refusal(wire(code, body, version=version))


# --- bodies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [b"", b"\xc0", b"\x90", b"\x01", b"\x81", b"\x80\x80", b"\xc1", b"\x81\x01\x01", b"\xdf\xff\xff\xff\xff"]
)
@pytest.mark.parametrize("code", sorted(BODIES))
def test_a_body_is_one_map_with_text_for_keys(code: int, body: bytes) -> None:
    assert refusal(wire(code, body)).startswith(f"{BODIES[code].__name__.upper()}: ")


@pytest.mark.parametrize("code", sorted(BODIES))
def test_every_required_field_is_required_and_typed(code: int) -> None:
    cls = BODIES[code]
    good = msgpack.unpackb(packed_body(FULL if code in (1, 2) else BY_NAME[cls.__name__]))
    for field in msgspec.structs.fields(cls):
        without = {name: value for name, value in good.items() if name != field.encode_name}
        if field.required:
            assert f"missing required field `{field.encode_name}`" in refusal(wire(code, without))
        else:
            decode_command(wire(code, without))
        assert refusal(wire(code, {**good, field.encode_name: None}))
        assert refusal(wire(code, {**good, field.encode_name: -2 if field.encode_name != "counters" else [1]}))


def hello(**fields: Any) -> bytes:
    return wire(1, INTRODUCTION | fields)


def heads(n: int) -> dict[str, Any]:
    return {"id": 1, "heads": [(b"x" * 255, BIG)] * n}


def fetching(**fields: Any) -> bytes:
    return wire(7, {"topic": b"a", "origin": 1, "first": 1, "last": 1} | fields)


def statistics(n: int, cursors: int = 0) -> bytes:
    return wire(25, {"counters": {}, "topics": [(b"a", 1, 1)] * n, "cursors": [("i", BIG, True)] * cursors})


def acking(**fields: Any) -> bytes:
    return wire(9, {"journal": 1, "origin": 1} | fields)


def reading(**fields: Any) -> bytes:
    return wire(10, {"id": 1, "patterns": ["a"], "credit": 0} | fields)


def log(**fields: Any) -> bytes:
    return wire(11, {"id": 1, "journal": 1, "next": 1, "end": 1} | fields)


def committing(**fields: Any) -> bytes:
    return wire(13, {"cursor": "i", "offset": 1} | fields)


def offering(*heads: Any) -> bytes:
    return wire(15, {"origin": 1, "heads": heads})


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (hello(origin=BIG), hello(origin=-1)),
        (hello(name="x" * 255), hello(name="x" * 256)),
        (hello(name="x"), hello(name="")),
        (hello(bus="x" * 255), hello(bus="")),
        (hello(inbox=["tcp://x:1"] * 64), hello(inbox=["tcp://x:1"] * 65)),
        (hello(inbox=["x" * 300]), hello(inbox=["x" * 301])),
        (hello(pub_port=65535), hello(pub_port=65536)),
        (hello(pub_port=1), hello(pub_port=0)),
        (hello(host="x" * 255), hello(host="x" * 256)),
        (hello(host=""), hello(host=b"")),
        (hello(release="x" * 64), hello(release="x" * 65)),
        (hello(role="x" * 32), hello(role="x" * 33)),
        (hello(claims=["a"] * PATTERNS_MAX), hello(claims=["a"] * (PATTERNS_MAX + 1))),
        (hello(claims=[]), hello(claims=[""])),
        (
            hello(subscriptions=[{"id": 1, "patterns": []}] * SUBSCRIPTIONS_MAX),
            hello(subscriptions=[{"id": 1, "patterns": []}] * (SUBSCRIPTIONS_MAX + 1)),
        ),
        (
            hello(subscriptions=[{"id": 1, "patterns": ["a"] * PATTERNS_MAX}]),
            hello(subscriptions=[{"id": 1, "patterns": ["a"] * (PATTERNS_MAX + 1)}]),
        ),
        (hello(peers=[(1, "x")] * PEERS_PER_HELLO), hello(peers=[(1, "x")] * (PEERS_PER_HELLO + 1))),
        (hello(peers=[(1, "x")]), hello(peers=[(1, "x", 2)])),
        (hello(services=["x" * 255] * SERVICES_MAX), hello(services=["x"] * (SERVICES_MAX + 1))),
        (wire(28, {"services": ["x" * 255] * SERVICES_MAX}), wire(28, {"services": ["x"] * (SERVICES_MAX + 1)})),
        (wire(28, {"services": []}), wire(28, {"services": [""]})),
        (wire(26, {"service": "x" * 255}), wire(26, {"service": ""})),
        (wire(26, {"service": "x", "timeout_ms": BIG}), wire(26, {"service": "x", "timeout_ms": -1})),
        (wire(27, {"error": "x" * 255, "text": "x" * 10_000}), wire(27, {"error": "x" * 256})),
        (wire(27, {}), wire(27, {"text": "x" * 10_001})),
        (wire(4, {"id": 0, "patterns": ["a"] * PATTERNS_MAX}), wire(4, {"id": 0, "patterns": ["a"] * 257})),
        (wire(4, {"id": 0, "patterns": ["x" * 255]}), wire(4, {"id": 0, "patterns": ["x" * 256]})),
        (wire(6, heads(HEADS_PER_COMMAND)), wire(6, heads(HEADS_PER_COMMAND + 1))),
        (wire(6, {"id": 1, "heads": [(b"a", 1)]}), wire(6, {"id": 1, "heads": [(b"a", 0)]})),
        (wire(6, {"id": 1, "heads": [(b"a", 1)]}), wire(6, {"id": 1, "heads": [(b"", 1)]})),
        (wire(6, {"id": 1, "heads": [(b"a", 1)]}), wire(6, {"id": 1, "heads": [("a", 1)]})),
        (fetching(topic=b"x" * 255), fetching(topic=b"x" * 256)),
        (fetching(first=1), fetching(first=0)),
        (fetching(last=BIG), fetching(last=0)),
        (fetching(bytes=1), fetching(bytes=0)),
        (fetching(origin=BIG), fetching(origin=1.0)),
        (statistics(HEADS_PER_COMMAND), statistics(HEADS_PER_COMMAND + 1)),
        (acking(heads=[(b"x" * 255, BIG)] * HEADS_PER_COMMAND), acking(heads=[(b"x", 1)] * (HEADS_PER_COMMAND + 1))),
        (acking(heads=[(b"a", 0)]), acking(heads=[(b"a", -1)])),
        (acking(heads=[(b"a", 1)]), acking(heads=[(b"", 1)])),
        (reading(patterns=["a"] * PATTERNS_MAX), reading(patterns=["a"] * (PATTERNS_MAX + 1))),
        (reading(patterns=["x" * 255]), reading(patterns=["x" * 256])),
        (reading(cursor="x" * 255), reading(cursor="x" * 256)),
        (reading(credit=BIG, offset=BIG, time_ns=BIG), reading(credit=-1)),
        (log(batches=[(BIG, BIG, BIG)] * LOG_BATCHES_MAX), log(batches=[(1, 1, 0)] * (LOG_BATCHES_MAX + 1))),
        (log(batches=[(1, 1, 0)]), log(batches=[(1, 1)])),
        (log(dropped=[(BIG, BIG)] * LOG_BATCHES_MAX), log(dropped=[(1, 1)] * (LOG_BATCHES_MAX + 1))),
        (wire(12, {"id": 1, "bytes": 0}), wire(12, {"id": 1, "bytes": -1})),
        (committing(cursor="x" * 255), committing(cursor="x" * 256)),
        (committing(offset=0), committing(cursor="")),
        (offering(*[(b"x" * 255, BIG)] * HEADS_PER_COMMAND), offering(*[(b"x", 1)] * (HEADS_PER_COMMAND + 1))),
        (offering((b"a", 1)), offering((b"a", 0))),
        (statistics(0, HEADS_PER_COMMAND), statistics(0, HEADS_PER_COMMAND + 1)),
        (wire(255, {"code": "x" * 64, "reason": ""}), wire(255, {"code": "x" * 65, "reason": ""})),
        (wire(255, {"code": "", "reason": "x" * 1000}), wire(255, {"code": "", "reason": "x" * 1001})),
    ],
    ids=range(55),
)
def test_bounds(good: bytes, bad: bytes) -> None:
    assert len(good) - ENVELOPE.size <= BODY_BYTES_MAX
    decode_command(good)
    assert refusal(bad)


def test_every_list_and_text_of_every_command_is_bounded() -> None:
    """So that nobody adds a field that a peer may fill without end (a map of counters is bounded by its body)."""
    for cls in (*BODIES.values(), commands.Subscribed):
        for name, hint in get_type_hints(cls, include_extras=True).items():
            described = msgspec.inspect.type_info(hint)
            if isinstance(described, msgspec.inspect.ListType | msgspec.inspect.StrType | msgspec.inspect.BytesType):
                assert described.max_length, f"{cls.__name__}.{name}"


def test_a_body_is_bounded() -> None:
    padding = BODY_BYTES_MAX - len(msgpack.packb({"x": b""})) - 3
    largest = msgpack.packb({"x": b"\0" * padding})
    assert len(largest) == BODY_BYTES_MAX
    assert decode_command(wire(3, largest)).body == commands.Bye()
    assert "1,048,577 bytes; the limit is 1,048,576" in refusal(wire(3, largest + b"\0"))


@pytest.mark.parametrize("deep", [b"\x91" * 100_000 + b"\x01", b"\x81\xa1k" * 100_000 + b"\x01"])
def test_deep_nesting_is_refused(deep: bytes) -> None:
    assert refusal(wire(24, b"\x81\xa4more" + deep))
    assert refusal(wire(25, b"\x81\xa8counters" + deep))


@pytest.mark.parametrize("claim", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"])
def test_claims_of_billions_allocate_nothing(claim: bytes) -> None:
    tracemalloc.start()
    try:
        for field in (b"\xa2id", b"\xa8patterns", b"\xa5later"):
            assert refusal(wire(4, b"\x81" + field + claim + b"\x01" * 1000))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_largest_body_does_not_grow_out_of_proportion() -> None:
    """What a peer makes us hold for 1 MiB: small maps are the worst of msgpack, and all of them are skipped."""
    many = b"\xdd" + (1_000_000).to_bytes(4, "big") + b"\x80" * 1_000_000
    bodies = [b"\x81\xa5later" + many, b"\x81\xa5heads" + many, b"\x81\xa8counters" + many]
    for code in BODIES:
        for body in bodies:
            frame = wire(code, body)
            tracemalloc.start()
            try:
                decode_command(frame)
            except RemoteProtocolError:
                pass
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            assert peak < 20 * BODY_BYTES_MAX, code


# --- fuzz --------------------------------------------------------------------------------------


def digest(frame: bytes) -> None:
    """Refused, or a command that can be said again and then means the same."""
    try:
        command = decode_command(frame)
    except RemoteProtocolError:
        return
    assert type(command.body) is BODIES[frame[0]]
    again = encode_command(command.body, command.request, command.batches)
    meant = decode_command(again)
    assert encode_command(meant.body, meant.request, command.batches) == again  # by bytes: NaN is not NaN


@given(st.binary(max_size=200))
def test_random_frames(frame: bytes) -> None:
    digest(frame)


HINTS = [0x00, 0x80, 0x81, 0x8F, 0x90, 0x92, 0xA0, 0xA2, 0xC0, 0xC1, 0xC4, 0xC7, 0xCB, 0xCF, 0xD3, 0xD7, 0xDD, 0xDF]
BYTE = st.sampled_from(HINTS) | st.integers(0, 255)


@given(st.sampled_from(sorted(BODIES)), st.lists(BYTE, max_size=40).map(bytes))
@settings(max_examples=200)
def test_random_bodies(code: int, body: bytes) -> None:
    digest(wire(code, body))


@given(
    st.sampled_from([*(body for body, _ in GOLDEN), FULL]),
    st.lists(st.tuples(st.integers(0, 10_000), BYTE), max_size=4),
    st.integers(0, 10_000),
    st.booleans(),
)
@settings(max_examples=400)
def test_commands_mutated_and_cut(body: Body, mutations: list[tuple[int, int]], size: int, extend: bool) -> None:
    code, mutated = CODES[type(body)], bytearray(packed_body(body))
    for at, byte in mutations:
        mutated[at % len(mutated)] = byte
    digest(wire(code, bytes(mutated)))
    cut = bytes(mutated[: size % len(mutated)])
    digest(wire(code, cut + bytes(mutated) if extend else cut))
    whole = bytearray(encode_command(body, 3, [b"a part"]))
    for at, byte in mutations:
        whole[at % len(whole)] = byte
    digest(bytes(whole))


@pytest.mark.parametrize("name", BY_NAME)
def test_every_prefix_is_refused(name: str) -> None:
    body, frame = packed_body(BY_NAME[name]), encode_command(BY_NAME[name])
    for size in range(len(body)):
        refusal(wire(CODES[type(BY_NAME[name])], body[:size]))
    for size in range(len(frame)):
        refusal(frame[:size])
