"""PUB frames: how a batch of messages looks on the wire and in a journal. Pure functions of bytes.

    offset 0                 n   n+1                                                        n+33
           +-----------------+---+----------------------------------------------------------+---------+
           | topic, n bytes  | 0 | header, 32 bytes, little endian                          | payload |
           | UTF-8           |   | version  kind  flags  count  origin  first seq  time_ns  |         |
           |                 |   |   u8      u8    u16    u32    u64      u64        u64    |         |
           +-----------------+---+----------------------------------------------------------+---------+

The topic stands first because ZeroMQ filters by prefix, and the zero ends it so that `sensor.1` does not also
select `sensor.10`. A frame is sent as one part (multipart costs four to five times more in Python), except
that a single value of EXTERNAL_BYTES_MIN or more travels as a second part, so that it need not be copied.

    kind        first seq                          count        payload
    DATA        of the first message in the batch  1 or more    the messages, see below
    HEAD        the next one the stream will use   0            none: "you should have all before this"
    HEARTBEAT   a count of heartbeats, to look at  0            none: "I am here", on topic $hb
    BALLAST     0                                  0            none: takes a place in a queue, see below

    DATA flags            payload is
    (none)                one msgpack array of `count` values
    HEADERS               one msgpack array of two arrays: `count` values, `count` header maps (or nil)
    EXTERNAL              as above, but in a second message part; count is 1
    EXTERNAL | RAW        a second part that *is* the one value, of msgpack type bin, without any packing
    QUEUED                beside any of these: the messages are jobs, each to be done by one worker

    HEAD flags            says also
    ASKS                  somebody waits for a forwarder's acknowledgement of all before this

ZeroMQ limits a queue in messages. So that it is limited in bytes as well, publishers let each 256 KiB of a large
message be followed by one BALLAST frame on its topic. Receivers ignore them.

Other flags, and RAW in other company, are refused: who does not know a flag cannot read the payload. Other kinds are
let pass by `parse_header`, to be ignored: they may be news of a later version, but never messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any

import msgspec

from zmqbus.errors import RemoteProtocolError, SetupError, UnsupportedValue

VERSION = 1

DATA = 1
HEAD = 2
HEARTBEAT = 3
BALLAST = 4

HEADERS = 1
EXTERNAL = 2
RAW = 4
QUEUED = 8

ASKS = 1

_EXTERNALS = (EXTERNAL, EXTERNAL | HEADERS, EXTERNAL | RAW)

HEADER = Struct("<BBHIQQQ")
HEADER_BYTES = HEADER.size
ORDER = Struct("<IQQQ")  # what of it differs between ordinary frames of one stream: count, origin, first seq, time_ns
SEQ_MAX = 2**64 - 1

EXTERNAL_BYTES_MIN = 16 * 1024  # below this one copy is cheaper than a second part
MESSAGE_BYTES_MAX = 64 * 1024 * 1024  # what a receiver may have to hold for one message
FRAME_BYTES_MAX = MESSAGE_BYTES_MAX + 64 * 1024  # the same with topic, header and a full batch around it

HEARTBEAT_PREFIX = b"$hb\0"


class Batch(msgspec.Struct, gc=False):
    """One to many consecutive messages of one stream, still encoded. `parts` are the wire parts, verbatim."""

    topic: bytes
    flags: int
    count: int
    origin: int
    first: int
    time_ns: int
    parts: tuple[bytes, ...]

    @property
    def end(self) -> int:
        """One past the seq of the last message."""
        return self.first + self.count

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return sum(map(len, self.parts))


def encode_frame(
    prefix: bytes,
    kind: int,
    flags: int,
    count: int,
    origin: int,
    first: int,
    time_ns: int,
    payload: bytes = b"",
) -> bytes:
    """Build one frame; `prefix` is the topic and its zero. Arguments are the caller's own and not checked."""
    return prefix + HEADER.pack(VERSION, kind, flags, count, origin, first, time_ns) + payload


