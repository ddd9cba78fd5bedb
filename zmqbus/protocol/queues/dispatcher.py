"""Which message goes to which worker, and what becomes of it: the one dispatcher of both kinds of owners.

Sans-IO: knows no sockets, threads or clock; callers pass `now` (monotonic seconds). The rules:

1. A message that was pushed is handled by one worker of any team that pulls its topic; one that was published, by one
   worker of each group that does. The owner adds the latter once for each group, and tells teams of equal group apart,
   if it wants them apart, by the group that it names in `Team` and `Line`.
2. A worker is sent as many messages as it has granted, in all: available is what it has granted, less what was sent.
   Workers with credit are served in turn, and so are the lines of a team, and in a line its producers.
3. A delivery is the worker's for as long as its lease, from the moment it is taken. Then it waits for another worker,
   before what is fresh. Until that has it, the late answer is as good as one in time; afterwards it is refused.
4. A worker that let a lease run out gets nothing more until it is heard of again. So one that hangs does not swallow
   lease after lease what it has credit for; nor are jobs done twice because it was the owner that was stopped.
5. An attempt counts when it fails: nacked, expired, or its worker gone. What was returned, or not sent, was none.
   After `attempts_max` the message is dead, and settled once it is buried. Those on `$dead.` topics do not die again.
6. The last attempt is made alone: by a worker that has nothing else in hand, and gets nothing else meanwhile. So what
   makes workers die takes no neighbour with it.

A driver calls what the world says, then `take`, and sends what that returns; it takes `finished` and `dead` and clears
them. When it has been away from its loop it should deal with what came before it calls `tick`. Where `unsent` was
needed, `take` may offer the same again: not at once, then.

Every call costs the same however much waits. Messages are bits of works, from the first to the last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from heapq import heapify, heappop, heapreplace
from itertools import count
from types import MappingProxyType

from zmqbus.protocol.queues.crew import Crew, Member
from zmqbus.protocol.queues.timers import Timers
from zmqbus.protocol.queues.waiting import Waiting
from zmqbus.protocol.queues.work import (
    NO_ATTEMPTS,
    Dead,
    Delivery,
    Figures,
    Line,
    Run,
    Team,
    Work,
    indexes,
    ones,
)

ATTEMPTS_MAX = 5
BACK_OFF = 1.0  # seconds, after the first attempt; then twice as long each time
BACK_OFF_MAX = 60.0

GONE = "the worker is gone"
EXPIRED = "the lease ran out"
USED_UP = "all attempts had been made when the owner started"

AT_ONCE: Mapping[int, float] = MappingProxyType({})


class Dispatcher:
    """All queues of one owner. Workers are whatever the owner knows them by."""

    def __init__(self, *, attempts_max: int = ATTEMPTS_MAX) -> None:
        self.finished: list[Work] = []
        """Works all of whose messages are settled since the owner cleared this."""
        self.dead: list[Dead] = []
        """Messages that died since the owner cleared this: to be buried."""
        self.changed: set[Line] = set()
        """Lines in which something was settled, or has failed, since the owner cleared this."""
        self._attempts_max = attempts_max
        self._lines: dict[Line, Waiting] = {}
        self._pulled_by: dict[Waiting, list[Crew]] = {}
        self._crews: dict[Team, Crew] = {}
        self._members: dict[Hashable, Member] = {}
        self._leases: Timers[int, Delivery] = Timers()  # by number
        self._delays: Timers[tuple[Work, int], Run] = Timers()  # by work and attempt
        self._numbers = count(1)
        self._turns = count(1)

    # --- workers ---------------------------------------------------------------------------------

    def join(self, worker: Hashable, team: Team, lease: float, credit: int, now: float) -> None:
        """A worker takes jobs, `credit` of them for now, each for `lease` seconds. Said again, it goes on as it was."""
        member = self._members.get(worker)
        if member is not None and member.crew.team != team:
            self.leave(worker, now)
            member = None
        if member is None:
            crew = self._crews.get(team) or self._muster(team)
            crew.members += 1
            member = self._members[worker] = Member(worker, crew, lease)
        member.lease = lease
        self.grant(worker, credit)

    def leave(self, worker: Hashable, now: float, reason: str | None = GONE) -> None:
        """A worker is no more. What it had in hand has failed for that reason; None: it was returned."""
        member = self._members.pop(worker, None)
        if member is None:
            return
        crew = member.crew
        for delivery in member.held.values():
            if delivery.live:
                self._leases.remove(delivery.deadline, delivery.number)
                line = self._lines[delivery.work.line]
                line.in_flight -= delivery.todo.bit_count()
                if reason is None:
                    self._wait(line, Run(delivery.work, delivery.todo, delivery.attempt - 1))
                else:
                    self._failed(line, Run(delivery.work, delivery.todo, delivery.attempt), reason)
        crew.gone(member)
        if not crew.members:
            del self._crews[crew.team]
            for crews in self._pulled_by.values():
                if crew in crews:
                    crews.remove(crew)

    def grant(self, worker: Hashable, credit: int) -> None:
        """So many messages may have been sent to the worker in all."""
        member = self._members.get(worker)
        if member is not None:
            member.granted = max(member.granted, credit)
            self._heard(member)

    # --- work ------------------------------------------------------------------------------------

    def add(self, work: Work, now: float, due: Mapping[int, float] = AT_ONCE) -> None:
        """Take in a work: all of it that is not done. By index, `due` says before when a message must not go out."""
        line = self._lines.get(work.line) or self._line(work.line)
        todo = ones(work.batch.count) & ~work.done
        if not todo:
            self.finished.append(work)
            return
        line.works[work] = None
        if work.attempts or due:
            todo = self._add_tried(line, work, todo, now, due)
        if todo and line.limited and self._attempts_max == 1:
            self._wait(line, Run(work, todo, 0))
        elif todo:
            work.fresh = todo
            line.waiting += todo.bit_count()
            line.add_fresh(work)
            for crew in self._pulled_by[line]:
                crew.ready[line] = None

    def withdraw(self, line: Line, origin: int, end: int | None = None) -> list[Work]:
        """Take back the newest works of an origin, down to the first of which something was delivered. Oldest first.

        With `end`, one past the last message that was ever added, only as far as they follow each other without a hole:
        where one in between or behind has been settled already, what was before it stays.
        """
        found = self._lines.get(line)
        works: list[Work] = []
        for work in reversed(found.works if found is not None else {}):
            if work.batch.origin == origin:
                if work.touched or work.attempts or work.done or end not in (None, work.batch.end):
                    break
                works.append(work)
                end = None if end is None else work.batch.first
        if found is not None and works:
            gone = set(works)
            for due, key, run in [entry for entry in self._delays.entries() if entry[2].work in gone]:
                self._delays.remove(due, key)
                found.delayed -= run.todo.bit_count()
            found.drop(origin, gone)
        return works[::-1]

    def forget(self, line: Line) -> None:
        """There is to be no such line. What workers have of it is theirs no more, and nothing of it is finished."""
        found = self._lines.pop(line, None)
        if found is None:
            return
        for due, key, run in list(self._delays.entries()):
            if run.work.line == line:
                self._delays.remove(due, key)
        for crew in self._pulled_by.pop(found):
            crew.ready.pop(found, None)
            crew.last.pop(found, None)
        for member in self._members.values():
            for delivery in [delivery for delivery in member.held.values() if delivery.work.line == line]:
                self._take_away(member, delivery, delivery.todo)

    # --- what workers say ------------------------------------------------------------------------

    def done(self, worker: Hashable, number: int, first: int, last: int, now: float) -> bool:
        """Messages of a delivery are done. False: it comes too late for some of them, which are another's by now."""
        answered, whole = self._answered(worker, number, first, last)
        if answered is not None:
            line = self._lines[answered.work.line]
            line.done += answered.todo.bit_count()
            self._settle(line, answered.work, answered.todo)
        return whole

    def fail(
        self, worker: Hashable, number: int, first: int, last: int, now: float, *, delay: float | None, reason: str
    ) -> bool:
        """They are not, and are to be tried again after `delay` seconds; None: the longer, the more often it failed."""
        answered, whole = self._answered(worker, number, first, last)
        if answered is not None:
            if delay is None:
                delay = _back_off(answered.attempt)
            self._failed(self._lines[answered.work.line], answered, reason, now + delay if delay > 0 else 0.0)
        return whole

    def give_back(self, worker: Hashable, number: int, first: int, last: int, now: float) -> bool:
        """They were not begun."""
        answered, whole = self._answered(worker, number, first, last)
        if answered is not None:
            answered.attempt -= 1
            if answered.work.attempts:  # where the lease had run out it was counted already
                self._count(answered)
            self._wait(self._lines[answered.work.line], answered)
        return whole

    def reject(self, worker: Hashable, number: int, first: int, last: int, now: float, reason: str) -> bool:
        """They are never to be tried again. Dead letters, which cannot die, are tried again later instead."""
        answered, whole = self._answered(worker, number, first, last)
        if answered is not None:
            line = self._lines[answered.work.line]
            if line.limited:
                self._die(line, answered, reason)
            else:
                self._failed(line, answered, reason, now + _back_off(answered.attempt))
        return whole

    def extend(self, worker: Hashable, number: int, seconds: float, now: float) -> bool:
        """The worker needs a delivery for so long from now on. False: it comes too late, the lease has run out."""
        member = self._members.get(worker)
        if member is None:
            return False
        self._heard(member)
        delivery = member.held.get(number)
        if delivery is None or not delivery.live:
            return False
        self._leases.remove(delivery.deadline, number)
        delivery.deadline = now + seconds
        self._leases.at(delivery.deadline)[number] = delivery
        return True

    # --- time ------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Leases that have run out, and delays that are over."""
        for delivery in self._leases.over(now):
            member = self._members[delivery.worker]
            line = self._lines[delivery.work.line]
            count = delivery.todo.bit_count()
            line.in_flight -= count
            member.hand -= count
            member.alone = False
            member.silent = True
            member.crew.place(member)
            delivery.live = False
            self._failed(line, delivery, EXPIRED)
            if not delivery.todo:
                del member.held[delivery.number]
        for run in self._delays.over(now):
            line = self._lines[run.work.line]
            line.delayed -= run.todo.bit_count()
            self._wait(line, run)

    def next_timer(self) -> float | None:
        """When `tick` has something to do next, if nothing happens before."""
        return min((due for due in (self._leases.next(), self._delays.next()) if due is not None), default=None)

    # --- what to send ----------------------------------------------------------------------------

    def take(self, now: float, most: int) -> list[Delivery]:
        """Deliveries to be sent now, at most so many."""
        out: list[Delivery] = []
        crews = [(turn, crew) for crew in self._crews.values() if (turn := crew.turn()) is not None]
        heapify(crews)  # by whose member's turn is next; no two turns are equal
        while crews and len(out) < most:
            crew = crews[0][1]
            choice = crew.choose()
            if choice is not None:
                out.append(self._deliver(*choice, now))
                if (turn := crew.turn()) is not None:
                    heapreplace(crews, (turn, crew))
                    continue
            heappop(crews)
        return out

    def unsent(self, delivery: Delivery, now: float, unfit: str = "") -> None:
        """It could not be sent: as if it had not been taken. `unfit`: why not to anybody, so that it is dead."""
        member = self._members.get(delivery.worker)
        if member is None or delivery.number not in member.held:
            return
        count = delivery.todo.bit_count()
        member.sent -= count
        if delivery.attempt > 1:
            self._lines[delivery.work.line].redelivered -= count
        if unfit:
            self.reject(delivery.worker, delivery.number, delivery.first, delivery.last, now, unfit)
        else:
            self.give_back(delivery.worker, delivery.number, delivery.first, delivery.last, now)

    def buried(self, dead: Dead) -> None:
        """Its dead letter is kept: now the message is settled."""
        work = dead.work
        bits = 1 << dead.seq - work.batch.first
        line = self._lines.get(work.line)
        if line is not None and work in line.works:
            self._settle(line, work, bits)

    def is_pulled(self, line: Line) -> bool:
        """Whether there are workers for it."""
        return any(crew.pulls(line) for crew in self._crews.values())

    def waiting(self, name: Line) -> int:
        """Messages of a line that could be given to a worker at once."""
        line = self._lines.get(name)
        return 0 if line is None else line.waiting

    def figures(self, now: float) -> list[Figures]:
        """Of each line."""
        return [
            Figures(
                line.line,
                line.waiting,
                line.in_flight,
                line.delayed,
                line.redelivered,
                line.done,
                line.dead,
                sum(crew.members for crew in self._pulled_by[line]),
                next(iter(line.works), None),
            )
            for line in self._lines.values()
        ]

    # --- inside: lines and crews -----------------------------------------------------------------

    def _line(self, name: Line) -> Waiting:
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = Waiting(name)
            self._pulled_by[line] = [crew for crew in self._crews.values() if crew.pulls(name)]
        return line

    def _muster(self, team: Team) -> Crew:
        crew = self._crews[team] = Crew(team, self._turns)
        for line, crews in self._pulled_by.items():
            if crew.pulls(line.line):
                crews.append(crew)
                crew.ready[line] = None  # those that have nothing are put away when their turn comes
                crew.last[line] = None
        return crew

    def _heard(self, member: Member) -> None:
        member.silent = False
        member.crew.place(member)

    # --- inside: a message's way -----------------------------------------------------------------

    def _deliver(self, member: Member, line: Waiting, last: bool, now: float) -> Delivery:
        work, start, count, run = line.cut_last() if last else line.cut(member.granted - member.sent)
        attempt = 1
        if run is not None:
            attempt = run.attempt + 1
            if not run.todo and isinstance(run, Delivery) and (late := self._members.get(run.worker)) is not None:
                late.held.pop(run.number, None)
        first = work.batch.first + start
        number = next(self._numbers)
        deadline = now + member.lease
        bits = (1 << count) - 1 << start
        delivery = Delivery(work, bits, attempt, member.worker, number, first, first + count - 1, deadline)
        work.touched = True
        line.waiting -= count
        line.in_flight += count
        if attempt > 1:
            line.redelivered += count
        member.held[number] = delivery
        member.hand += count
        member.sent += count
        member.alone = last
        member.crew.used(member, line)
        self._leases.at(deadline)[number] = delivery
        return delivery

    def _answered(self, worker: Hashable, number: int, first: int, last: int) -> tuple[Run | None, bool]:
        """What of it is the worker's to answer for, taken out of the delivery; and whether that is all it names."""
        member = self._members.get(worker)
        if member is None:
            return None, False
        delivery = member.held.get(number)
        if delivery is None:
            self._heard(member)
            return None, False
        work = delivery.work
        low, high = max(first, delivery.first), min(last, delivery.last)
        bits = delivery.todo & ones(high - low + 1) << low - work.batch.first if low <= high else 0
        count = bits.bit_count()
        line = self._lines[work.line]
        if delivery.live:
            line.in_flight -= count
        else:
            line.waiting -= count
        member.silent = False
        self._take_away(member, delivery, bits)
        return Run(work, bits, delivery.attempt) if bits else None, count > 0 and count == last - first + 1

    def _take_away(self, member: Member, delivery: Delivery, bits: int) -> None:
        """Something of a delivery is not the worker's business any more."""
        delivery.todo ^= bits
        if delivery.live:
            member.hand -= bits.bit_count()
            if not delivery.todo:
                self._leases.remove(delivery.deadline, delivery.number)
                member.alone = False
        if not delivery.todo:
            del member.held[delivery.number]
        member.crew.place(member)

    def _add_tried(self, line: Waiting, work: Work, todo: int, now: float, due: Mapping[int, float]) -> int:
        """Of what is to be done take in what has been tried, or is not due yet. The rest is fresh."""
        runs: dict[tuple[int, float], int] = defaultdict(int)
        for index in {*work.attempts, *due}:
            attempt, then = work.attempts.get(index, 0), due.get(index, now)
            if todo >> index & 1 and (attempt or then > now):
                runs[attempt, max(then, now)] |= 1 << index
        for (attempt, then), bits in sorted(runs.items()):
            todo ^= bits
            run = Run(work, bits, attempt)
            if line.limited and attempt >= self._attempts_max:
                self._die(line, run, USED_UP)
            elif then > now:
                self._delay(line, run, then)
            else:
                self._wait(line, run)
        return todo

    def _failed(self, line: Waiting, run: Run, reason: str, due: float = 0.0) -> None:
        """Attempt number `run.attempt` was in vain: once more, not before `due`, or never."""
        self._count(run)
        if line.limited and run.attempt >= self._attempts_max:
            self._die(line, run, reason)
        elif due:
            self._delay(line, run, due)
        else:
            self._wait(line, run)

    def _count(self, run: Run) -> None:
        """Note in the work how many attempts count against these messages."""
        work = run.work
        self.changed.add(work.line)
        if work.attempts is NO_ATTEMPTS:
            work.attempts = {}
        for index in indexes(run.todo):
            if run.attempt:
                work.attempts[index] = run.attempt
            else:
                work.attempts.pop(index, None)

    def _wait(self, line: Waiting, run: Run) -> None:
        line.waiting += run.todo.bit_count()
        if line.limited and run.attempt + 1 >= self._attempts_max:
            queue = line.lasts
            for crew in self._pulled_by[line]:
                crew.last[line] = None
        else:
            queue = line.retries
            for crew in self._pulled_by[line]:
                crew.ready[line] = None
        tail = queue[-1] if queue else None
        if type(tail) is Run and type(run) is Run and (tail.work, tail.attempt) == (run.work, run.attempt):
            tail.todo |= run.todo
        else:
            queue.append(run)

    def _delay(self, line: Waiting, run: Run, due: float) -> None:
        line.delayed += run.todo.bit_count()
        runs = self._delays.at(due)
        known = runs.setdefault((run.work, run.attempt), run)
        if known is not run:
            known.todo |= run.todo

    def _die(self, line: Waiting, run: Run, reason: str) -> None:
        line.dead += run.todo.bit_count()
        first = run.work.batch.first
        self.dead += [Dead(run.work, first + index, run.attempt, reason) for index in indexes(run.todo)]
        run.todo = 0

    def _settle(self, line: Waiting, work: Work, bits: int) -> None:
        work.done |= bits
        self.changed.add(work.line)
        if work.attempts:
            for index in indexes(bits):
                work.attempts.pop(index, None)
        if work.done.bit_count() == work.batch.count:
            del line.works[work]
            self.finished.append(work)


def _back_off(attempt: int) -> float:
    """Seconds to wait after so many attempts."""
    return min(BACK_OFF * 2.0 ** min(attempt - 1, 10), BACK_OFF_MAX)
