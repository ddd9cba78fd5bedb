"""Reading the logs of forwarders (`sub --start`, `sub --durable`, `tap --since`): what is said of it on stderr.

Where it begins and how far behind that is, when it has caught up, which offsets are no more, and which forwarder is
away. What is lost is always told; the rest is not when the command is to be quiet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zmqbus.cli.messages.render import escape
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.bus import Watch
from zmqbus.cli.shell.output import plural
from zmqbus.cli.shell.stopping import check, rest
from zmqbus.net.clock import now
from zmqbus.node.events import CaughtUp, ForwarderDown, ForwarderUp, LogGap

if TYPE_CHECKING:
    from zmqbus.node.faces.node import Node
    from zmqbus.node.faces.subscription import Subscription
    from zmqbus.protocol.members.peers import Peer

SEARCH = 1.5  # seconds in which a forwarder that is on the bus has been found
LOOK = 0.02  # … between two looks
RANGES_KEPT = 1000  # for the report at the end


class Following:
    """One command's reading of the logs."""

    def __init__(self, node: Node, watch: Watch, *, who: str = "", quiet: bool = False) -> None:
        """`who`: the durable name; "" if there is none."""
        self.dropped: list[LogGap] = []
        """Offsets that are no more; the first thousand ranges."""
        self._events = node.events()
        self._node = node
        self._watch = watch
        self._who = f"{escape(who)!r} " if who else ""
        self._quiet = quiet
        self._begun: set[int] = set()
        self._away: set[int] = set()

    def forwarders(self) -> list[Peer]:
        """Those on the bus. If there is none yet, it is waited for as long as finding one may take."""
        until = now() + SEARCH
        while not (found := [peer for peer in self._node.peers() if peer.journal]) and now() < until:
            self._watch.poll()
            rest(LOOK)
        check()
        return found

    def poll(self, subscription: Subscription) -> None:
        """Say what is new."""
        for one in subscription.positions:
            if one.journal not in self._begun:
                self._begun.add(one.journal)
                behind = one.end - one.begin
                lag = f"{plural(behind, 'message')} behind" if behind > 0 else "with nothing before it to catch up with"
                self._tell(f"{self._who}begins at offset {one.begin} of {escape(one.forwarder)}, {lag}")
        while (event := self._events.get(0)) is not None:
            match event:
                case CaughtUp(forwarder=name, offset=offset):
                    self._tell(f"caught up with {escape(name)} at offset {offset}")
                case LogGap():
                    remark(f"lost: {dropped(event)}")
                    if len(self.dropped) < RANGES_KEPT:
                        self.dropped.append(event)
                case ForwarderDown(peer=peer):
                    self._away.add(peer.journal)
                    self._tell(f"{escape(peer.name)} is away; reading its log goes on when it is back")
                case ForwarderUp(peer=peer) if peer.journal in self._away:
                    self._away.discard(peer.journal)
                    self._tell(f"{escape(peer.name)} is back")

    def standing(self, subscription: Subscription) -> str:
        """Where its cursor is: `'indexer' is at offset 782 of store, 3 behind`."""
        places = [
            f"offset {one.dealt} of {escape(one.forwarder)}"
            + f", {one.end - one.dealt:,} behind" * (one.end > one.dealt)
            for one in subscription.positions
        ]
        return f"{self._who}is at {' and '.join(places)}" if places else ""

    def _tell(self, text: str) -> None:
        if not self._quiet:
            remark(text)


def dropped(gap: LogGap) -> str:
    """`offsets 5 to 10 of store are no more (6 messages, of any topic)`."""
    span = f"offset {gap.first}" if gap.first == gap.last else f"offsets {gap.first} to {gap.last}"
    verb = "is" if gap.first == gap.last else "are"
    return f"{span} of {escape(gap.forwarder)} {verb} no more ({plural(gap.count, 'message')}, of any topic)"
