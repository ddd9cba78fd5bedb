"""Values of requests and replies: packed on the caller's thread, unpacked on the thread of whoever wants them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from zmqbus.errors import MessageTooLarge, RemoteProtocolError, ReplyMismatch, SetupError, ZmqbusError
from zmqbus.node.work.requests.asking import Outcome
from zmqbus.protocol import commands
from zmqbus.protocol.commands import REQUEST_BYTES_MAX
from zmqbus.protocol.frames import MESSAGE_BYTES_MAX, decoder_of, encode_value
from zmqbus.protocol.members.responders import Responders

TIMEOUT = 5.0  # seconds for which a request waits, unless the user says otherwise
CONCURRENCY = 4  # calls of a responder's function at a time, each on a thread
TASKS = 100  # the same, of a coroutine function


class Reply(msgspec.Struct, frozen=True):
    """What one of many responders answered."""

    responder: str
    """Its name."""
    origin: int
    value: Any = None
    error: ZmqbusError | None = None
    """Why there is no value: RemoteError, ResponderBusy, ResponderLost, ReplyMismatch."""


TIMEOUT_END = 1e15  # seconds: in ms it fits 64 bits
_decoder = lru_cache(maxsize=64)(decoder_of)
_plain = _decoder(None)
_SUCCESS = commands.Reply()


def pack(value: object, headers: dict[str, Any] | None) -> tuple[bytes, bytes]:
    """Value and headers of a request; no headers are no bytes.

    Raises:
        UnsupportedValue: msgpack has no place for it.
        MessageTooLarge: it does not fit an inbox.
    """
    packed = encode_value(value), encode_value(headers) if headers else b""
    size = sum(map(len, packed))
    if size > REQUEST_BYTES_MAX:
        raise MessageTooLarge(size, REQUEST_BYTES_MAX)
    return packed


def unpack(packed: bytes, value_type: Any, service: str, origin: int, responders: Responders) -> Any:
    """A value that came from a node, whose name `responders` knows.

    Raises:
        ReplyMismatch: it is not of that type.
        RemoteProtocolError: it is not msgpack.
    """
    try:
        return (_plain if value_type is None else _decoder(value_type)).decode(packed)
    except msgspec.ValidationError as error:
        raise ReplyMismatch(service, origin, responders.name(origin), str(error)) from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(
            f"{responders.name(origin)}: what it sent for {service!r} is no msgpack: {error}"
        ) from None


def value_of(outcome: Outcome, value_type: Any, service: str, responders: Responders) -> Any:
    """The answer to a request; raises what stands in its place."""
    if isinstance(outcome, Exception):
        raise outcome
    return unpack(outcome.packed, value_type, service, outcome.origin, responders)


def replies(outcomes: list[tuple[int, Outcome]], value_type: Any, service: str, responders: Responders) -> list[Reply]:
    """What came of asking many."""
    made = []
    for origin, outcome in outcomes:
        name = responders.name(origin)
        try:
            made.append(Reply(name, origin, value_of(outcome, value_type, service, responders)))
        except ZmqbusError as error:
            made.append(Reply(name, origin, error=error))
    return made


def success(value: object) -> tuple[commands.Reply, tuple[bytes, ...]]:
    """The answer that is a value.

    Raises:
        UnsupportedValue: msgpack has no place for it.
        MessageTooLarge: it is larger than 64 MiB.
    """
    packed = encode_value(value)
    if len(packed) > MESSAGE_BYTES_MAX:
        raise MessageTooLarge(len(packed), MESSAGE_BYTES_MAX)
    return _SUCCESS, (packed,)


def failure(error: BaseException | str) -> commands.Reply:
    """The answer that is an error: its type and what it says, and nothing of where it came from."""
    kind, text = ("Failed", error) if isinstance(error, str) else (type(error).__name__, _text(error))
    return commands.Reply(_sendable(kind)[:255], _sendable(text)[:10_000])


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # it may be a user's own
        return ""


def _sendable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # names of files may have what UTF-8 has not


def check_timeout(timeout: float | None) -> None:
    """Raises SetupError for what is not a number of seconds above 0, or None. The wire has no infinity."""
    if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout < TIMEOUT_END):
        raise SetupError(f"timeout={timeout!r}: use a number of seconds above 0, or None for no limit")


def check_type(value_type: Any) -> None:
    """Raises SetupError for a type that no value can become. Of a good one the decoder is ready then."""
    _decoder(value_type)


def check_concurrency(concurrency: int) -> None:
    """Raises SetupError for what is not a number of calls at a time."""
    if isinstance(concurrency, bool) or not (isinstance(concurrency, int) and concurrency >= 1):
        raise SetupError(f"concurrency={concurrency!r}: use a whole number, 1 or more")
