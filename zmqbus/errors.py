"""The one tree of errors. Each says whose fault it is, carries the facts as fields, and says what to do."""

from __future__ import annotations


class ZmqbusError(Exception):
    """Base of every error that zmqbus raises on purpose."""


# --- the caller's fault ------------------------------------------------------------------------


class TopicError(ZmqbusError, ValueError):
    """A topic or pattern breaks the grammar. `topic` is what was given, `reason` the rule it breaks."""

    def __init__(self, topic: object, reason: str) -> None:
        super().__init__(f"bad topic {topic!r}: {reason}")
        self.topic = topic
        self.reason = reason


class UnsupportedValue(ZmqbusError, TypeError):
    """A value cannot be carried as msgpack. Nothing was published."""

    def __init__(self, value: object, reason: str) -> None:
        super().__init__(
            f"cannot publish a value of type {type(value).__name__}: {reason}; "
            "use str, bytes, numbers, None, lists, dicts, dataclasses or msgspec.Struct"
        )
        self.value_type = type(value)
        self.reason = reason


class MessageTooLarge(ZmqbusError, ValueError):
    """A value is larger than the bus carries. `size` and `limit` are in bytes. Nothing was published."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"the message is {size:,} bytes; the limit is {limit:,} bytes: split it")
        self.size = size
        self.limit = limit


class TooManyStreams(ZmqbusError):
    """This node has published on more distinct topics than it may keep (`limit`). Nothing was published."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"this node already publishes on {limit:,} topics; put what varies (an id, a time) "
            "into the value or the headers, not into the topic"
        )
        self.limit = limit


class NodeClosed(ZmqbusError):
    """The node or subscription was used after `close()`."""


class JobSettled(ZmqbusError):
    """A job was acknowledged, or given up, a second time. The first stands. `topic`, `origin` and `seq` name it."""

    def __init__(self, topic: str, origin: int, seq: int) -> None:
        super().__init__(f"job {topic} {origin:016x}#{seq} is settled already: ack, nack or reject it once")
        self.topic = topic
        self.origin = origin
        self.seq = seq


class WrongLoop(ZmqbusError, RuntimeError):
    """An AsyncNode, or what it handed out, was used on another event loop than the one it was opened on."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"node {name!r} was opened on another event loop: use it there (asyncio.run_coroutine_threadsafe), or open "
            "an AsyncNode on each loop"
        )
        self.name = name


class ForkedProcess(ZmqbusError):
    """A node was used in a child process after `fork()`: sockets do not survive a fork."""

    def __init__(self) -> None:
        super().__init__("this node was opened before os.fork(): open a new Node in the child process")


class SetupError(ZmqbusError):
    """A node could not be opened as asked (port in use, no such interface, …); says what to change."""


class WhereError(ZmqbusError, ValueError):
    """A `--where` expression is not one that zmqbus evaluates. `position` is the 0-based character at fault.

    The message shows the expression with a caret under that character.
    """

    def __init__(self, text: str, position: int, reason: str) -> None:
        first = max(0, position - 50)  # a window: an expression may be longer than a terminal is wide
        shown = "".join(c if c.isprintable() else "?" for c in text[first : first + 100])
        super().__init__(f"bad expression: {reason}\n  {shown}\n  {' ' * (position - first)}^")
        self.text = text
        self.position = position
        self.reason = reason


class FormatError(ZmqbusError, ValueError):
    """A `-F` template is malformed, names a field that messages do not have, or formats one in no possible way."""

    def __init__(self, template: str, reason: str) -> None:
        super().__init__(f"bad format {template!r}: {reason}")
        self.template = template
        self.reason = reason


class ParseError(ZmqbusError, ValueError):
    """A text given on the command line is not the `what` (duration, size, JSON value) it should be."""

    def __init__(self, what: str, text: str, reason: str) -> None:
        shown = text if len(text) <= 80 else f"{text[:79]}…"
        super().__init__(f"{shown!r} is not a {what}: {reason}")
        self.what = what
        self.text = text
        self.reason = reason


# --- keys and strangers ------------------------------------------------------------------------


class AuthError(ZmqbusError):
    """Keys do not fit, or the security self-test failed. Nothing was sent in clear."""


class KeyFileError(AuthError):
    """A key file is missing, unreadable, malformed, or open to other users. `path` names it."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"key file {path}: {reason}")
        self.path = path
        self.reason = reason


# --- the peer's fault --------------------------------------------------------------------------


class RemoteProtocolError(ZmqbusError):
    """A peer sent something that breaks docs/protocol.md. It was dropped; the peer was told where possible."""


