"""How a live subscription is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from zmqbus.errors import SetupError
from zmqbus.net.sockets import Source
from zmqbus.node.receiving.feed import Feed
from zmqbus.node.receiving.intake import Driver, Intake
from zmqbus.protocol.streams.tracking import Tracker


class Host(Driver, Protocol):
    """What is needed of the engine."""

    def sources(self, topic: str, origin: int) -> Sequence[int]:
        """Whom to ask for a repair, from any thread."""

    async def attach(
        self, patterns: Sequence[str], make: Callable[[int, Feed], Intake], wake: Callable[[], None] | None
    ) -> Intake:
        """Open a subscription of the kind that `make` makes, and have it registered."""


async def subscribe(
    host: Host,
    patterns: Sequence[str],
    *,
    value_type: Any,
    history: int,
    on_gap: str,
    observe: bool,
    wake: Callable[[], None] | None = None,
) -> Intake:
    """Open a subscription; done when every known publisher has registered it.

    `wake`: to be called when there is something to do. None: its consumer sleeps in the socket.
    """
    if not isinstance(history, int) or history < 0:
        raise SetupError(f"history={history!r}: use a whole number, 0 or more")
    if on_gap not in ("skip", "raise"):
        raise SetupError(f"on_gap={on_gap!r}: use 'skip' or 'raise'")

    def make(number: int, feed: Feed) -> Intake:
        tracker = Tracker(patterns, host.sources, history=history)
        raises = on_gap == "raise"
        source: Source = "tap" if observe else "pub"
        return Intake(number, patterns, feed, host, tracker, value_type=value_type, raise_gaps=raises, source=source)

    return await host.attach(patterns, make, wake)
