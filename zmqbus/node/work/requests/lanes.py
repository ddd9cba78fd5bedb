"""Lanes: connections on which a request goes out, and its answer comes back, on the thread that asks.

Otherwise the caller wakes the engine's thread, and that the caller: each costs as much as a way through the network.
A lane is a DEALER to a responder's inbox that one thread uses at a time, for one request at a time. It is only a short
cut: whoever asks for the first time, or finds no lane that is free and connected, goes by the engine; so does what
somebody on a lane has surely not begun with, and what has no time limit.

A thread sleeps in `recv` at first, which brings a quick answer much sooner than a poll would. When there is none for
some milliseconds, it polls: so it sees when the connection breaks (with no more than one message under way, a DEALER
that cannot send has lost it: IMMEDIATE), and when the node is closed.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from math import ceil
from threading import Lock
from typing import Protocol

from zmqbus.errors import RemoteError, RemoteProtocolError, RequestTimeout, ZmqbusError
from zmqbus.net.clock import give_way, now
from zmqbus.net.sockets import EVENTS, FD, POLLIN, POLLOUT, RCVTIMEO, Again, SocketFactory, plain_recv
from zmqbus.node.peers.links import Link, decode_frames, putter
from zmqbus.node.work.requests.answering import Peers
from zmqbus.node.work.requests.asking import Answered, Call, Outcome, outcome_of
from zmqbus.protocol import commands
from zmqbus.protocol.commands import encode_command
from zmqbus.protocol.members.responders import Responders

POLL_MAX = 3600.0  # seconds of one poll, which counts milliseconds in an int
BRISK_MS = 5  # what `recv` waits for an answer, and sees nothing else
LANES_MAX = 4  # to one responder; who finds all of them in use goes by the engine


class Host(Protocol):
    """What is needed of the engine."""

    origin: int

    @property
    def peering(self) -> Peers:
        """The other nodes."""


class Lane:
    """One connection."""

    def __init__(self, factory: SocketFactory, link: Link, origin: int, bell: int) -> None:
        """`bell`: a descriptor that becomes readable when the node is closed."""
        self.link = link
        self.origin = origin
        self._number = 0
        self._socket = factory.dealer()
        factory.connect(self._socket, link.endpoint)
        self._socket.set(RCVTIMEO, BRISK_MS)
        self._put, self._take, self._await = putter(self._socket), plain_recv(self._socket), plain_recv(self._socket, 0)
        self._get = self._socket.get
        self._poll = select.poll()
        self._poll.register(int(self._socket.get(FD)), select.POLLIN)
        self._poll.register(bell, select.POLLIN)

    def send(self, service: str, parts: tuple[bytes, ...], timeout: float, me: int) -> bool:
        """False: it is not connected, or not yet."""
        self._number += 1
        request = commands.Request(service, int(timeout * 1000) + 1, me)
        try:
            self._put(encode_command(request, self._number, parts))
        except Again:
            return False
        give_way()  # to libzmq's thread, which sends it
        return True

    def wait(self, service: str, timeout: float, name: str, lanes: Lanes) -> Outcome | commands.Error:
        """What comes of what was sent just now. An Error: it was surely not begun with.

        Raises:
            RequestTimeout, NodeClosed: there was no answer; one may yet come, so that this is to be closed.
        """
        expires_at = now() + timeout
        is_new = timeout > BRISK_MS / 1000
        while True:
            events = POLLIN if is_new else int(self._get(EVENTS))
            if events & POLLIN:
                try:
                    command = decode_frames(self._await() if is_new else self._take())
                except Again:
                    is_new = False
                    continue
                except RemoteProtocolError as error:
                    return error
                if command.request not in (self._number, 0):  # 0: it could not even be read
                    return RemoteProtocolError(f"{name}: an answer to what it was not asked")
                return outcome_of(command, service, self.origin, name)
            if not events & POLLOUT:
                return outcome_of(None, service, self.origin, name)
            if (left := expires_at - now()) <= 0:
                raise RequestTimeout(service, timeout)
            self._poll.poll(ceil(min(left, POLL_MAX) * 1000))
            if lanes.refusal is not None:
                raise lanes.refusal

    def close(self) -> None:
        """Nothing comes over it any more."""
        self._socket.close(0)


class Lanes:
    """The lanes of one node. Any thread."""

    def __init__(
        self, host: Host, factory: SocketFactory, responders: Responders, can_be_asked: Callable[[int], bool]
    ) -> None:
        self.asked = 0
        self.in_use = 0
        self.refusal: ZmqbusError | None = None
        self._host = host
        self._factory = factory
        self._responders = responders
        self._can_be_asked = can_be_asked
        self._lock = Lock()
        self._idle: dict[int, list[Lane]] = {}  # by origin, for all that were asked before, and have not left since
        self._number: dict[int, int] = {}  # of all lanes there
        self._bell: tuple[int, int] | None = None

    def ask(self, service: str, packed: bytes, headers: bytes, timeout: float | None) -> Outcome | Call:
        """The outcome of a request; or the call that has to go by the engine.

        Raises:
            RequestTimeout: no answer came in time.
            NodeClosed: the node was closed meanwhile.
        """
        if timeout is None:
            return Call(service, packed, headers, None)
        responders = self._responders
        origin = responders.choose(service, self._is_there)
        if origin is None:
            return Call(service, packed, headers, timeout)
        lane = self._take(origin)
        if lane is None or not lane.send(
            service, (packed, headers) if headers else (packed,), timeout, self._host.origin
        ):
            if lane is not None:
                self._unused(lane)
            call = Call(service, packed, headers, timeout)
            call.chosen = origin
            return call
        began = now()
        name = responders.name(origin)
        outcome: Outcome | commands.Error | None = None
        try:
            outcome = lane.wait(service, timeout, name, self)
        finally:
            self._put_back(lane, outcome)
            responders.ended(origin)
        if not isinstance(outcome, commands.Error):
            return outcome
        call = Call(service, packed, headers, timeout)
        call.expires_at = began + timeout
        if outcome.code != "hello":  # which is said over the link
            call.tried.add(origin)
            call.refused(outcome, name)
        return call

    def drop(self, origin: int) -> None:
        """A peer left, is lost, or forgotten: what leads there is of no use."""
        with self._lock:
            for lane in self._idle.pop(origin, ()):
                self._close(lane)

    def close(self, refusal: ZmqbusError) -> None:
        """Nobody asks any more. Those who wait end, soon."""
        with self._lock:
            self.refusal = refusal
            for origin in list(self._idle):
                for lane in self._idle.pop(origin):
                    self._close(lane)
            if self._bell is not None:
                os.write(self._bell[1], b"\0")

    def let_go(self) -> None:
        """Of what is left, when nobody uses it any more."""
        if self._bell is not None and not self.in_use:
            for end in self._bell:
                os.close(end)
            self._bell = None

    def _is_there(self, origin: int) -> bool:
        return origin in self._idle or self._can_be_asked(origin)

    def _take(self, origin: int) -> Lane | None:
        """A lane that is free and connected; if there is none, make one, for the next request."""
        link = self._host.peering.links.get(origin)
        with self._lock:
            if link is None or self.refusal is not None:
                return None
            idle = self._idle.get(origin)
            if idle is None:  # it may have been the only request
                if self._can_be_asked(origin):
                    self._idle[origin] = []
                return None
            while idle and idle[-1].link is not link:
                self._close(idle.pop())
            if idle:
                self.in_use += 1
                return idle.pop()
            if self._number.get(origin, 0) < LANES_MAX:
                if self._bell is None:
                    self._bell = os.pipe()
                idle.append(Lane(self._factory, link, origin, self._bell[0]))
                self._number[origin] = self._number.get(origin, 0) + 1
            return None

    def _put_back(self, lane: Lane, outcome: Outcome | commands.Error | None) -> None:
        """For the next request. None: an answer may yet come, so that it is of no use any more."""
        is_good = type(outcome) is Answered or isinstance(outcome, (RemoteError, commands.Error))
        with self._lock:
            self.in_use -= 1
            self.asked += 1
            self._keep(lane, is_good)

    def _unused(self, lane: Lane) -> None:
        with self._lock:
            self.in_use -= 1
            self._keep(lane, True)

    def _keep(self, lane: Lane, is_good: bool) -> None:
        idle = self._idle.get(lane.origin)
        if is_good and idle is not None and lane.link is self._host.peering.links.get(lane.origin):
            idle.append(lane)
        else:
            self._close(lane)

    def _close(self, lane: Lane) -> None:
        lane.close()
        left = self._number[lane.origin] - 1
        if left:
            self._number[lane.origin] = left
        else:
            del self._number[lane.origin]
