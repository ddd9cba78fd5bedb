"""Membership: who is on the bus, whom to dial, and who has left.

Rule 1: everything that decides about peers lives in this file; it knows no sockets, clocks or random numbers.
Rule 2: `now` is monotonic seconds and never goes back. What a method returns is performed at once, in order.
Rule 3: who answers at an endpoint counts, not who was said to be there: a hint never moves a proven link.

    m = Membership(origin, name="web1", seeds=["tcp://10.0.0.5:5555"], jitter=random.random)
    perform(m.tick(now()))                         # the seeds are dialled
    perform(m.hint(origin, inbox, now()))          # mDNS, or a peer listed in a HELLO or WELCOME, names someone
    perform(m.greeted(peer, now()))                # a HELLO came in on our inbox, and was answered by WELCOME
    perform(m.welcomed(peer, endpoint, now()))     # a WELCOME came in through the DEALER dialled to `endpoint`
    perform(m.heard(origin, now()))                # a heartbeat
    when = m.next_timer()                          # call tick then; it may have changed after any of these

The events and actions that methods return are those of `zmqbus.protocol.peers`.

What follows for each state of an origin; "-" stores times at most:

            hint           greeted             welcomed           heard    bye    refused  silence
  unknown   SEEN, Dial     SEEN, Dial          SEEN               -        GONE   GONE
  SEEN      dial sooner    JOINED if both      JOINED if both     -        GONE   GONE     Forget (HINT_S)
  JOINED    -              - (Dial if moved)   -                  -        GONE   GONE     LOST, Dial (lost_after)
  LOST      dial sooner    JOINED              JOINED             JOINED   GONE   GONE     Forget (forget_after)
  GONE      -              as unknown, but - after bye            -        -      -        forgotten

Unanswered dials are repeated with back-off; a seed is dialled for ever, but not while someone met there is well.
A new origin takes the place of an old one that is dialled or advertised at its endpoint (`_supersedes`), or of a
silent one with its host and name and a smaller epoch. Peer exchange passes on first-hand knowledge only
(`known_endpoints`): hearsay about a dead endpoint would otherwise keep itself alive by going round for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Final

import msgspec

from zmqbus.protocol.peers import (
    Dial,
    DuplicateName,
    Forget,
    Greet,
    HangUp,
    Output,
    Outputs,
    Peer,
    PeerChanged,
    PeerJoined,
    PeerLeft,
    Reason,
    State,
)

PEERS_MAX = 4096  # each costs a DEALER and a SUB connection: file descriptors; mDNS itself strains at 200
GONE_MAX = PEERS_MAX  # origins remembered only so that stale hints of them are not dialled
HINT_S = 60.0  # a hint is worth dialling this long; living peers are announced anew every 30 to 60 s
DIAL_S_MIN = 0.25  # back-off of unanswered dials: longer than a LAN's round trip and handshake …
DIAL_S_MAX = 5.0  # … up to what a user who starts the missing node is willing to wait
RESTART_SILENCE_S = 2.0  # two heartbeats missed: the older of two claims to one place is presumed dead
CONTEST_S = 0.5  # how often two peers of one name are looked at, until it is clear whether both live
TICK_S_MIN = 0.05  # timers closer together than this are served together: a tick looks at every peer


_NOTHING: Final[tuple[Output, ...]] = ()
_LOST: Final = State.LOST  # a global is twice as fast to reach as a member of an Enum


@dataclass(slots=True, eq=False)
class _Contact:
    """Someone to dial: `dial_at` is inf when there is nothing to dial for."""

    dial_at: float = 0.0
    attempts: int = 0  # dials since it last answered


@dataclass(slots=True, eq=False)
class _Seed(_Contact):
    origin: int | None = None  # who answered there


@dataclass(slots=True, eq=False, kw_only=True)
class _Entry(_Contact):
    """One origin. `peer` keeps joined_at and heard_at at 0, so that what it says of itself compares equal."""

    peer: Peer
    link: str  # the endpoint that our DEALER to it is for; a seed's may differ from the advertised one
    state: State = State.SEEN
    greeted: bool = False  # its HELLO reached us
    welcomed: bool = False  # our HELLO through `link` was answered: the link is proven
    told_at: float = -inf  # our last HELLO
    hinted_at: float = -inf
    heard_at: float = -inf
    joined_at: float = 0.0
    lost_at: float = 0.0

    def snapshot(self) -> Peer:
        return msgspec.structs.replace(self.peer, joined_at=self.joined_at, heard_at=max(self.heard_at, 0.0))


class Membership:
    """The peers of one node. Methods return Outputs: events to tell and actions to perform, in order.

    `lost_after`, `forget_after`: seconds of silence until a joined peer is LOST, and from then until it is no
    longer dialled. `jitter` returns a number from 0 to 1 that spreads the dials of many nodes.
    """

    def __init__(
        self,
        me: int,
        *,
        name: str = "",
        seeds: Iterable[str] = (),
        lost_after: float = 5.0,
        forget_after: float = 300.0,
        jitter: Callable[[], float],
    ) -> None:
        self.me = me
        self.name = name
        self.lost_after = lost_after
        self.forget_after = forget_after
        self.turned_away = 0  # peers not admitted because PEERS_MAX were known
        self._jitter = jitter
        self._seeds = {endpoint: _Seed() for endpoint in seeds}
        self._entries: dict[int, _Entry] = {}
        self._at: dict[str, int] = {}  # every endpoint dialled or advertised → the one origin that has it
        self._gone: dict[int, tuple[float, Reason]] = {}  # until when, why; in order of time
        self._contested: set[str] = set()  # names to look at until it is clear how many live nodes have them
        self._reported: set[str] = set()  # names told as DuplicateName
        self._next = 0.0 if self._seeds else inf

    # --- questions -----------------------------------------------------------------------------

    def __repr__(self) -> str:
        states = [entry.state for entry in self._entries.values()]
        counts = " ".join(f"{state.value}={states.count(state)}" for state in (State.SEEN, State.JOINED, State.LOST))
        return f"<Membership {self.me:016x} {counts} gone={len(self._gone)} seeds={len(self._seeds)}>"

    @property
    def joined(self) -> int:
        """How many peers are joined."""
        return sum(entry.state is State.JOINED for entry in self._entries.values())

    def peers(self) -> list[Peer]:
        """The joined peers."""
        return [entry.snapshot() for entry in self._entries.values() if entry.state is State.JOINED]

    def peer(self, origin: int) -> Peer | None:
        """What is known of an origin that is SEEN, JOINED or LOST."""
        entry = self._entries.get(origin)
        return None if entry is None else entry.snapshot()

    def state(self, origin: int) -> State | None:
        """Where an origin stands; None when it is unknown."""
        if (entry := self._entries.get(origin)) is not None:
            return entry.state
        return State.GONE if origin in self._gone else None

    def known_endpoints(self) -> list[tuple[int, str]]:
        """(origin, inbox) of the peers that spoke to us and are not lost: what HELLO and WELCOME pass on."""
        return [
            (origin, entry.peer.inbox)
            for origin, entry in self._entries.items()
            if (entry.greeted or entry.welcomed) and entry.state is not State.LOST
        ]

    def next_timer(self) -> float | None:
        """The `now` at which `tick` is due, None when nothing is pending. Ask again after every call."""
        return None if self._next == inf else self._next

    # --- what happens --------------------------------------------------------------------------

    def hint(self, origin: int, inbox: str, now: float, *, name: str = "", pub: str = "", epoch: int = 0) -> Outputs:
        """Hearsay (mDNS, peer exchange): `origin` may be reached at `inbox`. Screen other hosts' loopback first."""
        if origin == self.me or self._why_gone(origin, now) is not None:
            return _NOTHING
        out: list[Output] = []
        entry = self._entries.get(origin) or self._holder(inbox)
        if entry is None:
            if len(self._entries) >= PEERS_MAX:  # hearsay pushes nobody out
                self.turned_away += 1
                return _NOTHING
            entry = self._add(Peer(origin=origin, name=name, inbox=inbox, pub=pub, epoch=epoch), inbox)
            entry.hinted_at = now
            self._dial(entry, now, out)
            return out
        entry.hinted_at = now
        if not entry.welcomed:
            if entry.peer.origin == origin and self._holder(inbox) in (None, entry):
                heard = entry.heard_at > -inf  # then it told us its endpoint itself
                peer = entry.peer if heard else msgspec.structs.replace(entry.peer, inbox=inbox, pub=pub)
                self._place(entry, peer, inbox, out)
            entry.attempts = 0
            entry.dial_at = min(entry.dial_at, now + self._delay(0))  # never later: hints cannot put off a dial
            self._mind(entry)
        return out

    def greeted(self, peer: Peer, now: float) -> Outputs:
        """Its HELLO came in on our inbox, and was answered by WELCOME."""
        out: list[Output] = []
        entry = self._meet(peer, None, now, out)
        if entry is None:
            return out
        moved = peer.inbox != entry.peer.inbox
        self._learn(entry, peer, now, out)
        entry.greeted = True
        if entry.link != peer.inbox and (moved or not entry.welcomed):
            self._place(entry, entry.peer, peer.inbox, out)
            self._dial(entry, now, out)
        elif not entry.welcomed:
            if now - entry.told_at >= DIAL_S_MIN:  # it is up: no need to sit out the back-off
                self._dial(entry, now, out)
        elif entry.state is State.JOINED and now - entry.told_at > DIAL_S_MAX:
            # Not an answer to a HELLO of ours: it had forgotten us, and waits for one.
            self._greet(entry, now, out)
        self._join_if_met(entry, now, out)
        return out

    def welcomed(self, peer: Peer, endpoint: str, now: float) -> Outputs:
        """Its WELCOME came in through the DEALER dialled to `endpoint`."""
        out: list[Output] = []
        if peer.origin == self.me:
            self._meet_myself(endpoint, now, out)
            return out
        entry = self._meet(peer, endpoint, now, out)
        if entry is None:
            return out
        self._learn(entry, peer, now, out)
        if (seed := self._seeds.get(endpoint)) is not None:
            seed.origin = peer.origin
        if entry.link != endpoint and entry.welcomed:
            out.append(HangUp(endpoint))  # two ways to one peer, such as a seed's host name: one is enough
        else:
            self._place(entry, entry.peer, endpoint, out)
            entry.welcomed = True
        entry.attempts = 0
        entry.dial_at = inf if entry.greeted else now + DIAL_S_MAX  # then ask it for its HELLO once more
        self._join_if_met(entry, now, out)
        self._mind(entry)
        return out

    def heard(self, origin: int, now: float) -> Outputs:
        """A heartbeat, or any other message of a peer. The hot path: mostly it stores the time."""
        entry = self._entries.get(origin)
        if entry is None:
            return _NOTHING
        entry.heard_at = now
        if entry.state is not _LOST:
            return _NOTHING
        out: list[Output] = []
        self._join(entry, now, out)
        return out

    def bye(self, origin: int, now: float) -> Outputs:
        """It said that it is closing. Nothing it said before, and no hint, brings it back."""
        return self._part(origin, "bye", now)

    def refused(self, origin: int, now: float) -> Outputs:
        """It, or we, will not have the other: key, version or roster. Its next HELLO or WELCOME starts anew."""
        return self._part(origin, "refused", now)

    def tick(self, now: float) -> Outputs:
        """What time alone has brought about. Does nothing before `next_timer()`, and always moves that on."""
        if now < self._next:
            return _NOTHING
        out: list[Output] = []
        for entry in list(self._entries.values()):
            self._attend(entry, now, out)
        self._review_names(now, out)
        due = now + CONTEST_S if self._contested else inf
        for endpoint, seed in self._seeds.items():
            if self._is_covered(endpoint, seed):
                seed.attempts = 0
                seed.dial_at = now  # at once when it no longer is
                continue
            if seed.dial_at <= now:
                out.append(Dial(endpoint, None))
                seed.dial_at = now + self._delay(seed.attempts)
                seed.attempts += 1
            due = min(due, seed.dial_at)
        for origin in [origin for origin, (until, _) in self._gone.items() if until <= now]:
            del self._gone[origin]
        for entry in self._entries.values():
            due = min(due, self._deadline(entry))
        self._next = max(due, now + TICK_S_MIN)
        return out

    # --- time ----------------------------------------------------------------------------------

    def _deadline(self, entry: _Entry) -> float:
        """When `_attend` has something to do for this entry, if nothing is heard until then."""
        if entry.state is State.JOINED:
            return min(entry.dial_at, entry.heard_at + self.lost_after)
        if entry.state is State.LOST:
            return min(entry.dial_at, entry.lost_at + self.forget_after)
        return min(entry.dial_at, max(entry.hinted_at, entry.heard_at) + HINT_S)

    def _attend(self, entry: _Entry, now: float, out: list[Output]) -> None:
        """What time has brought about for one entry; `_deadline` says when to look."""
        if entry.state is State.JOINED:
            if entry.heard_at + self.lost_after <= now:
                self._lose(entry, now, out)
        elif entry.state is State.LOST:
            if entry.lost_at + self.forget_after <= now:
                self._drop(entry, None, now, out)
                return
        elif max(entry.hinted_at, entry.heard_at) + HINT_S <= now:
            self._drop(entry, None, now, out)
            return
        if entry.dial_at > now:
            return
        if entry.welcomed and entry.attempts == 0:  # half joined: it answers, but its own HELLO has not come
            entry.attempts = 1
            entry.dial_at = now + DIAL_S_MAX
            self._greet(entry, now, out)
        else:
            self._dial(entry, now, out)

    def _lose(self, entry: _Entry, now: float, out: list[Output]) -> None:
        out.append(PeerLeft(entry.snapshot(), "silent"))
        self._reported.discard(entry.peer.name)
        entry.state = State.LOST
        entry.lost_at = now
        entry.attempts = 0
        self._place(entry, entry.peer, entry.peer.inbox, out)
        self._dial(entry, now, out)

    def _mind(self, entry: _Entry) -> None:
        self._next = min(self._next, self._deadline(entry))

    def _delay(self, attempts: int) -> float:
        """Back-off after so many unanswered dials before this one: from DIAL_S_MIN to DIAL_S_MAX, jittered."""
        longest = min(DIAL_S_MAX, DIAL_S_MIN * 2.0 ** min(attempts + 1, 16))
        return longest * (1.0 + self._jitter()) / 2.0

    def _dial(self, entry: _Entry, now: float, out: list[Output]) -> None:
        out.append(Dial(entry.link, entry.peer.origin))
        entry.welcomed = False
        entry.told_at = now
        entry.dial_at = now + self._delay(entry.attempts)
        entry.attempts += 1
        self._mind(entry)

    def _greet(self, entry: _Entry, now: float, out: list[Output]) -> None:
        out.append(Greet(entry.link, entry.peer.origin))
        entry.told_at = now

    def _is_covered(self, endpoint: str, seed: _Seed) -> bool:
        """Whether a seed needs no dial of its own: it is us, it is someone's link, or who answered there is well."""
        holder = self._holder(endpoint)
        if seed.origin == self.me or (holder is not None and holder.link == endpoint):
            return True
        answered = None if seed.origin is None else self._entries.get(seed.origin)
        return answered is not None and answered.state is not State.LOST

    # --- meeting -------------------------------------------------------------------------------

    def _meet(self, peer: Peer, endpoint: str | None, now: float, out: list[Output]) -> _Entry | None:
        """The entry of a peer that spoke, through our DEALER to `endpoint` if not None. Makes one if need be, and
        retires whom it takes the place of. None when it is not to be: it is us, closing, stale, or one too many.
        """
        origin = peer.origin
        if origin == self.me or self._why_gone(origin, now) == "bye":
            return None
        holders = {self._at.get(place) for place in (endpoint or peer.inbox, peer.inbox)}
        rivals = [self._entries[holder] for holder in holders if holder is not None and holder != origin]
        if not all(_supersedes(peer, rival, now) for rival in rivals):
            return None
        entry = self._entries.get(origin)
        if entry is None and not rivals and not self._make_room(now, out):
            return None
        for rival in rivals:
            self._drop(rival, "restarted", now, out, keep=endpoint)
        if entry is None:
            self._gone.pop(origin, None)
            entry = self._add(_said(peer), endpoint or peer.inbox)
        entry.heard_at = now
        return entry

    def _meet_myself(self, endpoint: str, now: float, out: list[Output]) -> None:
        """We dialled our own inbox: a seed list shared by all hosts, or a hint left over from an earlier run."""
        if (seed := self._seeds.get(endpoint)) is not None:
            seed.origin = self.me
        holder = self._holder(endpoint)
        if holder is not None and holder.link == endpoint:
            self._drop(holder, "restarted", now, out)
        else:
            out.append(HangUp(endpoint))

    def _learn(self, entry: _Entry, peer: Peer, now: float, out: list[Output]) -> None:
        """Take over what the peer says of itself now."""
        said = _said(peer)
        if said == entry.peer:
            return
        previous = entry.snapshot()
        self._place(entry, said, entry.link, out)
        if entry.state is State.JOINED:
            out.append(PeerChanged(entry.snapshot(), previous))
            if said.name != previous.name:
                self._reported.discard(previous.name)
                self._contest(said.name, now)

    def _join_if_met(self, entry: _Entry, now: float, out: list[Output]) -> None:
        if entry.state is State.LOST or (entry.state is State.SEEN and entry.greeted and entry.welcomed):
            self._join(entry, now, out)

    def _join(self, entry: _Entry, now: float, out: list[Output]) -> None:
        entry.state = State.JOINED
        entry.joined_at = now
        # Back from silence, the new link may be unproven yet: leave it time, and re-dial only then.
        entry.dial_at = inf if entry.welcomed else max(entry.dial_at, now + DIAL_S_MAX)
        namesakes = [other for other in self._entries.values() if other.peer.name == entry.peer.name]
        self._retire_predecessors(namesakes, now, out)
        if len(namesakes) > 1 or entry.peer.name == self.name:
            self._contest(entry.peer.name, now)
        out.append(PeerJoined(entry.snapshot()))
        self._mind(entry)

    # --- names ---------------------------------------------------------------------------------

    def _contest(self, name: str, now: float) -> None:
        if name:
            self._contested.add(name)
            self._next = min(self._next, now + CONTEST_S)

    def _retire_predecessors(self, namesakes: list[_Entry], now: float, out: list[Output]) -> None:
        """Of `namesakes`, drop those that are silent and older than a joined one on the same host."""
        newest: dict[str, int] = {}
        for entry in namesakes:
            if entry.state is State.JOINED:
                newest[entry.peer.host] = max(entry.peer.epoch, newest.get(entry.peer.host, entry.peer.epoch))
        for entry in namesakes:
            older = entry.peer.epoch < newest.get(entry.peer.host, entry.peer.epoch)
            if older and now - entry.heard_at > RESTART_SILENCE_S:
                self._drop(entry, "restarted", now, out)

    def _review_names(self, now: float, out: list[Output]) -> None:
        """Settle contested names: the older was a dead predecessor, or all of them live and are reported."""
        if not self._contested:
            return
        groups: dict[str, list[_Entry]] = {name: [] for name in self._contested}
        for entry in self._entries.values():
            if entry.peer.name in groups:
                groups[entry.peer.name].append(entry)
        for name, group in groups.items():
            self._retire_predecessors(group, now, out)
            live = [entry for entry in group if entry.state is State.JOINED]
            origins = [entry.peer.origin for entry in live] + ([self.me] if name == self.name else [])
            if len(origins) >= 2 and name not in self._reported:
                youngest = max(live, key=lambda entry: entry.joined_at)
                if any(entry.heard_at <= youngest.joined_at for entry in live if entry is not youngest):
                    continue  # not heard since: it may be the dead one of a quick restart
                self._reported.add(name)
                out.append(DuplicateName(name, tuple(sorted(origins))))
            self._contested.discard(name)

    # --- parting -------------------------------------------------------------------------------

    def _part(self, origin: int, reason: Reason, now: float) -> Outputs:
        out: list[Output] = []
        if (entry := self._entries.get(origin)) is not None:
            self._drop(entry, reason, now, out)
        elif origin != self.me:
            self._bury(origin, reason, now)
        return out

    def _drop(
        self, entry: _Entry, reason: Reason | None, now: float, out: list[Output], keep: str | None = None
    ) -> None:
        """Forget an entry; with a reason, remember that it is gone. The DEALER to `keep` stays open."""
        origin = entry.peer.origin
        del self._entries[origin]
        self._at.pop(entry.link, None)
        self._at.pop(entry.peer.inbox, None)
        if entry.state is State.JOINED and reason is not None:
            out.append(PeerLeft(entry.snapshot(), reason))
            self._reported.discard(entry.peer.name)
        entry.state = State.GONE
        if entry.link != keep:
            out.append(HangUp(entry.link))
        out.append(Forget(origin))
        if reason is not None:
            self._bury(origin, reason, now)
        if self._seeds:
            self._next = min(self._next, now)  # a seed may be on its own again

    def _bury(self, origin: int, reason: Reason, now: float) -> None:
        # A bye is certain. The others may be mistaken or mended, so hints of them count again before long.
        self._gone.pop(origin, None)
        self._gone[origin] = (now + (self.forget_after if reason == "bye" else HINT_S), reason)
        if len(self._gone) > GONE_MAX:
            del self._gone[next(iter(self._gone))]

    def _why_gone(self, origin: int, now: float) -> Reason | None:
        until, reason = self._gone.get(origin, (-inf, None))
        return reason if now < until else None

    # --- the table -----------------------------------------------------------------------------

    def _holder(self, endpoint: str) -> _Entry | None:
        origin = self._at.get(endpoint)
        return None if origin is None else self._entries[origin]

    def _add(self, peer: Peer, link: str) -> _Entry:
        entry = _Entry(peer=peer, link=link, dial_at=inf)
        self._entries[peer.origin] = entry
        self._at[link] = self._at[peer.inbox] = peer.origin
        return entry

    def _place(self, entry: _Entry, peer: Peer, link: str, out: list[Output]) -> None:
        """Set what is known of an entry and where it is dialled; nobody else holds these endpoints."""
        self._at.pop(entry.link, None)
        self._at.pop(entry.peer.inbox, None)
        if link != entry.link:
            out.append(HangUp(entry.link))
            entry.welcomed = False
        entry.peer = peer
        entry.link = link
        self._at[link] = self._at[peer.inbox] = peer.origin

    def _make_room(self, now: float, out: list[Output]) -> bool:
        """Room for one who spoke: at the bound, hearsay goes first, oldest first, then the longest lost."""
        if len(self._entries) < PEERS_MAX:
            return True
        idle = [entry for entry in self._entries.values() if entry.state is State.LOST or entry.heard_at == -inf]
        if not idle:
            self.turned_away += 1
            return False
        oldest = min(idle, key=lambda entry: (entry.state is State.LOST, max(entry.hinted_at, entry.lost_at)))
        self._drop(oldest, None, now, out)
        return True


def _supersedes(peer: Peer, old: _Entry, now: float) -> bool:
    """Whether a peer that spoke from the place of `old` is its successor, not an echo from before it.

    Epochs come from wall clocks, which may have been set back: where the old one is silent they do not count.
    """
    silent = now - old.heard_at > RESTART_SILENCE_S
    return silent or (peer.host == old.peer.host and peer.epoch >= old.peer.epoch)


def _said(peer: Peer) -> Peer:
    return msgspec.structs.replace(peer, joined_at=0.0, heard_at=0.0)
