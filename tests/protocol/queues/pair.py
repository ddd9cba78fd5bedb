"""A dispatcher and its model, which hear of the same and have to agree. And lives for them, at random."""

from __future__ import annotations

from random import Random

from tests.protocol.queues.model import DELAYED, DONE, DYING, FLYING, LINES, TEAMS, WAITING, Given, Model, work_of
from zmqbus.protocol.queues.dispatcher import Dispatcher
from zmqbus.protocol.queues.work import Dead, Delivery, Line, Team, Work


class Pair:
    """A dispatcher and its model, which hear of the same."""

    def __init__(self, attempts_max: int) -> None:
        self.dispatcher = Dispatcher(attempts_max=attempts_max)
        self.model = Model(attempts_max)
        self.heads: dict[tuple[Line, int], int] = {}
        self.finished: set[Work] = set()
        self.dead: list[Dead] = []
        self.noted: dict[Work, tuple[int, dict[int, int]]] = {}

    def push(self, line: Line, origin: int, count: int, done: int, attempts: dict[int, int], due: dict[int, float]):
        first = self.heads.get((line, origin), 1)
        self.heads[line, origin] = first + count
        work = work_of(line, origin, first, count, done, attempts)
        self.model.add(work, due)
        self.noted[work] = (work.done, dict(work.attempts))
        self.dispatcher.add(work, self.model.now, due)

    def join(self, name: str, team: Team, lease: float, credit: int) -> None:
        self.model.join(name, team, lease, credit)
        self.dispatcher.join(name, team, lease, credit, self.model.now)

    def leave(self, name: str, counted: bool) -> None:
        self.model.leave(name, counted)
        self.dispatcher.leave(name, self.model.now, "gone" if counted else None)

    def grant(self, name: str, more: int) -> None:
        worker = self.model.workers.get(name)
        credit = (worker.sent if worker else 0) + more
        self.model.grant(name, credit)
        self.dispatcher.grant(name, credit)

    def take(self, most: int) -> list[Delivery]:
        out = self.dispatcher.take(self.model.now, most)
        assert len(out) <= most
        for delivery in out:
            self.model.taken(delivery)
        return out

    def take_all(self) -> None:
        while self.take(1000):
            pass
        self.model.nothing_left_undone()

    def done(self, name: str, number: int, first: int, last: int) -> bool:
        messages, whole = self.model.answer(name, number, first, last)
        for message in messages:
            self.model.done(message)
        assert self.dispatcher.done(name, number, first, last, self.model.now) == whole
        return whole

    def fail(self, name: str, number: int, first: int, last: int, delay: float | None) -> bool:
        model = self.model
        messages, whole = model.answer(name, number, first, last)
        for message in messages:
            attempt = model.given[number].attempt
            wait = model.back_off(attempt) if delay is None else delay
            model.failed(message, attempt, model.now + wait)
        assert self.dispatcher.fail(name, number, first, last, model.now, delay=delay, reason="no") == whole
        return whole

    def give_back(self, name: str, number: int, first: int, last: int) -> bool:
        messages, whole = self.model.answer(name, number, first, last)
        if messages:
            self.model.returned(messages, self.model.given[number].attempt)
        assert self.dispatcher.give_back(name, number, first, last, self.model.now) == whole
        return whole

    def reject(self, name: str, number: int, first: int, last: int) -> bool:
        model = self.model
        messages, whole = model.answer(name, number, first, last)
        for message in messages:
            attempt = model.given[number].attempt
            if model.limited(message):
                message.attempts = attempt
                model.die(message)
            else:
                model.failed(message, attempt, model.now + model.back_off(attempt))
        assert self.dispatcher.reject(name, number, first, last, model.now, "bad") == whole
        return whole

    def extend(self, given: Given, seconds: float) -> None:
        """The worker that has it wants it longer."""
        model, number = self.model, given.delivery.number
        known = model.given.get(number) is given and given.worker in model.workers
        held = known and any(m.state == FLYING and m.holder == number for m in given.messages)
        if given.worker in model.workers:
            model.workers[given.worker].silent = False
        if held:
            given.deadline = model.now + seconds
        assert self.dispatcher.extend(given.worker, number, seconds, model.now) == held

    def withdraw(self, line: Line, origin: int) -> None:
        end = self.heads.get((line, origin), 1)
        expected = self.model.untouched(line, origin)
        assert self.dispatcher.withdraw(line, origin, end) == expected
        for work in expected:
            self.model.drop(work)
        if expected:
            self.heads[line, origin] = expected[0].batch.first

    def forget(self, line: Line) -> None:
        self.dispatcher.forget(line)
        self.model.forget(line)

    def pass_time(self, seconds: float) -> None:
        self.model.pass_time(self.model.now + seconds)
        self.dispatcher.tick(self.model.now)

    def unsent(self, delivery: Delivery) -> None:
        self.dispatcher.unsent(delivery, self.model.now)
        self.model.unsent(delivery.number)

    def outcome(self) -> None:
        """Take what the dispatcher says that has become of messages."""
        for work in self.dispatcher.finished:
            assert work not in self.finished
            assert all(m.state == DONE for m in self.model.works[work])
            self.finished.add(work)
        self.dispatcher.finished.clear()
        for dead in self.dispatcher.dead:
            (message,) = [m for m in self.model.works.get(dead.work, ()) if m.seq == dead.seq] or [None]
            if message is not None:
                assert (message.state, message.attempts) == (DYING, dead.attempts)
                assert not any((d.work, d.seq) == (dead.work, dead.seq) for d in self.dead)
                self.dead.append(dead)
        self.dispatcher.dead.clear()

    def bury(self, dead: Dead) -> None:
        self.dead.remove(dead)
        for message in self.model.works.get(dead.work, ()):
            if message.seq == dead.seq:
                message.state = DONE
        self.dispatcher.buried(dead)
        self.dispatcher.buried(dead)  # said twice, it counts once

    def check(self) -> None:
        """Is everything as it should be?"""
        self.outcome()
        assert {w for w, ms in self.model.works.items() if all(m.state == DONE for m in ms)} <= self.finished
        self.model.agrees(self.dispatcher)
        self.model.attempts_agree()
        for work in self.model.works:
            what = (work.done, dict(work.attempts))
            assert what == self.noted[work] or work.line in self.dispatcher.changed, "an owner would not write it down"
            self.noted[work] = what
        self.dispatcher.changed.clear()
        soonest = min(
            [m.until for ms in self.model.works.values() for m in ms if m.state == DELAYED]
            + [
                g.deadline
                for g in self.model.given.values()
                if any(m.state == FLYING and m.holder == g.delivery.number for m in g.messages)
            ],
            default=None,
        )
        assert self.dispatcher.next_timer() == soonest

    def to_the_end(self) -> None:
        """Workers do all that they get, and there is one at least for everything."""
        model, dispatcher = self.model, self.dispatcher
        for number, team in enumerate(TEAMS):
            self.join(f"helper {number}", team, 30.0, 1)
        for _ in range(3 * sum(map(len, model.works.values())) + 10):
            for number in list(model.given):
                given = model.given[number]
                if any(m.holder == number for m in given.messages):
                    self.done(given.worker, number, given.first, given.last)
            for name in model.workers:
                self.grant(name, 100)
            self.take_all()
            self.outcome()
            for dead in list(self.dead):
                self.bury(dead)
            if all(m.state == DONE for messages in model.works.values() for m in messages):
                break
            if not any(m.state in (WAITING, FLYING) for messages in model.works.values() for m in messages):
                due = dispatcher.next_timer()
                assert due is not None
                self.pass_time(due - model.now)
        else:
            raise AssertionError("it does not come to an end")
        self.check()
        assert dispatcher.next_timer() is None
        assert not any(member.held or member.hand for member in dispatcher._members.values())


