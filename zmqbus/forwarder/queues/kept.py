"""What the cursor of a queue or group says on disk, beside its offset. Pure functions of values and bytes.

The offset is a **place**: everything of the queue before it is settled. Behind it a stretch of `reach` offsets follows
in which all is settled but what `left` names: runs of messages that are not. Behind that stretch nothing is settled.
`tried` are runs that were tried in vain, and how often. Offsets of other topics in between count as settled.

    left     ( skip | 2 * count + partly | done, (count + 7) // 8 bytes, if partly is 1 )*
    tried    ( skip | count | attempts )*

`skip`: how far behind the end of the run before it (the place, for the first) a run begins; `count`: of its messages;
`done`: bits of those of it that are settled after all, bit 0 the first. Numbers are of 7 bits to a byte, the lowest
first; the eighth says that there are more.

So this is a few bytes where work goes on in order, and two or three for each batch that was passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Annotated

import msgspec
from msgspec import Meta

QUEUE_PREFIX, GROUP_PREFIX = "$queue ", "$group "
NAME_BYTES_MAX = 255  # of a cursor
HASH_BYTES = 8
TRIED_MAX = 1024  # runs; more are forgotten when the forwarder ends, which costs an attempt too many

U64 = Annotated[int, Meta(ge=0)]


class Kept(msgspec.Struct, array_like=True):
    """A queue has a topic, a group a name and patterns."""

    topic: str = ""
    group: str = ""
    patterns: list[str] = []
    since_ns: U64 = 0
    """A group is not concerned with what was published before, ns since 1970."""
    reach: U64 = 0
    left: bytes = b""
    tried: bytes = b""


class Run(msgspec.Struct, gc=False):
    """Messages from offset `start` to before `end`, of which those in `done` are settled."""

    start: int
    end: int
    done: int = 0


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Kept)


def encode(kept: Kept) -> bytes:
    """The data of a cursor."""
    return _encoder.encode(kept)


def decode(data: bytes) -> Kept:
    """What `encode` made. Raises ValueError."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from None


def cursor_name(kept: Kept) -> str:
    """The name of the cursor, for people; one that is too long is cut, and told apart by a hash."""
    if kept.topic:
        name = QUEUE_PREFIX + kept.topic
    else:
        name = GROUP_PREFIX + " ".join((kept.group, *kept.patterns))
    encoded = name.encode()
    if len(encoded) <= NAME_BYTES_MAX:
        return name
    mark = f"… {blake2b(encoded, digest_size=HASH_BYTES).hexdigest()}"
    return encoded[: NAME_BYTES_MAX - len(mark.encode())].decode(errors="ignore") + mark


def pack_runs(place: int, runs: Iterable[Run]) -> bytes:
    """As `left` has them. Runs of which nothing is settled are put together where they follow each other."""
    packed = bytearray()
    at = place
    start = end = -1  # of the last run of which nothing is settled, not written yet
    for run in runs:
        if run.start == end and not run.done:
            end = run.end
            continue
        if end >= 0:
            _put(packed, start - at, 2 * (end - start))
            at, end = end, -1
        if run.done:
            count = run.end - run.start
            _put(packed, run.start - at, 2 * count + 1)
            packed += run.done.to_bytes((count + 7) // 8, "little")
            at = run.end
        else:
            start, end = run.start, run.end
    if end >= 0:
        _put(packed, start - at, 2 * (end - start))
    return bytes(packed)


def unpack_runs(place: int, packed: bytes) -> list[Run]:
    """The runs again. Raises ValueError."""
    runs = []
    rest = iter(packed)
    for skip in _numbers(rest):
        count, partly = divmod(_number(rest), 2)
        start = place + skip
        place = start + count
        done = int.from_bytes(bytes(_byte(rest) for _ in range((count + 7) // 8)), "little") if partly else 0
        runs.append(Run(start, place, done))
    return runs


def pack_tried(place: int, tried: Iterable[tuple[int, int]]) -> bytes:
    """As `tried` has them, from (offset, attempts) in order."""
    runs: list[list[int]] = []
    for offset, attempts in tried:
        if runs and offset == runs[-1][1] and attempts == runs[-1][2]:
            runs[-1][1] += 1
        elif len(runs) == TRIED_MAX:
            break
        else:
            runs.append([offset, offset + 1, attempts])
    packed = bytearray()
    for start, end, attempts in runs:
        _put(packed, start - place, end - start, attempts)
        place = end
    return bytes(packed)


def unpack_tried(place: int, packed: bytes) -> dict[int, int]:
    """By offset. Raises ValueError."""
    tried: dict[int, int] = {}
    rest = iter(packed)
    for skip in _numbers(rest):
        count, attempts = _number(rest), _number(rest)
        tried.update(dict.fromkeys(range(place + skip, place + skip + count), attempts))
        place += skip + count
    return tried


def _put(packed: bytearray, *numbers: int) -> None:
    for number in numbers:
        while number > 0x7F:
            packed.append(number & 0x7F | 0x80)
            number >>= 7
        packed.append(number)


def _numbers(rest: Iterator[int]) -> Iterator[int]:
    """The first number of each run, as long as there are any."""
    for byte in rest:
        yield _number(rest, byte)


def _number(rest: Iterator[int], byte: int | None = None) -> int:
    byte = _byte(rest) if byte is None else byte
    number, shift = byte & 0x7F, 7
    while byte > 0x7F:
        byte = _byte(rest)
        number |= (byte & 0x7F) << shift
        shift += 7
    return number


def _byte(rest: Iterator[int]) -> int:
    byte = next(rest, None)
    if byte is None:
        raise ValueError("it is cut short")
    return byte
