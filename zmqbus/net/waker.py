"""Wakes threads that sleep in `recv` on a SUB: by a message, which is what they wait for.

A thread that waits for the socket's FD and something else takes a quarter longer for a round trip than one that
sleeps in `recv`. So a SUB also listens to this PUB of its own node, by inproc, on a topic of its own.
"""

from __future__ import annotations

from zmqbus.net.sockets import EVENTS, NOBLOCK, Socket, SocketFactory

WAKE_PREFIX = b"$wake\0"


class Waker:
    """One node's. Used by one thread."""

    def __init__(self, factory: SocketFactory, name: str) -> None:
        self._factory = factory
        self._socket = factory.pub(0)
        self._endpoint = factory.bind_inproc(self._socket, name)

    def attach(self, socket: Socket, number: int) -> None:
        """From now on `wake(number)` makes a `recv` on this SUB return."""
        socket.subscribe(_topic(number))
        self._factory.connect(socket, self._endpoint)

    def wake(self, number: int) -> None:
        """Whether anybody sleeps or not: the frame is then met at the next `recv`."""
        self._socket.get(EVENTS)  # takes in subscriptions; sending alone would not always
        self._socket.send(_topic(number), NOBLOCK)


def _topic(number: int) -> bytes:
    return WAKE_PREFIX + number.to_bytes(8, "big")
