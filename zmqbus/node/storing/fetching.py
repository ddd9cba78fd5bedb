"""FETCH, answered from a journal: the messages of one stream, verbatim. Read by a thread."""

from __future__ import annotations

from zmqbus.errors import JournalError
from zmqbus.journal import Journal, fetch
from zmqbus.node.peers.links import Inbox
from zmqbus.node.storing.worker import Worker
from zmqbus.protocol import commands
from zmqbus.protocol.commands import Error
from zmqbus.protocol.frames import SEQ_MAX

FETCH_BYTES = 1024 * 1024  # per answer: large enough to be quick, small enough to share the link


async def answer_fetch(
    journal: Journal,
    worker: Worker,
    inbox: Inbox,
    identity: bytes,
    request: int,
    body: commands.Fetch,
    upto: int = SEQ_MAX,
) -> None:
    """Answer with BATCHES, or with ERROR `journal`. Nothing is said of messages beyond `upto`: others know of them."""
    size = min(body.bytes, FETCH_BYTES)
    reached = min(body.last, upto)
    try:
        batches = await worker.do(fetch, journal, body.topic, body.origin, body.first, reached, size)
    except JournalError as error:
        inbox.answer(identity, Error("journal", str(error)[:1000]), request)
        return
    if sum(batch.size for batch in batches) >= size:  # there may be more: ask again
        reached = min(reached, batches[-1].last_seq)
    parts = [bytes(part) for batch in batches for part in (batch.frame, batch.external) if part is not None]
    inbox.answer(identity, commands.Batches(body.topic, body.origin, body.first, reached), request, parts)
