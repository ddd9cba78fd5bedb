"""ROUTER commands: what nodes say to each other beside the messages. Pure functions of bytes.

A node asks through the DEALER it has for each peer; the peer's ROUTER sees the asker's identity in front and
answers to it. Without that identity, a command is one frame, however much it carries:

    command u8 | version u8 | request id u64 | number of parts u32 | bytes of the body u32, little endian
    bytes of each part u32
    body: one msgpack map, its fields below; unknown fields are ignored
    parts: batches, as verbatim PUB frames (an external value is a part of its own, after its frame)

For a socket that learns between two frames of one message that the connection is gone aborts its process, where it then
forgets what it was given (libzmq, `fq.cpp`, with IMMEDIATE).

The answer carries the request id of what it answers. A command that is not understood gets ERROR, never silence.

    asks                  is answered by
    HELLO                 WELCOME, then HEADS for each subscription that the HELLO named
    SUBSCRIBE             HEADS (the last has more = false)
    UNSUBSCRIBE           nothing
    FETCH                 BATCHES
    ACK                   nothing
    READ                  LOG, again and again, within the credit
    CREDIT                nothing, but more LOG
    COMMIT                COMMIT, once it is on disk
    UNREAD                nothing
    OFFER                 nothing
    JOIN                  JOB, again and again, within the credit
    DONE, FAIL            SETTLED, and within more credit more JOB
    EXTEND, LEAVE         nothing
    SERVE                 SERVE, once it is noted
    REQUEST               REPLY
    BYE                   BYE, once the peer has all it is owed
    STATS                 STATISTICS
    anything              ERROR, if it cannot be done
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from zmqbus.errors import RemoteProtocolError
from zmqbus.protocol.frames import VERSION

ENVELOPE = Struct("<BBQII")
SIZE = Struct("<I")
WITH_ONE = Struct(ENVELOPE.format + "I")  # both: most commands that have parts have one
BODY_BYTES_MAX = 1024 * 1024  # HEADS come in pieces well below this; nothing honest is larger
HEADS_PER_COMMAND = 2000  # 2000 topics of at most 255 bytes and a u64 stay below BODY_BYTES_MAX
PEERS_PER_HELLO = 256  # a newcomer needs a few to find the rest
SUBSCRIPTIONS_MAX = 1024  # of one node; each costs its peers memory
PATTERNS_MAX = 256  # of one subscription
LOG_BATCHES_MAX = 4096  # of one LOG
QUEUES_PER_STATISTICS = 1000
DELIVERIES_MAX = 4096  # of one JOB, DONE or FAIL
SERVICES_MAX = 256  # that one node responds to
REQUEST_BYTES_MAX = 1_000_000  # value and headers of one REQUEST: an inbox takes nothing much larger than a body
END = 2**64 - 1  # as an offset: where the journal ends now

U64 = Annotated[int, Meta(ge=0)]  # msgpack itself ends at 2**64 - 1
Seq = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Name = Annotated[str, Meta(min_length=1, max_length=255)]
Topic = Annotated[bytes, Meta(min_length=1, max_length=255)]
Endpoint = Annotated[str, Meta(max_length=300)]


class Body(msgspec.Struct, omit_defaults=True):
    """What a command says."""


class Subscribed(msgspec.Struct, omit_defaults=True):
    """One subscription of the asker: its number there, and the rest as SUBSCRIBE has it."""

    id: U64
    patterns: Annotated[list[Name], Meta(max_length=PATTERNS_MAX)]
    observe: bool = False
    connected: bool = True
    trail: bool = False


class Hello(Body):
    """Who the asker is, where it can be reached, what it wants, and whom it knows. WELCOME has the same body."""

    origin: U64
    name: Name
    bus: Name
    epoch: U64  # when it started, ns since 1970: tells a restart from an echo of the past
    inbox: Annotated[list[Endpoint], Meta(max_length=64)]  # the ROUTER, at each address it listens on
    pub_port: Port
    host: Annotated[str, Meta(max_length=255)]
    pid: U64
    release: Annotated[str, Meta(max_length=64)]  # of the software, for people to read
    tap_port: Annotated[int, Meta(ge=0, le=65535)] = 0  # a second PUB, for subscriptions that only observe; 0: none
    trail_port: Annotated[int, Meta(ge=0, le=65535)] = 0  # a third, for those that are in no hurry; 0: none
    version_min: U64 = 1  # not VERSION: what is absent means the same for ever
    version_max: U64 = 1
    role: Annotated[str, Meta(max_length=32)] = "node"
    claims: Annotated[list[Name], Meta(max_length=PATTERNS_MAX)] = []
    journal: U64 = 0  # a number that a forwarder's journal keeps for ever; 0: there is none
    subscriptions: Annotated[list[Subscribed], Meta(max_length=SUBSCRIPTIONS_MAX)] = []
    peers: Annotated[list[tuple[U64, Endpoint]], Meta(max_length=PEERS_PER_HELLO)] = []
    services: Annotated[list[Name], Meta(max_length=SERVICES_MAX)] = []  # that it responds to, until SERVE


class Welcome(Hello):
    """The answer to HELLO: the same facts about the one who answers."""


class Subscribe(Body):
    """From here on every message that fits is owed to the asker; an id that is already known starts anew."""

    id: U64
    patterns: Annotated[list[Name], Meta(max_length=PATTERNS_MAX)]
    observe: bool = False  # only looks on: not counted, and not waited for
    connected: bool = True  # its SUB stands; False: it is said again when it does, and counts only then
    trail: bool = False  # is in no hurry: its SUB is connected to the trail


class Unsubscribe(Body):
    """The asker no longer wants what subscription `id` asked for."""

    id: U64


class Heads(Body):
    """For each stream that fits subscription `id`: the seq its next message will have. Before BYE, unasked."""

    id: U64
    heads: Annotated[list[tuple[Topic, Seq]], Meta(max_length=HEADS_PER_COMMAND)]
    more: bool = False


class Fetch(Body):
    """Send messages `first` to `last` of a stream again, as far as they are held and fit in about `bytes`."""

    topic: Topic
    origin: U64
    first: Seq
    last: Seq
    bytes: Annotated[int, Meta(ge=1)] = 1024 * 1024


class Batches(Body):
    """What is held of messages `first` to `last` follows; what is in no batch is held no more.

    `last` may be below what was asked (the rest can be asked for anew). A batch may reach beyond either end.
    """

    topic: Topic
    origin: U64
    first: Seq
    last: Seq


class Ack(Body):
    """From a forwarder, unasked: of these streams of `origin` everything up to and including this seq is on its disk.

    `journal` is the number of its journal, and `full` says that this takes nothing more until an ACK says otherwise.
    """

    journal: U64
    origin: U64
    heads: Annotated[list[tuple[Topic, U64]], Meta(max_length=HEADS_PER_COMMAND)] = []
    full: bool = False


class Read(Body):
    """Send what the journal has on topics that fit, from somewhere on, and then what comes: `credit` bytes, for now.

    From where the named cursor is, if there is one; else from the first batch of `time_ns`, unless that is 0; else from
    `offset`, of which 0 is the oldest message there is. Where a cursor is named and unknown, it begins there. The first
    LOG has no batches: its `next` says where that is.
    """

    id: U64
    patterns: Annotated[list[Name], Meta(max_length=PATTERNS_MAX)]
    credit: U64
    cursor: Annotated[str, Meta(max_length=255)] = ""
    time_ns: U64 = 0
    offset: U64 = END


class Log(Body):
    """What reading `id` came to next: batches, as they lie end to end in the part that follows, and how far it goes."""

    id: U64
    journal: U64
    next: U64  # goes on here: to be committed when all this has been dealt with
    end: U64  # of the journal when this was sent: with `next` there, all is read
    batches: Annotated[list[tuple[U64, U64, U64]], Meta(max_length=LOG_BATCHES_MAX)] = []  # offset, bytes, external
    dropped: Annotated[list[tuple[U64, U64]], Meta(max_length=LOG_BATCHES_MAX)] = []  # offsets that are no more


class Credit(Body):
    """Reading `id` may send so many bytes more. Of 0 bytes: say, by a LOG, how far it is and where the end is now."""

    id: U64
    bytes: U64


class Commit(Body):
    """Move a cursor, held by reading `id`, or by nobody (0). The answer is the same, once that is on disk."""

    cursor: Name
    offset: U64
    id: U64 = 0
    forget: bool = False  # there is to be no such cursor any more


class Unread(Body):
    """The end of reading `id`."""

    id: U64


class Offer(Body):
    """Also to be had from me: streams of `origin`, which I am not, each up to before the seq that is named."""

    origin: U64
    heads: Annotated[list[tuple[Topic, Seq]], Meta(max_length=HEADS_PER_COMMAND)]


class Join(Body):
    """Send jobs to worker `id`, `credit` of them for now: pushed messages on topics that fit, and of those published
    there since the group was first named, its share. Said again with the same id: as the first time, should it be lost.
    """

    id: U64
    patterns: Annotated[list[Name], Meta(max_length=PATTERNS_MAX)]
    group: Name
    lease_ms: Annotated[int, Meta(ge=1)]  # for so long a job is the worker's; then it goes to another
    credit: U64 = 0  # the sum of all jobs that may be sent since the first JOIN
    offset: U64 = END  # in a journal: where the group begins, if it is not known there; 0 is the oldest message
    time_ns: U64 = 0  # or from the first batch of that time, unless that is 0


class Job(Body):
    """Jobs for worker `id`: deliveries, each of one batch that follows. A job is known by its delivery and its seq."""

    id: U64
    deliveries: Annotated[list[tuple[U64, U64]], Meta(max_length=DELIVERIES_MAX)]  # number, attempt (from 1)


class Done(Body):
    """Jobs of worker `id` are done: (delivery, first seq, last seq). And it may be sent `credit` in all by now."""

    id: U64
    done: Annotated[list[tuple[U64, Seq, Seq]], Meta(max_length=DELIVERIES_MAX)] = []
    credit: U64 = 0


class Settled(Body):
    """The answer to DONE and FAIL, when it is done for good; `refused` came too late: they are another's by now."""

    id: U64
    refused: Annotated[list[tuple[U64, Seq, Seq]], Meta(max_length=DELIVERIES_MAX)] = []