EVENTS = [*("push",) * 2, *("answer",) * 4, *("grant",) * 2, "take", "some", "time", "come", "extend", "back", "bury"]


def storm(random: Random, events: int) -> None:
    """A life with few lines, workers that come and go, and much that fails, so that everything meets everything."""
    pair = Pair(random.choice([1, 2, 2, 3, 5]))
    model = pair.model
    lines = random.sample(LINES, random.choice([1, 2, 5]))
    teams = random.sample(list(TEAMS), random.choice([1, 1, 2, 3]))
    names = ["ann", "bob", "cid", "dot", "eve"][: random.choice([2, 3, 5])]
    delays = random.choice([[0.0], [None], [None, 0.0, 0.25, 5.0]])
    for name in names:
        pair.join(name, random.choice(teams), 30.0, random.choice([1, 3, 1000]))
    for _ in range(events):
        line, name = random.choice(lines), random.choice(names)
        open_ = [g for g in model.given.values() if any(m.holder == g.delivery.number for m in g.messages)]
        match random.choice(EVENTS):
            case "push" if sum(m.state != DONE for ms in model.works.values() for m in ms) < 60:
                count = random.choice([1, 1, 3, 8])
                until = model.now + random.choice([0.0, 0.0, 0.0, 2.0])
                pair.push(
                    line, random.randint(1, 2), count, 0, {}, dict.fromkeys(range(random.randint(0, count)), until)
                )
            case "answer" if open_:
                given = random.choice(open_)
                first, last = sorted(random.choices(range(given.first, given.last + 1), k=2))
                if random.random() < 0.5:
                    first, last = given.first, given.last
                job = (given.worker, given.delivery.number, first, last)
                match random.choice(["done", "fail", "fail", "fail", "return", "reject"]):
                    case "done":
                        pair.done(*job)
                    case "fail":
                        pair.fail(*job, random.choice(delays))
                    case "return":
                        pair.give_back(*job)
                    case "reject":
                        pair.reject(*job)
            case "grant":
                pair.grant(name, random.choice([1, 1, 3, 1000]))
            case "take":
                pair.take_all()
            case "some":
                for delivery in pair.take(random.randint(1, 3)):
                    if random.random() < 0.1:
                        pair.unsent(delivery)
            case "time":
                due = pair.dispatcher.next_timer()
                pair.pass_time(0.25 if due is None or random.random() < 0.5 else max(0.0, due - model.now))
            case "come":
                if random.random() < 0.5:
                    pair.leave(name, random.random() < 0.5)
                pair.join(name, random.choice(teams), random.choice([1.0, 30.0]), random.choice([1, 3, 1000]))
            case "extend" if model.given:
                pair.extend(random.choice(open_ or list(model.given.values())), random.choice([0.25, 30.0]))
            case "back" if random.random() < 0.3:
                pair.withdraw(line, random.randint(1, 2))
            case "back" if random.random() < 0.1:
                pair.forget(line)
            case "bury" if pair.dead:
                pair.bury(random.choice(pair.dead))
        pair.check()
    pair.to_the_end()
