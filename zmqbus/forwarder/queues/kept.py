"""What the cursor of a queue or group says on disk, beside its offset. Pure functions of values and bytes.

The offset is a **place**: everything of the queue before it is settled. Behind it a stretch of `reach` offsets follows
in which all is settled that is not named by `left`: runs of messages that are not, each with how far behind the end of
the one before it begins, how many messages it has, and the bits of those that are settled after all (little endian;
bit 0 is the first; what is missing is zero). Behind that stretch nothing is settled. `tried` are runs likewise: how far
behind, how many, and how often these were tried in vain.

Offsets of other topics in between count as settled. So this is a few bytes where work goes on in order, and where it
does not it is bounded by what may be loaded at a time: see `WORKS_MAX` in backlog.py.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    left: list[tuple[U64, U64, bytes]] = []
    tried: list[tuple[U64, U64, U64]] = []


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


def pack_runs(place: int, runs: Iterable[Run]) -> list[tuple[int, int, bytes]]:
    """As `left` has them. Runs of which nothing is settled are put together where they follow each other."""
    packed: list[tuple[int, int, bytes]] = []
    at, open_since = place, -1  # where the last run ended; where it began, if it can be continued
    for run in runs:
        if not run.done and run.start == at and open_since >= 0:
            packed[-1] = (packed[-1][0], run.end - open_since, b"")
        else:
            bits = run.done.to_bytes((run.done.bit_length() + 7) // 8, "little")
            packed.append((run.start - at, run.end - run.start, bits))
            open_since = -1 if run.done else run.start
        at = run.end
    return packed


def unpack_runs(place: int, packed: Iterable[tuple[int, int, bytes]]) -> list[Run]:
    """The runs again."""
    runs = []
    for skip, count, bits in packed:
        runs.append(Run(place + skip, place + skip + count, int.from_bytes(bits, "little")))
        place = runs[-1].end
    return runs


def pack_tried(place: int, tried: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """As `tried` has them, from (offset, attempts) in order."""
    packed: list[tuple[int, int, int]] = []
    at = place
    for offset, attempts in tried:
        if packed and offset == at and attempts == packed[-1][2]:
            packed[-1] = (packed[-1][0], packed[-1][1] + 1, attempts)
        elif len(packed) == TRIED_MAX:
            break
        else:
            packed.append((offset - at, 1, attempts))
        at = offset + 1
    return packed


def unpack_tried(place: int, packed: Iterable[tuple[int, int, int]]) -> dict[int, int]:
    """By offset."""
    tried: dict[int, int] = {}
    for skip, count, attempts in packed:
        tried.update(dict.fromkeys(range(place + skip, place + skip + count), attempts))
        place += skip + count
    return tried