class Fail(Body):
    """Jobs of worker `id` are not done: (delivery, first seq, last seq).

    `how`: "nack", to be tried again after `delay_ms` (-1: as the owner thinks best); "reject", never to be tried again;
    "return": it was not begun, so that this attempt does not count.
    """

    id: U64
    jobs: Annotated[list[tuple[U64, Seq, Seq]], Meta(max_length=DELIVERIES_MAX)]
    how: Annotated[str, Meta(max_length=16)] = "nack"
    delay_ms: Annotated[int, Meta(ge=-1)] = -1
    reason: Annotated[str, Meta(max_length=1000)] = ""
    credit: U64 = 0  # as in DONE


class Extend(Body):
    """Worker `id` needs a delivery for so long from now on."""

    id: U64
    delivery: U64
    lease_ms: Annotated[int, Meta(ge=1)]


class Leave(Body):
    """Worker `id` takes no more jobs, and has said what became of those it had."""

    id: U64


class Serve(Body):
    """The asker responds to requests for these services, and from now on for no others. The answer is the same."""

    services: Annotated[list[Name], Meta(max_length=SERVICES_MAX)]


class Request(Body):
    """Do this once, and answer with what comes of it. Never said again.

    The value is the part that follows, packed; headers, if there are any, are one more, a packed map.
    """

    service: Name
    timeout_ms: U64 = 0  # after so long nobody waits for the answer any more; 0: no limit
    origin: U64 = 0  # whose it is, where HELLO was said over another connection; 0: over this one


