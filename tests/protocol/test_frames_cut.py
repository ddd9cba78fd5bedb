"""A part of a batch, as a batch of its own: what a worker gets of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqbus.errors import RemoteProtocolError
from zmqbus.protocol.frames import (
    DATA,
    EXTERNAL,
    HEADERS,
    QUEUED,
    RAW,
    Batch,
    ValueDecoder,
    cut_batch,
    decode_batches,
    encode_frame,
    encode_values,
)

ORIGIN = 0x1122334455667788
TIME = 1_700_000_000_000_000_000


def batch(payload: bytes, flags: int, count: int, first: int = 1, external: bytes | None = None) -> Batch:
    frame = encode_frame(b"jobs.a\0", DATA, flags, count, ORIGIN, first, TIME, payload)
    (made,) = decode_batches([frame] if external is None else [frame, external])
    return made


def test_golden_cut() -> None:
    made = batch(encode_values(["a", "b", "c", "d"]), QUEUED, 4, first=10)
    cut = cut_batch(made, 11, 12)
    assert cut.parts == (
        bytes.fromhex(
            "6a6f62732e61 00  01 01 0800 02000000  8877665544332211  0b00000000000000  00002a36fe9c9717  92 a162 a163"
        ),
    )
    assert decode_batches(cut.parts) == [cut]


def test_golden_cut_with_headers() -> None:
    made = batch(encode_values([["a", "b", "c"], [None, {"k": 1}, {}]]), QUEUED | HEADERS, 3)
    cut = cut_batch(made, 2, 3)
    assert cut.parts == (
        bytes.fromhex(
            "6a6f62732e61 00  01 01 0900 02000000  8877665544332211  0200000000000000  00002a36fe9c9717"
            "92  92 a162 a163  92 81 a16b 01 80"
        ),
    )
    assert decode_batches(cut.parts) == [cut]


def test_all_of_it_is_the_batch_itself() -> None:
    made = batch(encode_values([1, 2, 3]), 0, 3, first=7)
    assert cut_batch(made, 7, 9) is made
    alone = batch(b"", QUEUED | EXTERNAL | RAW, 1, first=7, external=b"\0" * 20_000)
    assert cut_batch(alone, 7, 7) is alone


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(VALUES, min_size=1, max_size=40), st.booleans(), st.integers(1, 2**63), st.data())
def test_any_part(values: list[Any], headers: bool, first: int, choose: st.DataObject) -> None:
    own = [{"n": n} if n % 3 else None for n in range(len(values))]
    flags = QUEUED | HEADERS if headers else QUEUED
    made = batch(encode_values([values, own] if headers else values), flags, len(values), first)
    begin = choose.draw(st.integers(0, len(values) - 1))
    end = choose.draw(st.integers(begin, len(values) - 1))
    cut = cut_batch(made, first + begin, first + end)
    assert decode_batches(cut.parts) == [cut]
    assert (cut.topic, cut.flags, cut.origin, cut.time_ns) == (b"jobs.a", flags, ORIGIN, TIME)
    assert (cut.first, cut.end) == (first + begin, first + end + 1)
    assert ValueDecoder().decode(cut) == (values[begin : end + 1], own[begin : end + 1] if headers else None)


def test_values_are_not_packed_anew() -> None:
    """An integer that somebody packed longer than need be stays so: what is signed or compared is not changed."""
    made = batch(bytes.fromhex("93 01 cf0000000000000002 d90161"), 0, 3)
    assert cut_batch(made, 2, 3).parts[0].endswith(bytes.fromhex("92 cf0000000000000002 d90161"))


def test_extensions_pass() -> None:
    value = msgspec.msgpack.Ext(5, b"xyz")
    made = batch(encode_values([1, value, 3]), 0, 3)
    assert ValueDecoder().decode(cut_batch(made, 2, 2)) == ([value], None)


@pytest.mark.parametrize(
    ("payload", "flags"),
    [
        (b"\x92\x01\x02", 0),  # fewer than the header says
        (b"\x94\x01\x02\x03\x04", 0),  # more
        (b"\x93\x01\x02\x03\x04", 0),  # something behind them
        (b"\x93\x01\x02\xc1", 0),  # never used in msgpack
        (b"\x93\x01\x02\xa5x", 0),  # cut short
        (b"\x83\x01\x02\x03\x04\x05\x06", 0),  # a map
        (b"\x93\x01\x02" + b"\x91" * 100_000 + b"\x01", 0),  # deep
        (b"\x93\x01\x02\x03", HEADERS),  # not a pair
        (b"\x92\x93\x01\x02\x03\x92\xc0\xc0", HEADERS),  # too few headers
        (b"\x92\x92\x01\x02\x93\xc0\xc0\xc0", HEADERS),  # too few values
        (b"\x92\x93\x01\x02\x03\xc0", HEADERS),  # no headers
        (b"\x93\x93\x01\x02\x03\x93\xc0\xc0\xc0\xc0", HEADERS),  # one more
    ],
    ids=range(12),
)
def test_what_is_not_the_values_promised_cannot_be_cut(payload: bytes, flags: int) -> None:
    frame = encode_frame(b"t\0", DATA, flags, 3, ORIGIN, 1, TIME, payload)
    made = Batch(b"t", flags, 3, ORIGIN, 1, TIME, (frame,))
    with pytest.raises(RemoteProtocolError, match="payload"):
        cut_batch(made, 1, 2)
