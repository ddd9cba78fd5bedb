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

What they return, events for users and actions for the engine, is listed in `zmqbus.protocol.members.peers`.
What follows for each state of an origin ("-" stores times at most):

            hint           greeted             welcomed           heard    bye    refused  silence
  unknown   SEEN, Dial     SEEN, Dial          SEEN               -        GONE   GONE
  SEEN      dial sooner    JOINED if both      JOINED if both     -        GONE   GONE     Forget (HINT_S)
  JOINED    -              - (Dial if moved)   -                  -        GONE   GONE     LOST, Dial (lost_after)
  LOST      dial sooner    JOINED              JOINED             JOINED   GONE   GONE     Forget (forget_after)
  GONE      -              as unknown, but - after bye            -        -      -        forgotten

Unanswered dials are repeated with back-off, at each endpoint in turn; a seed is dialled for ever, but not while
who answered there is known. A new origin takes the place of an old one that is dialled or advertised at its
endpoint (`_supersedes`), or of a silent one with its host and name and a smaller epoch.

Peer exchange rides on HELLO and WELCOME: `known_endpoints()` of one are hints to the other. Only first-hand
knowledge is passed on: hearsay about a dead endpoint would keep itself alive by going round for ever. Every
half-minute or so one peer is greeted again, so that a view that was incomplete or partitioned heals without mDNS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from typing import Final

from zmqbus.protocol.members.peers import (
    Dial,
    DuplicateName,
    Entry,
    Forget,
    Greet,
    HangUp,
    Output,
    Outputs,
    Peer,
    PeerChanged,
    PeerJoined,
    PeerLeft,
    PeerTable,
    Reason,
    Seed,
    State,
    timeless,
)

HINT_S = 60.0  # a hint is worth dialling this long; living peers are announced anew every 30 to 60 s
EXCHANGE_S = 60.0  # one peer is asked again for whom it knows, every half to whole of this
DIAL_S_MIN = 0.25  # back-off of unanswered dials: longer than a LAN's round trip and handshake …
DIAL_S_MAX = 5.0  # … up to what a user who starts the missing node is willing to wait
ANSWER_S = 2.0  # a HELLO that follows ours this soon is its answer, and not answered in turn
RESTART_SILENCE_S = 2.0  # two heartbeats missed: the older of two claims to one place is presumed dead
CONTEST_S = 0.5  # how often peers of one name are looked at, until it is clear whether all of them live
TICK_S_MIN = 0.05  # timers closer together than this are served together: a tick looks at every peer

_NOTHING: Final[tuple[Output, ...]] = ()
_LOST: Final = State.LOST  # for the hot path: a member of an Enum costs more to reach than a global