class DecodeError(ZmqbusError):
    """One message does not fit the `type=` a subscription asked for. Iteration may be resumed after it."""

    def __init__(self, topic: str, origin: int, seq: int, reason: str) -> None:
        super().__init__(f"message {topic} {origin:016x}#{seq} does not fit the asked type: {reason}")
        self.topic = topic
        self.origin = origin
        self.seq = seq
        self.reason = reason


# --- nobody's fault: the world -----------------------------------------------------------------


class GapError(ZmqbusError):
    """Raised by a subscription with `on_gap="raise"`: messages `first`..`last` of a stream are not to be had."""

    def __init__(self, topic: str, origin: int, first: int, last: int) -> None:
        super().__init__(
            f"lost {last - first + 1:,} message(s) of {topic} from {origin:016x}: #{first} to #{last} are in "
            "no history that could be reached"
        )
        self.topic = topic
        self.origin = origin
        self.first = first
        self.last = last


class LogGapError(GapError):
    """The same for the log of one forwarder, by offsets: `first`..`last` are no more in its `journal`. Retention was
    quicker than this reader, or they were destroyed and declared lost by a repair; which topics, nobody can tell."""

    def __init__(self, forwarder: str, journal: int, first: int, last: int) -> None:
        super().__init__("", 0, first, last)
        self.args = (
            f"up to {last - first + 1:,} message(s) are lost: offsets {first:,} to {last:,} are no more in the journal "
            f"of {forwarder}",
        )
        self.forwarder = forwarder
        self.journal = journal


class SubscriptionTaken(ZmqbusError):
    """Another consumer reads under this subscription's durable name now, from what was committed on. `name` is it.

    What was handed out and not committed comes again, there.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"another consumer reads as {name!r} now: one at a time has a durable name; to share the work use a queue, "
            "to get everything twice another name"
        )
        self.name = name


class LogUnavailable(ZmqbusError):
    """A forwarder cannot give what its log should have. `code` is the reason for programs: "corrupt" (its journal is
    damaged there), "read" (it cannot read from there), "protocol" (it sent what cannot be right)."""

    def __init__(self, forwarder: str, code: str, reason: str) -> None:
        super().__init__(f"cannot read the log of {forwarder}: {reason}")
        self.forwarder = forwarder
        self.code = code
        self.reason = reason


class WaitTimeout(ZmqbusError, TimeoutError):
    """A `wait_for_…` did not see what it waited for in time. `seen` and `wanted` say how far it came."""

    def __init__(self, what: str, seen: int, wanted: int, timeout: float) -> None:
        super().__init__(f"waited {timeout:g} s for {wanted} {what}, saw {seen}")
        self.what = what
        self.seen = seen
        self.wanted = wanted
        self.timeout = timeout


class NoResponders(ZmqbusError):
    """Nobody that can be reached responds to this `service`. The request was not carried out."""

    def __init__(self, service: str, remedy: str = "node.wait_for_responders()") -> None:
        super().__init__(f"nobody on the bus responds to {service!r} now; to wait until somebody does: {remedy}")
        self.service = service


class RequestTimeout(ZmqbusError, TimeoutError):
    """No answer to a request came within `timeout` seconds. It may be carried out, or not, or be yet."""

    def __init__(self, service: str, timeout: float) -> None:
        super().__init__(f"no answer from {service!r} within {timeout:g} s; whether it was carried out is not known")
        self.service = service
        self.timeout = timeout


class ResponderLost(ZmqbusError):
    """The connection to the `responder` broke before its answer had come: it died, was stopped, or the network failed.

    The request may have been carried out, or not. It was not sent to anybody else.
    """

    def __init__(self, service: str, responder: str) -> None:
        super().__init__(
            f"lost {responder} before it answered a request for {service!r}; whether it was carried out is not known: "
            "ask again if it does no harm twice"
        )
        self.service = service
        self.responder = responder


class ResponderBusy(ZmqbusError):
    """Every responder has too many requests waiting; `responder` was the last one tried. Nobody has begun with this."""

    def __init__(self, service: str, responder: str) -> None:
        super().__init__(
            f"too many requests for {service!r} wait at {responder}: ask again later, or run more responders"
        )
        self.service = service
        self.responder = responder


class RemoteError(ZmqbusError):
    """The `responder` could not do what was asked. `type` is the kind of its error, as it is called there, `text` what
    it says."""

    def __init__(self, type: str, text: str, responder: str) -> None:
        super().__init__(f"{responder} answered with {type}{': ' * bool(text)}{text}")
        self.type = type
        self.text = text
        self.responder = responder


class ReplyMismatch(DecodeError):
    """An answer does not fit the `type` that was asked for, or a request that of its responder. `topic` is the service,
    `origin` the sender."""

    def __init__(self, service: str, origin: int, who: str, reason: str) -> None:
        super().__init__(service, origin, 0, reason)
        self.args = (f"what {who} sent for {service!r} does not fit the asked type: {reason}",)


class NotDurable(ZmqbusError):
    """Messages are not known to be on a forwarder's disk. They may be, or may yet come there: the outcome is unknown.

    `unacked` is how many, `seq` which one, if it is about one. Where a forwarder claims the topic they are kept, and
    handed over when that is possible, each once however often it is tried: wait for it with `flush()`, and do not
    publish them again.
    """

    def __init__(self, unacked: int, reason: str, seq: int | None = None) -> None:
        what = f"message #{seq} is" if seq is not None else f"{unacked:,} message(s) are"
        super().__init__(f"{what} not known to be on a forwarder's disk: {reason}")
        self.unacked = unacked
        self.seq = seq
        self.reason = reason


class NotSettled(ZmqbusError):
    """Acknowledged jobs are not known to be settled with their owners, `unsettled` of them. They may be; those that are
    not are given to a worker again."""

    def __init__(self, unsettled: int, reason: str) -> None:
        super().__init__(f"{unsettled:,} acknowledged job(s) are not known to be settled: {reason}")
        self.unsettled = unsettled
        self.reason = reason


class BufferFull(ZmqbusError):
    """What forwarders have not acknowledged, and workers have not done, fills the buffer, and no room was made in time.
    This message was not published; all before it are kept. `waiting` is the buffer's content in bytes."""

    def __init__(self, topic: str, waiting: int, timeout: float) -> None:
        super().__init__(
            f"nothing published on {topic}: {waiting:,} bytes wait for a forwarder's acknowledgement, or for workers, "
            f"and within {timeout:g} s there was no room for more; are they running?"
        )
        self.topic = topic
        self.waiting = waiting
        self.timeout = timeout