def parse_header(frame: bytes) -> tuple[int, int, int, int, int, int, int]:
    """Split a frame: (length of topic, kind, flags, count, origin, first seq, time_ns).

    Every field is checked here, so that later code may believe them.

    Raises:
        RemoteProtocolError: the frame is not of this protocol; says which rule it breaks.
    """
    cut = frame.find(0, 0, 256)
    if cut <= 0:
        raise RemoteProtocolError("frame: no topic of 1 to 255 bytes before a zero byte")
    if len(frame) < cut + 1 + HEADER_BYTES:
        raise RemoteProtocolError(f"frame: {len(frame)} bytes, too short for its header")
    version, kind, flags, count, origin, first, time_ns = HEADER.unpack_from(frame, cut + 1)
    if version != VERSION:
        raise RemoteProtocolError(f"frame: version {version}, this node speaks {VERSION}")
    if kind == HEAD and not first:
        raise RemoteProtocolError("frame: HEAD without a seq")
    if kind == DATA:
        if not first or not count or first + count - 1 > SEQ_MAX:
            raise RemoteProtocolError(f"frame: bad seq range, {count} from {first}")
        form = flags & ~QUEUED
        if form <= HEADERS:
            if count > len(frame) - cut - HEADER_BYTES - 2:  # a value takes a byte, the array around them one more
                raise RemoteProtocolError(f"frame: {count} values cannot be in {len(frame)} bytes")
        elif form not in _EXTERNALS:
            raise RemoteProtocolError(f"frame: flags {flags:#06x} have no meaning")
        elif count != 1 or len(frame) != cut + 1 + HEADER_BYTES:
            raise RemoteProtocolError("frame: an external value must be alone, with an empty payload")
    return cut, kind, flags, count, origin, first, time_ns


def decode_batches(parts: Sequence[bytes]) -> list[Batch]:
    """Batches out of a row of message parts, as a BATCHES command carries them.

    Raises:
        RemoteProtocolError: a part is not a DATA frame, or an external value is missing.
    """
    batches = []
    rest = iter(parts)
    for frame in rest:
        cut, kind, flags, count, origin, first, time_ns = parse_header(frame)
        if kind != DATA:
            raise RemoteProtocolError(f"batch: kind {kind}, expected DATA")
        own: tuple[bytes, ...] = (frame,)
        if flags & EXTERNAL:
            if not (value := next(rest, b"")):
                raise RemoteProtocolError("batch: the external value is missing or empty")
            own = (frame, value)
        batches.append(Batch(frame[:cut], flags, count, origin, first, time_ns, own))
    return batches


def cut_batch(batch: Batch, first: int, last: int) -> Batch:
    """Messages `first` to `last` of a batch, as a batch of their own. What is asked for is in it.

    Raises:
        RemoteProtocolError: its payload is not `count` values of msgpack.
    """
    if first == batch.first and last == batch.end - 1:
        return batch
    try:
        if batch.flags & HEADERS:
            both = _raw_pair.decode(_payload(batch))
            whole = [part[first - batch.first : last + 1 - batch.first] for part in both if len(part) == batch.count]
            payload = _encoder.encode(whole) if len(whole) == 2 else b""
        else:
            values = _raw_values.decode(_payload(batch))
            payload = _encoder.encode(values[first - batch.first : last + 1 - batch.first])
            payload = payload if len(values) == batch.count else b""
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"payload: {error}") from None
    if not payload:
        raise RemoteProtocolError(f"payload: not the {batch.count} values that the header says")
    count = last + 1 - first
    header = HEADER.pack(VERSION, DATA, batch.flags, count, batch.origin, first, batch.time_ns)
    frame = b"".join((batch.topic, b"\0", header, payload))
    return Batch(batch.topic, batch.flags, count, batch.origin, first, batch.time_ns, (frame,))


def decoder_of(value_type: Any) -> msgspec.msgpack.Decoder[Any]:
    """Decodes one value into a type; None: into whatever it is. Raises SetupError for what no value can become."""
    try:
        return msgspec.msgpack.Decoder(Any if value_type is None else value_type)
    except Exception as error:
        advice = "use one that msgspec can decode, as a Struct, a dataclass or list[int]"
        raise SetupError(f"type={value_type!r}: {error}; {advice}") from None