class Reply(Body):
    """What came of a REQUEST: the value in the part that follows, packed; or an error, and why."""

    error: Annotated[str, Meta(max_length=255)] = ""  # its type; "": there is none
    text: Annotated[str, Meta(max_length=10_000)] = ""


class Bye(Body):
    """The asker leaves, and has sent HEADS as the last word on its streams. The answer: all of it has arrived."""


class Stats(Body):
    """Ask for a peer's statistics, and its queues from a topic and group on; with `topics`, also for its streams from
    the `skip`-th on."""

    topics: bool = False
    skip: U64 = 0
    queue: Annotated[str, Meta(max_length=255)] = ""
    group: Annotated[str, Meta(max_length=255)] = ""


class QueueFigures(msgspec.Struct, omit_defaults=True):
    """One queue of its owner, or what one group has to do of a topic: numbers of messages now, and since it started."""

    topic: Annotated[str, Meta(max_length=255)]
    group: Annotated[str, Meta(max_length=255)] = ""  # of published messages; "": pushed ones
    waiting: U64 = 0
    in_flight: U64 = 0
    delayed: U64 = 0  # these wait as well, until some time
    redelivered: U64 = 0
    done: U64 = 0
    dead: U64 = 0
    workers: U64 = 0
    oldest_ns: U64 = 0  # when the oldest that is not done was sent, ns since 1970; 0: there is none