class Membership:
    """The peers of one node.

    `lost_after`, `forget_after`: seconds of silence until a joined peer is LOST, and from then until it is no
    longer dialled. `jitter` returns a number from 0 to 1 that spreads the timers of many nodes.
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
        self.turned_away = 0  # peers and hints not taken in because PEERS_MAX were known
        self._jitter = jitter
        self._seeds = {endpoint: Seed() for endpoint in seeds}
        self._table = PeerTable()
        self._contested: set[str] = set()  # names to look at until it is clear how many live nodes have them
        self._reported: set[str] = set()  # names told as DuplicateName
        self._exchange_at = inf
        self._told = 0  # where known_endpoints left off
        self._next = 0.0 if self._seeds else inf

    # --- questions -----------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<Membership {self.me:016x} {self._table!r} seeds={len(self._seeds)}>"

    @property
    def joined(self) -> list[int]:
        """The origins of the joined peers."""
        return [entry.peer.origin for entry in self._table.joined()]

    def peers(self) -> list[Peer]:
        """The joined peers."""
        return [entry.snapshot() for entry in self._table.joined()]

    def state(self, origin: int) -> State | None:
        """Where an origin stands; None when it is unknown."""
        if (entry := self._table.entries.get(origin)) is not None:
            return entry.state
        return State.GONE if self._table.is_gone(origin) else None

    def known_endpoints(self, limit: int = 256) -> list[tuple[int, str]]:
        """(origin, inbox) of peers that spoke to us and are not lost, for HELLO and WELCOME to pass on.

        Where there are more than `limit`, each call continues after the last: all get told in turn.
        """
        known = [
            (origin, entry.peer.inbox)
            for origin, entry in self._table.entries.items()
            if (entry.greeted or entry.welcomed) and entry.state is not State.LOST
        ]
        if len(known) <= limit:
            return known
        start = self._told % len(known)
        self._told = start + limit
        return (known + known)[start : start + limit]

    def next_timer(self) -> float | None:
        """The `now` at which `tick` is due, None when nothing is pending. Ask again after every call."""
        return None if self._next == inf else self._next

    # --- what happens --------------------------------------------------------------------------

    def hint(
        self, origin: int, inbox: str, now: float, *, also: tuple[str, ...] = (), name: str = "", pub: str = ""
    ) -> Outputs:
        """Hearsay (mDNS, peer exchange): `origin` may be reached at `inbox`. Screen other hosts' loopback first."""
        if origin == self.me or self._table.why_gone(origin, now) is not None:
            return _NOTHING
        out: list[Output] = []
        holder = self._table.at(inbox)
        entry = self._table.entries.get(origin) or holder
        if entry is None:
            if self._table.is_full:  # hearsay pushes nobody out
                self.turned_away += 1
                return _NOTHING
            entry = self._table.add(Peer(origin=origin, name=name, inbox=inbox, also=also, pub=pub), inbox)
            entry.hinted_at = now
            self._dial(entry, now, out)
            return out
        news = now - entry.hinted_at >= DIAL_S_MAX  # what all others say again and again, at the boot of a LAN, is none
        entry.hinted_at = now
        if not entry.welcomed:
            if entry.peer.origin == origin and entry.link != inbox:
                news = news or entry.hinted != inbox
                entry.hinted = inbox
            if news:
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
        moved = (peer.inbox, peer.also) != (entry.peer.inbox, entry.peer.also)
        self._learn(entry, peer, now, out)
        entry.greeted = True
        if entry.link not in (peer.inbox, *peer.also) and (moved or not entry.welcomed):
            self._place(entry, entry.peer, peer.inbox, out)
            entry.attempts = 0
            self._dial(entry, now, out)
        elif not entry.welcomed:
            if now - entry.told_at >= DIAL_S_MIN:  # it is up: no need to sit out the back-off
                self._dial(entry, now, out)
        elif entry.state is State.JOINED and now - entry.told_at > ANSWER_S:
            # Not an answer to a HELLO of ours: it may have forgotten us, and will not join before it has one.
            self._greet(entry, now, out)
        self._join_if_met(entry, now, out)
        return out

    def welcomed(self, peer: Peer, endpoint: str, now: float) -> Outputs:
        """Its WELCOME came in through the DEALER dialled to `endpoint`."""
        out: list[Output] = []
        if (seed := self._seeds.get(endpoint)) is not None:
            seed.origin = peer.origin
        if peer.origin == self.me:
            self._meet_myself(endpoint, now, out)
            return out
        entry = self._meet(peer, endpoint, now, out)
        if entry is None:
            return out
        self._learn(entry, peer, now, out)
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
        entry = self._table.entries.get(origin)
        if entry is None:
            return _NOTHING
        entry.heard_at = now
        if entry.state is not _LOST:
            return _NOTHING
        out: list[Output] = []
        self._join(entry, now, out)
        return out

    def bye(self, origin: int, now: float) -> Outputs:
        """It said that it is closing. Nothing that it said before, and no hint, brings it back."""
        return self._part(origin, "bye", now)

    def refused(self, origin: int, now: float) -> Outputs:
        """It, or we, will not have the other: key, version or roster. Its next HELLO or WELCOME starts anew."""
        return self._part(origin, "refused", now)

    def tick(self, now: float) -> Outputs:
        """What time alone brings about. Does nothing before `next_timer()`, and always moves that on."""
        if now < self._next:
            return _NOTHING
        out: list[Output] = []
        for entry in list(self._table.entries.values()):
            self._attend(entry, now, out)
        self._review_names(now, out)
        due = now + CONTEST_S if self._contested else inf
        due = min(due, self._dial_seeds(now, out))
        due = min(due, self._exchange(now, out))
        due = min(due, min(map(self._deadline, self._table.entries.values()), default=inf))
        self._table.sweep(now)
        self._next = max(due, now + TICK_S_MIN)
        return out

    # --- time ----------------------------------------------------------------------------------

    def _deadline(self, entry: Entry) -> float:
        """When `_attend` has something to do for this entry, if nothing happens until then."""
        if entry.state is State.JOINED:
            return min(entry.dial_at, entry.heard_at + self.lost_after)
        if entry.state is State.LOST:
            return min(entry.dial_at, entry.lost_at + self.forget_after)
        return min(entry.dial_at, max(entry.hinted_at, entry.heard_at) + HINT_S)

    def _mind(self, entry: Entry) -> None:
        self._next = min(self._next, self._deadline(entry))

    def _attend(self, entry: Entry, now: float, out: list[Output]) -> None:
        """What time brings about for one entry; `_deadline` says when to look."""
        if entry.state is State.JOINED:
            if entry.heard_at + self.lost_after <= now:
                self._lose(entry, now, out)
        elif entry.state is State.LOST:
            if entry.lost_at + self.forget_after <= now:
                return self._drop(entry, None, now, out)
        elif max(entry.hinted_at, entry.heard_at) + HINT_S <= now:
            return self._drop(entry, None, now, out)
        if entry.dial_at > now:
            return None
        if entry.welcomed and entry.attempts == 0:  # half joined: it answers, but its own HELLO has not come
            entry.attempts = 1
            entry.dial_at = now + DIAL_S_MAX
            return self._greet(entry, now, out)
        places = [entry.peer.inbox, *entry.peer.also]
        places += [endpoint for endpoint, seed in self._seeds.items() if seed.origin == entry.peer.origin]
        after = places.index(entry.link) + 1 if entry.link in places else 0
        place = entry.hinted or places[after % len(places)]
        entry.hinted = ""
        if self._table.at(place) in (None, entry):
            self._place(entry, entry.peer, place, out)
        return self._dial(entry, now, out)

    def _lose(self, entry: Entry, now: float, out: list[Output]) -> None:
        out.append(PeerLeft(entry.snapshot(), "silent"))
        self._reported.discard(entry.peer.name)
        entry.state = State.LOST
        entry.lost_at = now
        entry.attempts = 0
        self._dial(entry, now, out)

    def _delay(self, attempts: int) -> float:
        """Back-off of the next dial after so many unanswered: from DIAL_S_MIN to DIAL_S_MAX, jittered."""
        longest = min(DIAL_S_MAX, DIAL_S_MIN * 2.0 ** min(attempts + 1, 16))
        return longest * (1.0 + self._jitter()) / 2.0

    def _dial(self, entry: Entry, now: float, out: list[Output]) -> None:
        out.append(Dial(entry.link, entry.peer.origin))
        entry.welcomed = False
        entry.told_at = now
        entry.dial_at = now + self._delay(entry.attempts)
        entry.attempts += 1
        self._mind(entry)

    def _greet(self, entry: Entry, now: float, out: list[Output]) -> None:
        out.append(Greet(entry.link, entry.peer.origin))
        entry.told_at = now

    def _dial_seeds(self, now: float, out: list[Output]) -> float:
        """Dial the seeds that are due; return when the next will be."""
        due = inf
        for endpoint, seed in self._seeds.items():
            holder = self._table.at(endpoint)
            dialled = holder is not None and holder.link == endpoint
            if dialled or seed.origin == self.me or seed.origin in self._table.entries:
                seed.attempts = 0
                seed.dial_at = now  # at once when that is no longer so
                continue
            if seed.dial_at <= now:
                out.append(Dial(endpoint, None))
                seed.dial_at = now + self._delay(seed.attempts)
                seed.attempts += 1
            due = min(due, seed.dial_at)
        return due

    def _exchange(self, now: float, out: list[Output]) -> float:
        """Ask some peer again for whom it knows, if it is time to; return when it will be."""
        linked = [entry for entry in self._table.joined() if entry.welcomed]
        if not linked:
            return inf
        if self._exchange_at <= now:
            self._exchange_at = now + EXCHANGE_S * (1.0 + self._jitter()) / 2.0
            self._greet(linked[int(self._jitter() * len(linked)) % len(linked)], now, out)
        return self._exchange_at

    # --- meeting -------------------------------------------------------------------------------

    def _meet(self, peer: Peer, endpoint: str | None, now: float, out: list[Output]) -> Entry | None:
        """The entry of a peer that spoke (if `endpoint` is not None, through our DEALER to it), new if need be.

        Retires whom it takes the place of. None when there is to be none: it is this node itself, or closing,
        or an echo of the past, or there is no room.
        """
        origin = peer.origin
        if origin == self.me or self._table.why_gone(origin, now) == "bye":
            return None
        holders = dict.fromkeys(map(self._table.at, (endpoint or peer.inbox, peer.inbox)))
        rivals = [holder for holder in holders if holder is not None and holder.peer.origin != origin]
        if not all(_supersedes(peer, rival, now) for rival in rivals):
            return None
        for rival in rivals:
            self._drop(rival, "restarted", now, out, keep=endpoint)
        entry = self._table.entries.get(origin)
        if entry is None:
            if self._table.is_full:
                expendable = self._table.expendable()
                if expendable is None:
                    self.turned_away += 1
                    return None
                self._drop(expendable, None, now, out)
            entry = self._table.add(timeless(peer), endpoint or peer.inbox)
        entry.heard_at = now
        return entry

    def _meet_myself(self, endpoint: str, now: float, out: list[Output]) -> None:
        """We dialled our own inbox: a seed list shared by all hosts, or a hint left over from an earlier run."""
        holder = self._table.at(endpoint)
        if holder is not None and holder.link == endpoint:
            self._drop(holder, "restarted", now, out)
        else:
            out.append(HangUp(endpoint))

    def _learn(self, entry: Entry, peer: Peer, now: float, out: list[Output]) -> None:
        """Take over what a peer says of itself now."""
        said = timeless(peer)
        if said == entry.peer:
            return
        previous = entry.snapshot()
        self._place(entry, said, entry.link, out)
        if entry.state is State.JOINED:
            out.append(PeerChanged(entry.snapshot(), previous))
            if said.name != previous.name:
                self._reported.discard(previous.name)
                self._contest(said.name, now)

    def _place(self, entry: Entry, peer: Peer, link: str, out: list[Output]) -> None:
        """Set who an entry is and where it is dialled; a new link is unproven."""
        if link != entry.link:
            out.append(HangUp(entry.link))
            entry.welcomed = False
            if entry.link in self._seeds:
                self._next = 0.0  # it is on its own again
        self._table.place(entry, peer, link)

    def _join_if_met(self, entry: Entry, now: float, out: list[Output]) -> None:
        if entry.state is State.LOST or (entry.state is State.SEEN and entry.greeted and entry.welcomed):
            self._join(entry, now, out)

    def _join(self, entry: Entry, now: float, out: list[Output]) -> None:
        entry.state = State.JOINED
        entry.joined_at = now
        # Back from silence, its new link may be unproven yet: leave that some time before dialling anew.
        entry.dial_at = inf if entry.welcomed else max(entry.dial_at, now + DIAL_S_MAX)
        self._retire_predecessors(self._named({entry.peer.name})[entry.peer.name], now, out)
        self._contest(entry.peer.name, now)
        out.append(PeerJoined(entry.snapshot()))
        if self._exchange_at == inf:
            self._exchange_at = now + DIAL_S_MAX  # soon after the start, when many may be joining at once
        self._next = min(self._next, self._deadline(entry), max(self._exchange_at, now))

    # --- names ---------------------------------------------------------------------------------

    def _contest(self, name: str, now: float) -> None:
        if name:
            self._contested.add(name)
            self._next = min(self._next, now + CONTEST_S)

    def _named(self, names: set[str]) -> dict[str, list[Entry]]:
        """For each of `names`, who has joined by it (and may be lost by now)."""
        named: dict[str, list[Entry]] = {name: [] for name in names}
        for entry in self._table.entries.values():
            if entry.state is not State.SEEN and entry.peer.name in named:
                named[entry.peer.name].append(entry)
        return named

    def _retire_predecessors(self, namesakes: list[Entry], now: float, out: list[Output]) -> None:
        """Of `namesakes`, drop those that are silent and older than a joined one on the same host."""
        newest: dict[str, int] = {}
        for entry in sorted(namesakes, key=lambda entry: entry.peer.epoch):
            if entry.state is State.JOINED:
                newest[entry.peer.host] = entry.peer.epoch
        for entry in namesakes:
            older = entry.peer.epoch < newest.get(entry.peer.host, 0)
            if older and now - entry.heard_at > RESTART_SILENCE_S:
                self._drop(entry, "restarted", now, out)

    def _review_names(self, now: float, out: list[Output]) -> None:
        """Settle contested names: the older was a dead predecessor, or all of them live and are reported."""
        if not self._contested:
            return
        for name, namesakes in self._named(self._contested).items():
            self._retire_predecessors(namesakes, now, out)
            live = [entry for entry in namesakes if entry.state is State.JOINED]
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
        if (entry := self._table.entries.get(origin)) is not None:
            self._drop(entry, reason, now, out)
        elif origin != self.me:
            self._bury(origin, reason, now)
        return out

    def _drop(
        self, entry: Entry, reason: Reason | None, now: float, out: list[Output], keep: str | None = None
    ) -> None:
        """Forget an entry; with a reason, remember that it is gone. The DEALER to `keep` stays open."""
        if entry.state is State.JOINED and reason is not None:
            out.append(PeerLeft(entry.snapshot(), reason))
            self._reported.discard(entry.peer.name)
        self._table.remove(entry)
        if entry.link != keep:
            out.append(HangUp(entry.link))
        out.append(Forget(entry.peer.origin))
        if reason is not None:
            self._bury(entry.peer.origin, reason, now)
        if self._seeds:
            self._next = min(self._next, now)  # one of them may be on its own again

    def _bury(self, origin: int, reason: Reason, now: float) -> None:
        # A bye is certain. The others may be mistaken or mended, so hints of them count again before long.
        self._table.bury(origin, reason, now + (self.forget_after if reason == "bye" else HINT_S))


def _supersedes(peer: Peer, old: Entry, now: float) -> bool:
    """Whether a peer that spoke from the place of `old` is its successor, not an echo from before it.

    Epochs come from wall clocks, which may have been set back: where the old one is silent they do not count.
    """
    silent = now - old.heard_at > RESTART_SILENCE_S
    return silent or (peer.host == old.peer.host and peer.epoch >= old.peer.epoch)
