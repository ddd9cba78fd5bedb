"""The three PUBs of a node: a frame goes to every subscriber that wants it, and waits a little for those that are full.

Most subscribers hear the first. The second, the *tap*, is for those who only look on: for them nobody waits, and what
does not fit they miss. The third, the *trail*, is for those who want all, but not at once, as forwarders do: to wake
one for every message costs a round trip of those who are in a hurry a quarter, on a machine with few cores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from math import inf

from zmqbus.net.clock import now
from zmqbus.net.sockets import EVENTS, NOBLOCK, SNDMORE, XPUB_NODROP, Again, Socket, Source, plain_send

PATIENCE = 0.5  # seconds that publishers wait for a full subscriber to read half its queue
GRUDGE_MIN, GRUDGE_MAX = 1.0, 32.0  # seconds for which they do not, after that was in vain; doubled each time
ZERO_COPY_MIN = 256 * 1024  # from here on a copy costs more than the thread with which pyzmq tracks what is lent
TRAIL_PERIOD = 0.002  # seconds that a frame may wait for others before it goes to the trail,
TRAIL_FRAMES = 16  # unless so many wait,
TRAIL_BYTES = 64 * 1024  # or so many bytes
TRAIL_IDLE = 100  # periods without any frame, after which the timer for it stops


class Pub:
    """A PUB that refuses what a matching subscriber has no room for (XPUB_NODROP)."""

    __slots__ = ("plain", "socket")

    def __init__(self, socket: Socket) -> None:
        self.socket = socket
        self.plain = plain_send(socket)

    def send(self, parts: tuple[bytes, ...]) -> None:
        """Send a frame to all, or raise Again."""
        if len(parts) == 1:
            self.plain(parts[0], NOBLOCK)
            return
        self.socket.send(parts[0], NOBLOCK | SNDMORE)
        try:
            self._send_second(parts[1])
        except Again:  # it must follow its first part, whoever misses it
            self.socket.set(XPUB_NODROP, 0)
            self._send_second(parts[1])
            self.socket.set(XPUB_NODROP, 1)

    def _send_second(self, part: bytes) -> None:
        self.socket.send(part, NOBLOCK, copy=len(part) < ZERO_COPY_MIN)

    def force(self, parts: tuple[bytes, ...]) -> None:
        """Send a frame to all who have room. Whoever has none counts itself out, until it has read half its queue."""
        self.socket.set(XPUB_NODROP, 0)
        self.send(parts)
        self.socket.set(XPUB_NODROP, 1)


class Broadcast:
    """A frame goes to every subscriber that wants it. One thread at a time, by the publishers' lock.

    A full subscriber. A socket is bounded, and refuses when a matching subscriber's queue is full. The frame then waits
    in the backlog, and its publisher with it: that paces publishers to consumers that are nearly fast enough. But no
    longer than PATIENCE: then the frame goes to everybody else, that subscriber misses it and repairs it from the
    history; libzmq counts it out until it has read half its queue, so one that has stopped costs no more. For one that
    is alive but hopelessly slow, publishers do not wait again for a while, longer each time (GRUDGE).
    """

    def __init__(
        self, pubs: Mapping[Source, Socket], on_stall: Callable[[], None], on_trail: Callable[[], None]
    ) -> None:
        """`on_stall`: a frame has to wait; now `push` from time to time, until it returns True. `on_trail`: likewise,
        call `tick_trail` every TRAIL_PERIOD."""
        self.observed = False
        """Whether anybody looks on: only then the tap is used."""
        self.trailed = False
        """Likewise the trail."""
        self.backlog: deque[tuple[Pub, tuple[bytes, ...]]] = deque()
        self.stalls = 0
        self._on_stall = on_stall
        self._on_trail = on_trail
        self._pub, self._tap, self._trail = Pub(pubs["pub"]), pubs["tap"], Pub(pubs["trail"])
        self._send_plain = self._pub.plain
        self._stalled_at = 0.0
        self._no_patience_until = -inf
        self._grudge = GRUDGE_MIN
        self._trailing: list[tuple[bytes, ...]] = []  # what waits for others to come
        self._trailing_bytes = 0
        self._idle = -1  # periods of the trail's timer since something waited for it; -1: it is not running

    def send(self, parts: tuple[bytes, ...], hurry: bool) -> None:
        """Send a frame, behind all that wait already. `hurry`: somebody waits for it at the trail as well."""
        if self.backlog or self.observed or len(parts) > 1:
            self.send_live(parts)
        else:
            try:
                self._send_plain(parts[0], NOBLOCK)
            except Again:
                self._stall(self._pub, parts)
        if self.trailed:
            self._send_behind(parts, hurry)

    def send_live(self, parts: tuple[bytes, ...]) -> None:
        """Send a frame, but not to the trail."""
        self._try(self._pub, parts)

    def send_trail(self) -> None:
        """Send what the trail has yet to get."""
        trailing, self._trailing = self._trailing, []
        self._trailing_bytes = 0
        for parts in trailing:
            self._try(self._trail, parts)

    def tick_trail(self) -> bool:
        """Every TRAIL_PERIOD. Returns whether nothing has come for a while."""
        self._idle = 0 if self._trailing else self._idle + 1
        self.send_trail()
        if self._idle < TRAIL_IDLE:
            return False
        self._idle = -1
        return True

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
            pub, parts = self.backlog.popleft()
            pub.force(parts)  # one frame is enough: whoever is full misses it, and counts itself out
            self._look_on(pub, parts)
            self._stalled_at = time
        try:
            while self.backlog:
                self._send(*self.backlog[0])
                self.backlog.popleft()
        except Again:
            return False
        return True

    def admit(self) -> None:
        """Take newly connected SUBs in before the next frame. `send` alone looks for them once in a millisecond."""
        for socket in (self._pub.socket, self._tap, self._trail.socket):
            socket.get(EVENTS)

    def close(self, linger_ms: int) -> None:
        """Close the sockets; what they hold is still sent for `linger_ms`, what waits for them is not."""
        self.backlog.clear()
        self._trailing.clear()
        self._pub.socket.close(linger_ms)
        self._tap.close(0)
        self._trail.socket.close(linger_ms)

    def _try(self, pub: Pub, parts: tuple[bytes, ...]) -> None:
        if self.backlog:
            self.backlog.append((pub, parts))
            return
        try:
            self._send(pub, parts)
        except Again:
            self._stall(pub, parts)

    def _stall(self, pub: Pub, parts: tuple[bytes, ...]) -> None:
        self.backlog.append((pub, parts))
        self.stalls += 1
        self._stalled_at = now()
        self._on_stall()

    def _send(self, pub: Pub, parts: tuple[bytes, ...]) -> None:
        pub.send(parts)
        self._look_on(pub, parts)

    def _look_on(self, pub: Pub, parts: tuple[bytes, ...]) -> None:
        if self.observed and pub is self._pub:
            self._tap.send_multipart(parts, NOBLOCK)

    def _send_behind(self, parts: tuple[bytes, ...], hurry: bool) -> None:
        self._trailing.append(parts)
        self._trailing_bytes += len(parts[-1])
        if hurry or len(self._trailing) >= TRAIL_FRAMES or self._trailing_bytes >= TRAIL_BYTES:
            self.send_trail()
        elif self._idle < 0:
            self._idle = 0
            self._on_trail()
