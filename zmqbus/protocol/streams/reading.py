"""One journal's log, as one subscription reads it: where to go on, what may be on its way, what to commit. Sans-IO.

The rules:

1. READ begins where the subscription is to begin. The first LOG says where that is; from then on, whatever happens to
   connections and forwarders, it goes on behind the last LOG that came.
2. A cursor is the forwarder's to know: READ names it, and what comes from before the place that was reached is
   dropped. So nothing comes twice within one subscription.
3. "The end" is the end only for who asks at once. Whoever has to ask again, or meets a forwarder later, would miss what
   was published meanwhile: it asks for what has been sent since it began.
4. No more than a window of bytes is unread or on its way. What has been consumed is granted anew, in large pieces.
5. A reading may end without a word, with a connection. Silence is broken by a CREDIT of nothing: a forwarder that does
   not know the reading says so, and one that does says how far it is.

Calls come from the thread that talks to the forwarder, except `consumed`, which the consumer's may call.
"""

from __future__ import annotations

from collections.abc import Sequence

from zmqbus.errors import RemoteProtocolError
from zmqbus.protocol.commands import END, Log, Read
from zmqbus.protocol.starts import Start

WINDOW_BYTES = 8 * 1024 * 1024  # several LOGs: the next are on their way while one is consumed
GRANT_BYTES = WINDOW_BYTES // 8
SILENCE = 1.5  # seconds after which a reading is asked whether it is still there, or asked for again

# Where a reading stands.
LOST = 0  # to be asked for
ASKED = 1  # READ is on its way
OPEN = 2  # LOGs come


class Reading:
    """One reading of one journal. Offsets are the journal's."""

    def __init__(
        self, number: int, patterns: Sequence[str], cursor: str, start: Start, journal: int, begun_ns: int, late: bool
    ) -> None:
        """`begun_ns`: when the subscription began. `late`: this journal was met after that."""
        self.number = number
        self.journal = journal
        self.name = ""
        """Of the forwarder, for people."""
        self.place = LOST
        self.begin = 0
        """Where it began, once `next` is known."""
        self.next: int | None = None
        """Behind all that came; None until it is known where to begin."""
        self.end = 0
        """Of the journal, when last heard of."""
        self.passed = 0
        """Behind all that the consumer has been handed, in LOGs it is done with. The consumer's to set."""
        self.committed = 0
        """Where the cursor is on the forwarder's disk."""
        self.received_bytes = self.consumed_bytes = 0
        self._patterns = list(patterns)
        self._cursor = cursor
        self._start = start
        self._begun_ns = begun_ns
        self._again = late
        self._allowed_bytes = 0  # of received_bytes: how far the forwarder may go
        self._told_bytes = 0  # of consumed_bytes: what the granting side was told of
        self._heard_at = 0.0
        self._fresh_bytes: int | None = None  # received since it was at the end; None: it has never been

    # --- to the forwarder --------------------------------------------------------------------------

    def read(self, now: float) -> Read:
        """What to ask, to begin or to go on."""
        offset, time_ns = self._start
        if self.next is not None:
            offset, time_ns = self.next, 0
        elif offset == END and not time_ns and self._again:
            time_ns = self._begun_ns
        self._again = True
        self.place = ASKED
        self._heard_at = now
        self._allowed_bytes = max(self.received_bytes, self.consumed_bytes + WINDOW_BYTES)
        credit = self._allowed_bytes - self.received_bytes
        return Read(self.number, self._patterns, credit, self._cursor, time_ns, offset)

    def grant(self) -> int:
        """Bytes to give as CREDIT now."""
        more = self.consumed_bytes + WINDOW_BYTES - self._allowed_bytes
        if self.place == LOST or more < GRANT_BYTES:
            return 0
        self._allowed_bytes += more
        return more

    def lost(self, now: float) -> None:
        """The connection is gone, or the forwarder knows nothing of this reading."""
        self.place = LOST
        self._heard_at = now

    def silent(self, now: float) -> bool:
        """Whether it is time to ask again: for the reading if it is LOST, else whether it is still there."""
        if now < self._heard_at + SILENCE:
            return False
        self._heard_at = now
        return True

    # --- from the forwarder ------------------------------------------------------------------------

    def received(self, log: Log, size: int, now: float) -> int:
        """A LOG came, with `size` bytes of batches. Returns the offset before which it holds nothing new.

        Raises:
            RemoteProtocolError: it cannot be right.
        """
        if log.journal != self.journal:
            raise RemoteProtocolError(f"LOG of journal {log.journal:x} in a reading of journal {self.journal:x}")
        if sum(frame + external for _, frame, external in log.batches) != size:
            raise RemoteProtocolError(f"LOG with {size:,} bytes of batches, which is not what it says")
        if self.place == ASKED and log.batches:
            raise RemoteProtocolError("LOG with batches before it is known where the reading begins")
        self._heard_at = now
        self.end = log.end
        floor = self.next
        if floor is None:
            floor = self.begin = self.passed = self.committed = log.next
        self.place = OPEN
        self.next = max(floor, log.next)
        self.received_bytes += size
        return floor

    # --- the consumer ------------------------------------------------------------------------------

    def consumed(self, log: Log, size: int) -> tuple[bool, bool]:
        """The consumer is done with a LOG. Returns whether it has caught up, and whether `grant` should be called.

        It has caught up when it comes to the end last heard of, for the first time or after more than a window.
        """
        self.passed = max(self.passed, log.next)
        self.consumed_bytes += size
        caught_up = False
        if self._fresh_bytes is not None:
            self._fresh_bytes += size
        if log.next >= self.end:
            caught_up = self._fresh_bytes is None or self._fresh_bytes > WINDOW_BYTES
            self._fresh_bytes = 0
        wants = self.consumed_bytes - self._told_bytes >= GRANT_BYTES
        if wants:
            self._told_bytes = self.consumed_bytes
        return caught_up, wants
