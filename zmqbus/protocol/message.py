"""What a subscriber is handed. A message is identified by (topic, origin, seq), wherever it is met."""

from __future__ import annotations

from typing import Any

import msgspec


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message as delivered.

    `gc=False`: a value that came out of msgpack cannot refer back to its message, so the collector need not
    track it; that, and positional construction from `map()`, is what keeps delivery near 60 ns a message.
    """

    topic: str
    """Where it was published: dot-separated tokens."""
    value: Any
    """The decoded value (or an instance of the subscription's `type=`)."""
    seq: int
    """Position within its stream: 1, 2, 3 … without holes."""
    origin: int
    """The 64-bit random id that its publisher drew at start."""
    time: float
    """When its batch was sent, by the publisher's clock: seconds since the Unix epoch, UTC."""
    headers: dict[str, Any] | None = None
    """Headers given to `publish`, or None."""
    offset: int | None = None
    """Position in a forwarder's journal, where the message was read from one."""
