"""The PUB: a frame goes to every subscriber that wants it, and waits a little for those that are full."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf

from zmqbus.net.clock import now
from zmqbus.net.sockets import EVENTS, NOBLOCK, SNDMORE, XPUB_NODROP, Again, Socket, plain_send

PATIENCE = 0.5  # seconds that publishers wait for a full subscriber to read half its queue
GRUDGE_MIN, GRUDGE_MAX = 1.0, 32.0  # seconds for which they do not, after that was in vain; doubled each time
ZERO_COPY_MIN = 256 * 1024  # from here on a copy costs more than the thread with which pyzmq tracks what is lent


class Broadcast:
    """Our PUB: a frame goes to every subscriber that wants it. One thread at a time, by the publishers' lock.

    A full subscriber. The socket is bounded, and refuses (XPUB_NODROP) when a matching subscriber's queue is full. The
    frame then waits in the backlog, and its publisher with it: that paces publishers to consumers that are nearly fast
    enough. But no longer than PATIENCE: then the frame goes to everybody else, that subscriber misses it and repairs
    it from the history; libzmq counts it out until it has read half its queue, so one that has stopped costs no more.
    For one that is alive but hopelessly slow, publishers do not wait again for a while, longer each time (GRUDGE).

    Those who only look on have a PUB of their own, the tap: for them nobody waits, and what does not fit they miss.
    """

    def __init__(self, socket: Socket, tap: Socket, on_stall: Callable[[], None]) -> None:
        """`on_stall`: a frame has to wait; now `push` from time to time, until it returns True."""
        self.observed = False
        """Whether anybody looks on: only then the tap is used."""
        self.backlog: deque[tuple[bytes, ...]] = deque()
        self.stalls = 0
        self._on_stall = on_stall
        self._socket = socket
        self._tap = tap
        self._send_plain = plain_send(socket)
        self._stalled_at = 0.0
        self._no_patience_until = -inf
        self._grudge = GRUDGE_MIN

    def send(self, parts: tuple[bytes, ...]) -> None:
        """Send a frame, behind all that wait already."""
        if self.backlog:
            self.backlog.append(parts)
            return
        try:
            if len(parts) == 1 and not self.observed:
                self._send_plain(parts[0], NOBLOCK)
            else:
                self._send(parts)
        except Again:
            self.backlog.append(parts)
            self.stalls += 1
            self._stalled_at = now()
            self._on_stall()

    def push(self) -> bool:
        """Try to send the backlog. Returns whether it is gone, as it is after PATIENCE at the latest."""
        if not self.backlog:
            return True
        time = now()
        if time - self._stalled_at > PATIENCE or time < self._no_patience_until:
            if time >= self._no_patience_until:
                recent = time - self._no_patience_until < 2 * GRUDGE_MAX
                self._grudge = min(GRUDGE_MAX, self._grudge * 2) if recent else GRUDGE_MIN
                self._no_patience_until = time + self._grudge
            self._socket.set(XPUB_NODROP, 0)
            self._send(self.backlog.popleft())  # one frame is enough: whoever is full misses it, and counts itself out
            self._socket.set(XPUB_NODROP, 1)
            self._stalled_at = time
        try:
            while self.backlog:
                self._send(self.backlog[0])
                self.backlog.popleft()
        except Again:
            return False
        return True

    def admit(self) -> None:
        """Take newly connected SUBs in before the next frame. `send` alone looks for them once in a millisecond."""
        self._socket.get(EVENTS)
        self._tap.get(EVENTS)

    def close(self, linger_ms: int) -> None:
        """Close the socket; what it holds is still sent for `linger_ms`, what waits for it is not."""
        self.backlog.clear()
        self._socket.close(linger_ms)
        self._tap.close(0)

    def _send(self, parts: tuple[bytes, ...]) -> None:
        if len(parts) == 1:
            self._send_plain(parts[0], NOBLOCK)
        else:
            self._socket.send(parts[0], NOBLOCK | SNDMORE)
            try:
                self._socket.send(parts[1], NOBLOCK, copy=len(parts[1]) < ZERO_COPY_MIN)
            except Again:  # it must follow its first part, whoever misses it
                self._socket.set(XPUB_NODROP, 0)
                self._socket.send(parts[1], NOBLOCK, copy=len(parts[1]) < ZERO_COPY_MIN)
                self._socket.set(XPUB_NODROP, 1)
        if self.observed:
            self._tap.send_multipart(parts, NOBLOCK)