class ValueDecoder:
    """Decodes the values of a batch by one C call; with a type, straight into instances of it."""

    def __init__(self, value_type: Any = None) -> None:
        """Raises SetupError for what no value can become."""
        item: Any = Any if value_type is None else value_type
        self._item = decoder_of(value_type)
        items: Any = list.__class_getitem__(item)
        pair: Any = tuple.__class_getitem__((items, list[dict[str, Any] | None]))
        self._values = msgspec.msgpack.Decoder(items)
        self.plain: Callable[[Any], list[Any]] = self._values.decode
        """The values of a payload without flags; for a driver that checks their number itself."""
        self._both = msgspec.msgpack.Decoder(pair)
        self._raw = msgspec.msgpack.Decoder(list[msgspec.Raw])
        self._raw_both = msgspec.msgpack.Decoder(tuple[list[msgspec.Raw], list[dict[str, Any] | None]])
        self._typed = value_type is not None and value_type is not bytes

    def decode(self, batch: Batch) -> tuple[list[Any], list[dict[str, Any] | None] | None]:
        """The values, and the headers if there are any.

        Raises:
            RemoteProtocolError: the payload is not `count` values of msgpack.
            msgspec.ValidationError: something is not of the type it should be; `decode_each` tells what.
        """
        flags = batch.flags
        if flags & RAW:
            return [self._from_raw(batch.parts[1])], None
        payload = _payload(batch)
        headers: list[dict[str, Any] | None] | None = None
        try:
            if flags & HEADERS:
                values, headers = self._both.decode(payload)
            else:
                values = self._values.decode(payload)
        except msgspec.ValidationError:
            raise
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise RemoteProtocolError(f"payload: {error}") from None
        if len(values) != batch.count or (headers is not None and len(headers) != batch.count):
            raise RemoteProtocolError(f"payload: {len(values)} values where the header says {batch.count}")
        return values, headers

    def decode_each(self, batch: Batch) -> tuple[list[Any], list[dict[str, Any] | None] | None]:
        """Like `decode`, but a value that does not fit comes back as its ValidationError, in its place.

        Raises:
            RemoteProtocolError: the payload is not `count` values of msgpack.
        """
        if batch.flags & RAW:
            try:
                return [self._from_raw(batch.parts[1])], None
            except msgspec.ValidationError as error:
                return [error], None
        headers: list[dict[str, Any] | None] | None = None
        try:
            if batch.flags & HEADERS:
                raws, headers = self._raw_both.decode(_payload(batch))
            else:
                raws = self._raw.decode(_payload(batch))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise RemoteProtocolError(f"payload: {error}") from None
        if len(raws) != batch.count or (headers is not None and len(headers) != batch.count):
            raise RemoteProtocolError(f"payload: {len(raws)} values where the header says {batch.count}")
        values: list[Any] = []
        for raw in raws:
            try:
                values.append(self._item.decode(raw))
            except msgspec.ValidationError as error:
                values.append(error)
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                raise RemoteProtocolError(f"payload: {error}") from None
        return values, headers

    def _from_raw(self, value: bytes) -> Any:
        return self._item.decode(_encoder.encode(value)) if self._typed else value


def _payload(batch: Batch) -> bytes | memoryview:
    if batch.flags & EXTERNAL:
        return batch.parts[1]
    return memoryview(batch.parts[0])[len(batch.topic) + 1 + HEADER_BYTES :]


_encoder = msgspec.msgpack.Encoder()
_raw_values = msgspec.msgpack.Decoder(list[msgspec.Raw])
_raw_pair = msgspec.msgpack.Decoder(tuple[list[msgspec.Raw], list[msgspec.Raw]])


def encode_value(value: object) -> bytes:
    """One value as msgpack.

    Raises:
        UnsupportedValue: msgpack has no place for it; names the type.
    """
    try:
        return _encoder.encode(value)
    except RecursionError:
        raise UnsupportedValue(value, "it is nested too deeply, or contains itself") from None
    except Exception as error:  # a user's own type may raise anything from its hooks
        raise UnsupportedValue(value, str(error)) from error


encode_values = _encoder.encode


def array_header(count: int) -> bytes:
    """The msgpack bytes that open an array of `count` items."""
    if count < 16:
        return bytes((0x90 | count,))
    if count < 0x10000:
        return b"\xdc" + count.to_bytes(2, "big")
    return b"\xdd" + count.to_bytes(4, "big")


def array_body(values: list[Any]) -> bytes:
    """The msgpack bytes of the items alone, to be joined with others under one `array_header`."""
    count = len(values)
    return _encoder.encode(values)[1 if count < 16 else 3 if count < 0x10000 else 5 :]
