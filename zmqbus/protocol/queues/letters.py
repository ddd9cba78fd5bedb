"""What headers say to queues: until when a job is to wait, and why a dead letter is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zmqbus.errors import RemoteProtocolError
from zmqbus.protocol.frames import HEADERS, Batch, ValueDecoder, cut_batch
from zmqbus.protocol.queues.work import Dead

DEAD_PREFIX = "$dead."  # of their topics: what is there does not die again
DUE = "$due"  # ns since 1970
REASON, ATTEMPTS, ORIGIN, SEQ, QUEUE = "$reason", "$attempts", "$origin", "$seq", "$queue"
GROUP = "$group"  # that gave up what was published
LETTER_HEADERS = (REASON, ATTEMPTS, ORIGIN, SEQ, QUEUE, GROUP)

_decoder = ValueDecoder()
_NOTHING: Mapping[int, float] = {}


def due_of(batch: Batch, now: float, now_ns: int) -> Mapping[int, float]:
    """The messages of a batch that are to wait, by their place in it, and until when: in the time of `now`, which is
    `now_ns` in ns since 1970."""
    if not batch.flags & HEADERS:
        return _NOTHING
    try:
        _, headers = _decoder.decode(batch)
    except RemoteProtocolError:
        return _NOTHING  # whoever gets it will say so
    dues = {}
    for index, own in enumerate(headers or ()):
        due = own.get(DUE) if own else None
        if isinstance(due, int) and due > now_ns:
            dues[index] = now + (due - now_ns) / 1e9
    return dues


def letter(dead: Dead) -> tuple[str, Any, dict[str, Any]]:
    """Topic, value and headers of a dead letter.

    Raises:
        RemoteProtocolError: the message cannot be decoded.
    """
    batch = dead.work.batch
    values, headers = _decoder.decode(cut_batch(batch, dead.seq, dead.seq))
    own = {key: value for key, value in ((headers or [None])[0] or {}).items() if key != DUE}
    return DEAD_PREFIX + dead.work.line[1], values[0], own | headers_of(dead)


def headers_of(dead: Dead) -> dict[str, Any]:
    """What a dead letter says of why it is one."""
    group, topic = dead.work.line
    return {
        REASON: dead.reason,
        ATTEMPTS: dead.attempts,
        ORIGIN: dead.work.batch.origin,
        SEQ: dead.seq,
        QUEUE: topic,
        **({} if group is None else {GROUP: group.partition(" ")[0]}),
    }
