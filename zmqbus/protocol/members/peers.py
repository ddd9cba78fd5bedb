"""Peers: the words of membership, and the table that keeps them bounded and one to an endpoint. Decides nothing.

Events, for users:
    PeerJoined(peer)              we can reach it (WELCOME) and it can reach us (HELLO); or it is back from silence
    PeerLeft(peer, reason)        "bye", "silent", "restarted" (another origin took its place) or "refused"
    PeerChanged(peer, previous)   a joined peer says something new about itself: endpoints, claims, role …
    DuplicateName(name, origins)  several live nodes share a name; said once, until one of them leaves
Actions, for the engine:
    Dial(endpoint, origin)        connect a fresh DEALER there, replacing any, and send HELLO (origin None: a seed)
    Greet(endpoint, origin)       send HELLO once more through the DEALER that is there
    HangUp(endpoint)              close the DEALER there, if any; report nothing more from it
    Forget(origin)                let go of all that is held for it (its PUB): it is not even awaited any more
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import msgspec

PEERS_MAX = 4096  # each costs a DEALER and a SUB connection: file descriptors; mDNS itself strains at 200
GONE_MAX = PEERS_MAX  # origins remembered only so that stale hints of them are not dialled

Reason = Literal["bye", "silent", "restarted", "refused"]


class State(enum.Enum):
    """Where an origin stands; the transitions are drawn in `zmqbus.protocol.members.membership`."""

    SEEN = "seen"
    JOINED = "joined"
    LOST = "lost"
    GONE = "gone"


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """What a node says about itself in HELLO and WELCOME, and when we met it."""

    origin: int
    """The random 64-bit id that it drew at start."""
    name: str = ""
    """Its human name; "" when known from a hint only."""
    inbox: str
    """Endpoint of its ROUTER: the one to try first."""
    also: tuple[str, ...] = ()
    """Other endpoints of its ROUTER, tried in turn where `inbox` does not answer."""
    pub: str = ""
    """Endpoint of its PUB."""
    epoch: int = 0
    """Grows with every restart on its host (a wall-clock time): tells the newer of two incarnations."""
    role: str = "node"
    claims: tuple[str, ...] = ()
    """Patterns of the topics that it journals."""
    journal: int = 0
    """The number of its journal, the same after a restart; 0: it has none."""
    host: str = ""
    pid: int = 0
    version: str = ""
    """Of zmqbus."""
    joined_at: float = 0.0
    """When it joined, monotonic seconds of this node; 0 before."""
    heard_at: float = 0.0
    """When it was last heard, likewise; 0 before."""


def timeless(peer: Peer) -> Peer:
    """Only what the peer says about itself, so that saying it again compares equal."""
    return msgspec.structs.replace(peer, joined_at=0.0, heard_at=0.0)


# --- events ------------------------------------------------------------------------------------


class PeerJoined(msgspec.Struct, frozen=True):
    """A peer can be reached, and can reach us."""

    peer: Peer


class PeerLeft(msgspec.Struct, frozen=True):
    """A peer that had joined is no longer there."""

    peer: Peer
    reason: Reason


class PeerChanged(msgspec.Struct, frozen=True):
    """A joined peer says something new about itself: compare `pub` and `claims`."""

    peer: Peer
    previous: Peer


class DuplicateName(msgspec.Struct, frozen=True):
    """Several live nodes (this one may be among them) go by one name. All stay: origins tell them apart."""

    name: str
    origins: tuple[int, ...]


# --- actions -----------------------------------------------------------------------------------


class Dial(msgspec.Struct, frozen=True):
    """Connect a fresh DEALER to `endpoint`, replacing any that is there, and send HELLO through it."""

    endpoint: str
    origin: int | None
    """Who is expected there; None for a seed that has not answered yet."""


class Greet(msgspec.Struct, frozen=True):
    """Send HELLO once more through the DEALER to `endpoint`."""

    endpoint: str
    origin: int


class HangUp(msgspec.Struct, frozen=True):
    """Close the DEALER to `endpoint`, if there is one; what it still holds counts for nothing."""

    endpoint: str


class Forget(msgspec.Struct, frozen=True):
    """Let go of everything held for `origin`, first of all connections to its PUB."""

    origin: int


Output = PeerJoined | PeerLeft | PeerChanged | DuplicateName | Dial | Greet | HangUp | Forget
Outputs = Sequence[Output]


# --- the table ---------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Entry:
    """What is known of one origin; `peer` is timeless."""

    peer: Peer
    link: str  # the endpoint our DEALER to it is for: one of its own, a hinted one, or a seed's
    state: State = State.SEEN
    greeted: bool = False  # its HELLO has reached us
    welcomed: bool = False  # our HELLO through `link` was answered: the link is proven
    dial_at: float = inf  # when to dial again; inf when there is nothing to dial for
    attempts: int = 0  # HELLOs sent since it last answered
    told_at: float = -inf  # our last HELLO
    hinted: str = ""  # where else hearsay says it is: to be tried next
    hinted_at: float = -inf
    heard_at: float = -inf  # -inf: known from hearsay only
    joined_at: float = 0.0
    lost_at: float = 0.0

    def snapshot(self) -> Peer:
        return msgspec.structs.replace(self.peer, joined_at=self.joined_at, heard_at=max(self.heard_at, 0.0))


@dataclass(slots=True)
class Seed:
    """An endpoint given by the user: to be dialled until somebody answers, and again when they are gone."""

    dial_at: float = 0.0
    attempts: int = 0
    origin: int | None = None  # who answered there last; may be this node itself


class PeerTable:
    """At most PEERS_MAX entries, no two of which share a link or an inbox; and the origins that went lately."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self._at: dict[str, int] = {}  # every link and inbox → the one origin that has it
        self._gone: dict[int, tuple[float, Reason]] = {}  # until when to remember, and why it went

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        states = [entry.state for entry in self.entries.values()]
        counts = [f"{state.value}={states.count(state)}" for state in (State.SEEN, State.JOINED, State.LOST)]
        return f"<PeerTable {' '.join(counts)} gone={len(self._gone)}>"

    @property
    def is_full(self) -> bool:
        return len(self.entries) >= PEERS_MAX

    def at(self, endpoint: str) -> Entry | None:
        """Who is dialled, or says it is, at this endpoint."""
        origin = self._at.get(endpoint)
        return None if origin is None else self.entries[origin]

    def joined(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.state is State.JOINED]

    def add(self, peer: Peer, link: str) -> Entry:
        """A new entry; there is room, and nobody else at its endpoints."""
        entry = self.entries[peer.origin] = Entry(peer, link)
        self._at[link] = self._at[peer.inbox] = peer.origin
        self._gone.pop(peer.origin, None)
        return entry

    def place(self, entry: Entry, peer: Peer, link: str) -> None:
        """Set who an entry is and where it is dialled; nobody else is there."""
        self._clear(entry)
        entry.peer = peer
        entry.link = link
        self._at[link] = self._at[peer.inbox] = peer.origin

    def remove(self, entry: Entry) -> None:
        del self.entries[entry.peer.origin]
        self._clear(entry)
        entry.state = State.GONE

    def _clear(self, entry: Entry) -> None:
        self._at.pop(entry.link, None)
        self._at.pop(entry.peer.inbox, None)

    def expendable(self) -> Entry | None:
        """Whom to remove for somebody who spoke: the oldest hearsay first, else who has been lost longest."""
        idle = [entry for entry in self.entries.values() if entry.state is State.LOST or entry.heard_at == -inf]
        return min(idle, key=lambda e: (e.state is State.LOST, max(e.hinted_at, e.lost_at)), default=None)

    def bury(self, origin: int, reason: Reason, until: float) -> None:
        """Remember that an origin is gone; at the bound, the one buried first is forgotten."""
        self._gone.pop(origin, None)
        self._gone[origin] = (until, reason)
        if len(self._gone) > GONE_MAX:
            del self._gone[next(iter(self._gone))]

    def is_gone(self, origin: int) -> bool:
        return origin in self._gone

    def why_gone(self, origin: int, now: float) -> Reason | None:
        """The reason, as long as it is remembered."""
        until, reason = self._gone.get(origin, (-inf, None))
        return reason if now < until else None

    def sweep(self, now: float) -> None:
        """Forget who has been gone for long enough."""
        for origin in [origin for origin, (until, _) in self._gone.items() if until <= now]:
            del self._gone[origin]
