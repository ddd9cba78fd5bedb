"""What publishers are to be told: how far their streams are on disk. Knows nothing of sockets.

An acknowledgement may be lost on its way. So it is given again whenever a publisher shows that it may not have it: by
registering us, or by a HEAD.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from zmqbus.protocol.commands import HEADS_PER_COMMAND, Ack


class Acks:
    """Gathers acknowledgements until they are sent, one command for each publisher."""

    def __init__(self, journal: int) -> None:
        self._journal = journal
        self._due: dict[int, dict[bytes, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._due)

    def add(self, topic: bytes, origin: int, seq: int) -> None:
        """Everything of a stream up to `seq` is on disk."""
        heads = self._due.get(origin)
        if heads is None:
            heads = self._due[origin] = {}
        heads[topic] = max(seq, heads.get(topic, 0))  # what asks for an older one may come late

    def take(self, full: bool = False) -> Iterator[tuple[int, Ack]]:
        """What is to be sent, and to whom."""
        due, self._due = self._due, {}
        for origin, heads in due.items():
            yield from ((origin, Ack(self._journal, origin, part, full)) for part in _parts(list(heads.items())))


def _parts(heads: list[tuple[bytes, int]]) -> Iterable[list[tuple[bytes, int]]]:
    return (heads[at : at + HEADS_PER_COMMAND] for at in range(0, len(heads), HEADS_PER_COMMAND))
