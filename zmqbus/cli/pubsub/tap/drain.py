"""Taking messages off a subscription as fast as they come, on a thread of its own, for one who may be slow.

They wait in a queue that is bounded by count and by bytes. When it is full the oldest make room and are counted:
better than a publisher that waits because somebody pressed Ctrl-S.
"""

from __future__ import annotations

from collections import deque
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from zmqbus.node.faces.subscription import Subscription
    from zmqbus.protocol.message import Message

MESSAGES_MAX = 100_000  # some 20 MB of small ones
BYTES_MAX = 64 * 1024 * 1024
TAKEN_MAX = 256  # at a time: a few milliseconds of printing


class Drain:
    """The queue, and the thread that fills it."""

    def __init__(self, subscription: Subscription) -> None:
        self.dropped = 0
        """Messages that nobody took in time."""
        self.taken = 0
        self._subscription = subscription
        self._queue: deque[tuple[Message, int]] = deque()
        self._bytes = 0
        self._stirred = Condition()
        self._error: Exception | None = None
        # A daemon: our exit must not wait for it.
        Thread(target=self._run, name="zmqbus tap", daemon=True).start()

    def __len__(self) -> int:
        """Messages that wait to be taken."""
        return len(self._queue)

    def take(self, timeout: float) -> list[Message]:
        """Some messages; none when none come within `timeout` seconds. Raises what ended the subscription."""
        some = []
        with self._stirred:
            if not self._queue:
                if self._error is not None:
                    raise self._error
                self._stirred.wait(timeout)
            for _ in range(min(len(self._queue), TAKEN_MAX)):
                message, size = self._queue.popleft()
                self._bytes -= size
                some.append(message)
        self.taken += len(some)
        return some

    def _run(self) -> None:
        queue, stirred = self._queue, self._stirred
        try:
            for message in self._subscription:
                value = message.value
                size = len(value) if value.__class__ is str or value.__class__ is bytes else _size(value)
                with stirred:
                    queue.append((message, size))
                    self._bytes += size
                    while len(queue) > MESSAGES_MAX or (self._bytes > BYTES_MAX and len(queue) > 1):
                        self._bytes -= queue.popleft()[1]
                        self.dropped += 1
                    stirred.notify()
        except Exception as error:
            self._error = error
        finally:
            with stirred:
                stirred.notify()


def _size(value: Any) -> int:
    try:
        return len(msgspec.msgpack.encode(value))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return 1024
