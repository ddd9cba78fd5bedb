"""Dead letters: pushed by the forwarder itself, on `$dead.` and the topic; kept in its own journal like any stream.

A message counts as settled when its letter is on disk. Letters that are on their way are pinned in the node's history,
like those of any publisher whose topic a forwarder claims. One that cannot be sent at all is not settled, and so the
journal is held until somebody has seen to it. On the loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from zmqbus.errors import MessageTooLarge, RemoteProtocolError, TopicError, ZmqbusError
from zmqbus.journal import Journal
from zmqbus.node.publishing.outlet import Outlet
from zmqbus.protocol.frames import QUEUED
from zmqbus.protocol.queues.letters import DEAD_PREFIX, headers_of, letter
from zmqbus.protocol.queues.work import Dead
from zmqbus.protocol.topics import Matcher, check_pattern


def dead_claims(topics: Sequence[str]) -> list[str]:
    """What a forwarder that claims these claims for the sake of their dead letters."""
    return [DEAD_PREFIX + topic for topic in topics if _is_pattern(DEAD_PREFIX + topic)]


def _is_pattern(text: str) -> bool:
    try:
        check_pattern(text, internal=True)
    except TopicError:  # too long
        return False
    return True


class Host(Protocol):
    """What is needed of the engine."""

    outlet: Outlet


class Funeral:
    """Of messages that died together."""

    def __init__(self, left: int) -> None:
        self.left = left
        """Those whose letter is not on disk."""
        self.then: list[Callable[[], None]] = []
        """What waits for that."""


class Graves:
    """Buries messages."""

    def __init__(
        self,
        journal: Journal,
        host: Host,
        claims: Sequence[str],
        warn: Callable[[str], None],
        on_buried: Callable[[Dead], None],
    ) -> None:
        """`claims`: of the forwarder, those for the sake of dead letters."""
        self._journal = journal
        self._host = host
        self._claimed = Matcher(claims).matches
        self._warn = warn
        self._on_buried = on_buried
        self._open: dict[str, deque[tuple[int, Dead, Funeral]]] = {}  # by topic: letters on their way, by seq

    def __len__(self) -> int:
        """Letters that are on their way."""
        return sum(map(len, self._open.values()))

    def bury(self, dead: list[Dead]) -> Funeral:
        """Push their letters."""
        funeral = Funeral(len(dead))
        for one in dead:
            topic, value, headers = _letter(one)
            try:
                seq = self._push(topic, value, headers)
            except ZmqbusError as error:
                _, line = one.work.line
                self._warn(f"{line} {one.seq} of {one.work.batch.origin:016x} has no dead letter, and waits: {error}")
            else:
                self._open.setdefault(topic, deque()).append((seq, one, funeral))
        return funeral

    def _push(self, topic: str, value: Any, headers: dict[str, Any]) -> int:
        publisher = self._host.outlet.publisher(topic, internal=True)
        if not self._claimed(topic):
            raise TopicError(topic, "this forwarder does not claim it")
        publisher.flags |= QUEUED
        try:
            return publisher.send_without_wait(value, headers)
        except MessageTooLarge:  # by what the headers add
            return publisher.send_without_wait(value)

    def look(self) -> None:
        """There is more on disk than there was."""
        for topic, letters in list(self._open.items()):
            durable = self._journal.head(topic.encode(), self._host.outlet.origin).durable
            while letters and letters[0][0] <= durable:
                _, dead, funeral = letters.popleft()
                self._on_buried(dead)
                funeral.left -= 1
                if not funeral.left:
                    for work in funeral.then:
                        work()
            if not letters:
                del self._open[topic]


def _letter(dead: Dead) -> tuple[str, Any, dict[str, Any]]:
    try:
        topic, value, headers = letter(dead)
    except RemoteProtocolError as error:  # it is no message, only bytes
        headers = headers_of(dead._replace(reason=str(error)))
        frame, *external = dead.work.batch.parts
        whole = external[0] if external else bytes(frame[len(dead.work.batch.topic) + 1 :])
        topic, value = DEAD_PREFIX + dead.work.line[1], whole if dead.seq == dead.work.batch.first else None
    return topic, value, headers
