"""The workers of one team, and whose turn it is. Bookkeeping only: the dispatcher decides.

A member's turn comes when it has waited longest since it was given something, or became able to take more. Able is who
has credit left, has not let a lease run out and been silent since, and need not be alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator

from zmqbus.protocol.queues.waiting import Waiting
from zmqbus.protocol.queues.work import Delivery, Line, Team
from zmqbus.protocol.topics import Matcher


class Member:
    """One worker, as its crew knows it."""

    __slots__ = ("alone", "crew", "granted", "hand", "held", "lease", "sent", "silent", "turn", "worker")

    def __init__(self, worker: Hashable, crew: Crew, lease: float) -> None:
        self.worker = worker
        self.crew = crew
        self.lease = lease
        self.granted = 0
        """How many messages it may have been sent in all."""
        self.sent = 0
        """How many it has been."""
        self.held: dict[int, Delivery] = {}
        """What it may still answer for, by number: also when the lease has run out, until another has it."""
        self.hand = 0
        """Messages that it has, and whose lease runs."""
        self.alone = False
        """The one message in its hand is at its last attempt."""
        self.silent = False
        """A lease has run out, and nothing was heard of it since."""
        self.turn = 0


Choice = tuple[Member, Waiting, bool]
"""Who is to have something of which line, and whether a last attempt."""


class Crew:
    """One team."""

    __slots__ = ("_drained", "_free", "_idle", "_matches", "_turns", "last", "members", "ready", "team")

    def __init__(self, team: Team, turns: Iterator[int]) -> None:
        self.team = team
        self.members = 0
        self.ready: OrderedDict[Waiting, None] = OrderedDict()
        """Lines with something for any member, the next one first; some may have nothing any more."""
        self.last: OrderedDict[Waiting, None] = OrderedDict()
        """Lines with something for a member that has nothing else; likewise."""
        self._free: OrderedDict[Member, None] = OrderedDict()  # the able ones, in turn
        self._idle: OrderedDict[Member, None] = OrderedDict()  # those of them that have nothing in hand
        self._drained: Member | None = None  # gets nothing until it has nothing in hand, for the sake of a last attempt
        self._turns = turns
        self._matches = Matcher(team.patterns).matches

    def pulls(self, line: Line) -> bool:
        """Whether what is in that line is for this team."""
        group, topic = line
        return (group is None or group == self.team.group) and self._matches(topic)

    def place(self, member: Member) -> None:
        """Put a member where it belongs, after anything that matters to that changed."""
        if member is self._drained and not member.hand:
            self._drained = None
        if member.granted > member.sent and not (member.alone or member.silent or member is self._drained):
            if member not in self._free:
                member.turn = next(self._turns)
                self._free[member] = None
            if not member.hand:
                self._idle[member] = None
            elif member in self._idle:
                del self._idle[member]
        else:
            self.remove(member)

    def used(self, member: Member, line: Waiting) -> None:
        """It was given something of that line: its next turn comes behind all others'."""
        if not (line.retries or line.turns):
            self.ready.pop(line, None)
        member.turn = next(self._turns)
        self._free.move_to_end(member)
        self._idle.pop(member, None)
        if member.alone or member.granted == member.sent:
            del self._free[member]

    def remove(self, member: Member) -> None:
        """It is not able to take anything."""
        self._free.pop(member, None)
        self._idle.pop(member, None)

    def gone(self, member: Member) -> None:
        """It is no member any more."""
        self.members -= 1
        self.remove(member)
        if member is self._drained:
            self._drained = None

    def turn(self) -> int | None:
        """That of the member whose turn is next, if any is able, and there may be something for it."""
        if self._drained is not None and not self._has_last():
            drained, self._drained = self._drained, None
            self.place(drained)
        return next(iter(self._free)).turn if self._free and (self.ready or self.last) else None

    def choose(self) -> Choice | None:
        """Who is next, and for what: None if there is no work or no hands.

        A last attempt waits for a member with nothing in hand. Lest it wait for ever while all are busy, one of them,
        not more, is given nothing new until it is such a member.
        """
        if self.last and self._has_last():
            if self._idle:
                line = next(iter(self.last))
                self.last.move_to_end(line)
                return next(iter(self._idle)), line, True
            if self._drained is None and self._free:
                self._drained = next(iter(self._free))
                self.remove(self._drained)
        while self.ready and self._free:
            line = next(iter(self.ready))
            if line.has_more():
                self.ready.move_to_end(line)
                return next(iter(self._free)), line, False
            del self.ready[line]
        return None

    def _has_last(self) -> bool:
        while self.last:
            line = next(iter(self.last))
            if line.has_last():
                return True
            del self.last[line]
        return False