class Statistics(Body):
    """Counters of a peer, (topic, last seq, bytes published) of its streams, in order of first use, of a forwarder
    (name, offset, whether somebody reads under it) of its cursors, and its queues, in order of topic and group."""

    counters: dict[str, int | float | str]
    topics: Annotated[list[tuple[Topic, U64, U64]], Meta(max_length=HEADS_PER_COMMAND)] = []
    more: bool = False
    cursors: Annotated[list[tuple[Name, U64, bool]], Meta(max_length=HEADS_PER_COMMAND)] = []
    queues: Annotated[list[QueueFigures], Meta(max_length=QUEUES_PER_STATISTICS)] = []
    more_queues: bool = False


class Error(Body):
    """What was asked cannot be done. `code` is for programs, `reason` for people."""

    code: Annotated[str, Meta(max_length=64)]
    reason: Annotated[str, Meta(max_length=1000)]


BODIES: dict[int, type[Body]] = {
    1: Hello,
    2: Welcome,
    3: Bye,
    4: Subscribe,
    5: Unsubscribe,
    6: Heads,
    7: Fetch,
    8: Batches,
    9: Ack,
    10: Read,
    11: Log,
    12: Credit,
    13: Commit,
    14: Unread,
    15: Offer,
    16: Join,
    17: Job,
    18: Done,
    19: Settled,
    20: Fail,
    21: Extend,
    22: Leave,
    24: Stats,
    25: Statistics,
    26: Request,
    27: Reply,
    28: Serve,
    255: Error,
}
_CODES = {body: code for code, body in BODIES.items()}
_DECODERS = {code: msgspec.msgpack.Decoder(body) for code, body in BODIES.items()}
_encoder = msgspec.msgpack.Encoder()


class Command(msgspec.Struct, gc=False):
    """A decoded command."""

    request: int
    body: Body
    batches: list[bytes]


class UnknownCommand(RemoteProtocolError):
    """A well-formed envelope whose command this node does not know; `request` is what an ERROR refers to."""

    def __init__(self, code: int, request: int) -> None:
        super().__init__(f"command {code} is not known to this node")
        self.request = request


def encode_command(body: Body, request: int = 0, batches: Sequence[bytes] = ()) -> bytes:
    """The frame to send. `request` 0 means that no answer is expected."""
    packed = _encoder.encode(body)
    if len(batches) == 1:
        part = batches[0]
        envelope = WITH_ONE.pack(_CODES[type(body)], VERSION, request, 1, len(packed), len(part))
        return b"".join((envelope, packed, part))
    envelope = ENVELOPE.pack(_CODES[type(body)], VERSION, request, len(batches), len(packed))
    if not batches:
        return envelope + packed
    return b"".join((envelope, *map(SIZE.pack, map(len, batches)), packed, *batches))


def decode_command(frame: bytes | memoryview) -> Command:
    """Check and decode what came in, without the routing identity.

    Raises:
        UnknownCommand: a command this version does not have.
        RemoteProtocolError: anything else that breaks the rules above.
    """
    length = len(frame)
    if length < ENVELOPE.size:
        raise RemoteProtocolError(f"command: a frame of {length} bytes, too short for an envelope")
    code, version, request, number, size = ENVELOPE.unpack_from(frame)
    if version != VERSION and code not in (1, 2):  # HELLO and WELCOME negotiate, so they must be readable
        raise RemoteProtocolError(f"command: version {version}, this node speaks {VERSION}")
    decoder = _DECODERS.get(code)
    if decoder is None:
        raise UnknownCommand(code, request)
    if size > BODY_BYTES_MAX:
        raise RemoteProtocolError(f"command: a body of {size:,} bytes; the limit is {BODY_BYTES_MAX:,}")
    begin = ENVELOPE.size + SIZE.size * number
    at = end = begin + size
    sizes: Sequence[int] = ()
    if number and begin <= length:
        if number == 1:
            sizes = SIZE.unpack_from(frame, ENVELOPE.size)
            end += sizes[0]
        else:
            sizes = [size for (size,) in SIZE.iter_unpack(frame[ENVELOPE.size : begin])]
            end += sum(sizes)
    if end != length:
        raise RemoteProtocolError(f"command: a frame of {length:,} bytes is not as long as it says")
    try:
        body: Any = decoder.decode(frame[begin:at])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"{BODIES[code].__name__.upper()}: {error}") from None
    batches = []
    for size in sizes:
        batches.append(bytes(frame[at : at + size]))
        at += size
    return Command(request, body, batches)
