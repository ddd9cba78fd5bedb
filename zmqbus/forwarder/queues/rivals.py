"""Which of several forwarders gives out what more than one of them claims: the one with the lowest journal number, of
those that are there, or fell silent and were not given up yet. Knows no clock: callers pass `now`, monotonic seconds.

Who starts again on the same journal is the same. Only who has said goodbye, or was silent for as long as nodes are kept
in mind, is replaced: its journal may be back with what others would otherwise give out once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from zmqbus.protocol.members.peers import Peer, Reason

FORGOTTEN_AFTER = 300.0  # seconds of silence; as membership has it


@dataclass(slots=True)
class Rival:
    """Another forwarder."""

    peer: Peer
    until: float = inf
    """When it is given up, if it is silent."""


class Rivals:
    """The other forwarders, as far as they come first."""

    def __init__(self, journal: int, claims: Sequence[str]) -> None:
        self._journal = journal
        self._claims = tuple(claims)
        self._rivals: dict[int, Rival] = {}  # by journal

    def met(self, peer: Peer) -> bool:
        """A peer is there, or says something new of itself. Returns whether that changes anything."""
        if not 0 < peer.journal < self._journal:
            return False
        known = self._rivals.get(peer.journal)
        self._rivals[peer.journal] = Rival(peer)
        return known is None or known.peer.claims != peer.claims

    def left(self, peer: Peer, reason: Reason, now: float) -> bool:
        """A peer is not there any more. Returns whether that changes anything."""
        known = self._rivals.get(peer.journal)
        if known is None or known.peer.origin != peer.origin:
            return False
        if reason == "silent":
            known.until = now + FORGOTTEN_AFTER
            return False
        del self._rivals[peer.journal]
        return True

    def tick(self, now: float) -> bool:
        """Now and then. Returns whether somebody was given up."""
        silent = [journal for journal, rival in self._rivals.items() if rival.until <= now]
        for journal in silent:
            del self._rivals[journal]
        return bool(silent)

    def over(self, patterns: Sequence[str]) -> str:
        """Who gives out what fits these patterns in our place; "" if it is we."""
        for rival in self._rivals.values():
            for theirs in rival.peer.claims:
                for ours in self._claims:
                    if overlap(theirs, ours) and any(overlap(p, ours) and overlap(p, theirs) for p in patterns):
                        return rival.peer.name
        return ""


def overlap(one: str, other: str) -> bool:
    """Whether some topic fits both patterns. If each two of three overlap, so do all three: in each place there is a
    token or any, and so there is for their lengths."""
    left, right = one.split("."), other.split(".")
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if not place and "$" in (a[:1], b[:1]) and a != b:
            return False  # wildcards leave the reserved topics alone
        if ">" in (a, b):
            return True
        if a != b and "*" not in (a, b):
            return False
    return len(left) == len(right)