# --- the journal -------------------------------------------------------------------------------


class JournalError(ZmqbusError):
    """Base of everything that can be wrong with a journal directory. `directory` names it."""

    directory: str


class JournalUnavailable(JournalError):
    """A journal directory cannot be used as asked (not writable, not a directory, no journal in it)."""

    def __init__(self, directory: object, reason: str) -> None:
        super().__init__(f"journal {directory}: {reason}")
        self.directory = str(directory)
        self.reason = reason


class JournalLocked(JournalError):
    """Another process writes to this journal. `holder` is its process id, where it could be read."""

    def __init__(self, directory: object, holder: int | None) -> None:
        who = f"process {holder}" if holder else "another process"
        super().__init__(f"journal {directory} is in use by {who}: stop it, or choose another directory")
        self.directory = str(directory)
        self.holder = holder


class JournalVersion(JournalError):
    """A journal was written by a newer zmqbus. `found` and `supported` are format versions. Nothing was touched."""

    def __init__(self, path: object, found: int, supported: int) -> None:
        super().__init__(
            f"journal {path} has format version {found}, this zmqbus reads up to {supported}: upgrade zmqbus"
        )
        self.directory = str(path)
        self.found = found
        self.supported = supported


class JournalCorrupt(JournalError):
    """Bytes that were once safely on disk are damaged. Nothing was delivered from them, nothing was changed.

    `path` names the file, `position` the byte in it, `offset` the first message that is affected (None when
    not known), `reason` what does not fit.
    """

    def __init__(self, path: object, position: int, reason: str, offset: int | None = None) -> None:
        at = f" (message offset {offset})" if offset is not None else ""
        super().__init__(
            f"{path} is damaged at byte {position}{at}: {reason}; the disk, or whoever else wrote there, is at "
            "fault: run `zmqbus journal verify`, then restore a copy or run `zmqbus journal repair`"
        )
        self.directory = str(path)
        self.path = str(path)
        self.position = position
        self.reason = reason
        self.offset = offset


class JournalFailed(JournalError):
    """A file operation failed, so what is on disk is not known. The journal takes no more; restart once mended.

    `operation`, `path` and `errno` say what failed. Nothing is retried: after a failed fsync the kernel
    forgets which pages it could not write, and a second fsync would report success falsely.
    """

    def __init__(self, operation: str, path: object, errno: int | None, reason: str) -> None:
        super().__init__(f"{operation} of {path} failed: {reason}; check the disk, then start again")
        self.directory = str(path)
        self.operation = operation
        self.path = str(path)
        self.errno = errno
        self.reason = reason


class NoSpace(JournalError):
    """The journal is full: the disk, or its own limit. Nothing accepted was lost; it resumes when there is room."""

    def __init__(self, directory: object, reason: str) -> None:
        super().__init__(f"journal {directory} is full: {reason}")
        self.directory = str(directory)
        self.reason = reason
