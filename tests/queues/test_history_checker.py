"""The checker itself: clean histories pass, and each way of spoiling one is found under its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.json import encode
from msgspec.structs import replace

from tests.chaos.recording import Line
from tests.queues.history import (
    Closed,
    Confirmed,
    Continued,
    Event,
    Extending,
    Failing,
    Given,
    Handled,
    HistoryError,
    Job,
    Joining,
    Killed,
    Leaving,
    Letter,
    Message,
    Met,
    Parted,
    Pushed,
    Pushing,
    Refused,
    Stopped,
    parse,
)
from tests.queues.history_checker import Broken, Kind, check
from tests.queues.history_generator import Bus, NotApplicable

SECOND = 1_000_000_000
MUCH = 1_000_000  # added to the number of a delivery, it is the last one


def seqs(event: Pushing | Pushed) -> list[Message]:
    return [Message(event.queue, event.origin, seq) for seq in range(event.first, event.last + 1)]


def forget(bus: Bus, gone: Message) -> None:
    """As if a message had never been given to anybody."""
    jobs = {e.job for _, e in bus.lines if isinstance(e, Given) and e.message == gone}
    jobs |= {e.job for _, e in bus.lines if isinstance(e, Letter) and e.message == gone}
    kept: list[tuple[str, Event]] = []
    for file, event in bus.lines:
        if isinstance(event, Handled | Confirmed):
            event = replace(event, jobs=[job for job in event.jobs if job not in jobs])
        elif isinstance(event, Given | Letter | Failing) and event.job in jobs:
            continue
        kept.append((file, event))
    bus.lines = kept


def pick_from(bus: Bus, candidates: list[Message]) -> Message:
    if not candidates:
        raise NotApplicable
    return bus.rng.choice(candidates)


def blameless(bus: Bus) -> dict[str, int]:
    """Sessions with a long lease, and until when nothing happened to them but what they did themselves."""
    ends: dict[str, int] = {}
    for _, event in bus.lines:
        match event:
            case Leaving(session=who):
                ends.setdefault(who, event.time_ns)
            case Killed(process=who) | Stopped(process=who):
                ends.setdefault(who, event.time_ns)
            case Parted(peer=who):
                ends[who] = min(ends.get(who, 1 << 62), event.time_ns - 10 * SECOND)
    joined = [(file, e.session) for file, e in bus.lines if isinstance(e, Joining) and e.lease > 60]
    return {who: min(ends.get(who, 1 << 62), ends.get(file, 1 << 62)) for file, who in joined}


def successions(bus: Bus) -> list[tuple[int, int]]:
    """Places of deliveries of one message by one owner that follow each other, in the order of their sending."""
    last: dict[tuple[int, Message], int] = {}
    pairs = []
    places = bus.places(Given)
    places.sort(key=lambda n: bus.lines[n][1].delivery)
    for n in places:
        event = bus.lines[n][1]
        if (before := last.get((event.owner, event.message))) is not None:
            pairs.append((before, n))
        last[event.owner, event.message] = n
    return pairs


def returned(bus: Bus) -> set[Job]:
    return {e.job for _, e in bus.lines if isinstance(e, Failing) and e.how == "return"}


# --- ways to spoil a history -----------------------------------------------------------------------------


def never_given_though_on_disk(bus: Bus) -> None:
    forget(bus, pick_from(bus, [m for _, e in bus.lines if isinstance(e, Pushed) for m in seqs(e)]))


def never_given_though_nothing_remained(bus: Bus) -> None:
    closed = {e.origin for _, e in bus.lines if isinstance(e, Closed) and not e.remaining}
    pushed = [m for _, e in bus.lines if isinstance(e, Pushing) for m in seqs(e)]
    forget(bus, pick_from(bus, [m for m in pushed if m.origin in closed]))


def more_remained_than_was_said(bus: Bus) -> None:
    handled = {Message(*job[2:]) for _, e in bus.lines if isinstance(e, Handled) for job in e.jobs}
    handled |= {e.message for _, e in bus.lines if isinstance(e, Letter)}
    lacking = Counter(m.origin for _, e in bus.lines if isinstance(e, Pushing) for m in seqs(e) if m not in handled)
    place = bus.pick(Closed, lambda e: lacking[e.origin])
    bus.change(place, remaining=lacking[bus.lines[place][1].origin] - 1)


def done_but_not_handled(bus: Bus) -> None:
    """It was given, again and again, and given up by all."""
    handled = Counter(job for _, e in bus.lines if isinstance(e, Handled) for job in e.jobs)
    confirmed = {job for _, e in bus.lines if isinstance(e, Confirmed) for job in e.jobs}
    times = Counter(Message(*job[2:]) for job in handled)
    kept = {m for _, e in bus.lines if isinstance(e, Pushed) for m in seqs(e)}
    letters = {e.message for _, e in bus.lines if isinstance(e, Letter)}
    place = bus.pick(
        Handled,
        lambda e: (
            e.jobs[0] not in confirmed
            and times[Message(*e.jobs[0][2:])] == 1
            and Message(*e.jobs[0][2:]) in kept - letters
        ),
    )
    del bus.lines[place]


def given_to_two_under_one_attempt(bus: Bus) -> None:
    back = returned(bus)
    pairs = [
        (before, after)
        for before, after in successions(bus)
        if bus.lines[before][1].job not in back and bus.lines[before][1].attempt + 1 == bus.lines[after][1].attempt
    ]
    if not pairs:
        raise NotApplicable
    before, after = bus.rng.choice(pairs)
    bus.change(after, attempt=bus.lines[before][1].attempt)


def one_delivery_given_to_two(bus: Bus) -> None:
    place = bus.pick(Given)
    file, event = bus.lines[place]
    others = [e.session for _, e in bus.lines[:place] if isinstance(e, Joining) and e.session != event.session]
    bus.lines.insert(place + 1, (file, replace(event, session=bus.rng.choice(others))))


def one_delivery_given_twice(bus: Bus) -> None:
    place = bus.pick(Given)
    bus.lines.insert(place + 1, (bus.lines[place][0], replace(bus.lines[place][1])))


def given_again_out_of_the_blue(bus: Bus) -> None:
    idle, again = blameless(bus), {bus.lines[before][1].job for before, _ in successions(bus)}
    place = bus.pick(Given, lambda e: e.time_ns < idle.get(e.session, 0) and e.job not in again and e.attempt < 5)
    file, event = bus.lines[place]
    more = replace(event, delivery=event.delivery + MUCH, attempt=event.attempt + 1)
    bus.lines.insert(place + 1, (file, more))


def without_other_cause(bus: Bus) -> list[tuple[Given, Given]]:
    """Deliveries that follow each other, the first of which failed by what its worker says."""
    idle, extended = blameless(bus), {(e.owner, e.delivery) for _, e in bus.lines if isinstance(e, Extending)}
    pairs = [(bus.lines[before][1], bus.lines[after][1]) for before, after in successions(bus)]
    pairs = [
        (before, after)
        for before, after in pairs
        if after.time_ns < idle.get(before.session, 0)
        and before.attempt < after.attempt
        and (before.owner, before.delivery) not in extended
    ]
    if not pairs:
        raise NotApplicable
    return pairs


def never_said_to_have_failed(bus: Bus) -> None:
    """The cause is missing."""
    jobs = {before.job for before, _ in without_other_cause(bus)}
    del bus.lines[bus.pick(Failing, lambda e: e.job in jobs)]


def said_to_have_failed_afterwards(bus: Bus) -> None:
    before, after = bus.rng.choice(without_other_cause(bus))
    place = bus.pick(Failing, lambda e: e.job == before.job)
    bus.change(place, time_ns=after.time_ns + 1)


def two_places_give_it_out(bus: Bus) -> None:
    place = bus.pick(Given)
    file, event = bus.lines[place]
    other = replace(event, owner=event.owner ^ 1)
    bus.lines[place + 1 : place + 1] = [
        (file, Met(other.owner, "elsewhere-0001", time_ns=event.time_ns)),
        (file, other),
    ]


def given_again_after_it_was_confirmed(bus: Bus) -> None:
    place = bus.pick(Confirmed)
    file, event = bus.lines[place]
    given = bus.lines[bus.pick(Given, lambda e: e.job == event.jobs[0] and e.session == event.session)][1]
    number, attempt = given.delivery + MUCH, min(5, given.attempt + 1)
    bus.lines.insert(place + 1, (file, replace(given, delivery=number, attempt=attempt, time_ns=event.time_ns)))


def given_by_a_later_life_after_it_was_confirmed(bus: Bus) -> None:
    owners = {e.owner: e.process for _, e in bus.lines if isinstance(e, Met) and e.process.startswith("forwarder")}
    place = bus.pick(Confirmed, lambda e: e.jobs[0].owner in owners)
    _, event = bus.lines[place]
    given = bus.lines[bus.pick(Given, lambda e: e.job == event.jobs[0] and e.session == event.session)][1]
    file, _ = bus.lines[-1]
    time_ns = bus.lines[-1][1].time_ns
    last = next(e.session for _, e in reversed(bus.lines) if isinstance(e, Joining))
    bus.lines += [
        (file, Met(7, "forwarder-9999", time_ns=time_ns)),
        (file, replace(given, owner=7, session=last, attempt=5, time_ns=time_ns)),
    ]


def given_again_after_its_dead_letter(bus: Bus) -> None:
    place = bus.pick(Letter)
    file, event = bus.lines[place]
    given = bus.lines[bus.pick(Given, lambda e: e.job == event.job)][1]
    queue, origin, seq = event.message
    more = replace(given, delivery=given.delivery + MUCH, attempt=5, queue=queue, origin=origin, seq=seq)
    bus.lines.insert(place + 1, (file, more))


def a_lower_attempt_than_before(bus: Bus) -> None:
    pairs = [(before, after) for before, after in successions(bus) if bus.lines[before][1].attempt > 1]
    if not pairs:
        raise NotApplicable
    before, after = bus.rng.choice(pairs)
    bus.change(after, attempt=bus.lines[before][1].attempt - 1)


def a_lower_attempt_in_a_later_life(bus: Bus) -> None:
    lives = {e.owner: e.process for _, e in bus.lines if isinstance(e, Met) and e.process.startswith("forwarder")}
    killed = {e.process: e.time_ns for _, e in bus.lines if isinstance(e, Killed)}
    long_ago: dict[Message, tuple[str, int]] = {}
    for n in bus.places(Given):
        event = bus.lines[n][1]
        life = lives.get(event.owner, "")
        if event.message in long_ago and long_ago[event.message][0] < life and long_ago[event.message][1] > 1:
            bus.change(n, attempt=long_ago[event.message][1] - 1)
            return
        if life and event.time_ns + 2_100_000_000 < killed.get(life, 1 << 62):
            long_ago.setdefault(event.message, (life, event.attempt))
    raise NotApplicable


def a_sixth_attempt(bus: Bus) -> None:
    bus.change(bus.pick(Given, lambda e: e.attempt == 5 and not e.queue.startswith("$")), attempt=6)


def buried_too_early(bus: Bus) -> None:
    rejected = {Message(*e.job[2:]) for _, e in bus.lines if isinstance(e, Failing) and e.how == "reject"}
    bus.change(bus.pick(Letter, lambda e: e.message not in rejected), attempts=4)


def buried_though_nobody_rejected_it(bus: Bus) -> None:
    dead = {e.message for _, e in bus.lines if isinstance(e, Letter) and e.attempts < 5}
    message = pick_from(bus, sorted(dead))
    for n in bus.places(Failing, lambda e: Message(*e.job[2:]) == message and e.how == "reject"):
        bus.change(n, how="nack")


def given_but_never_pushed(bus: Bus) -> None:
    place = bus.pick(Given, lambda e: not e.queue.startswith("$"))
    file, event = bus.lines[place]
    bus.lines.insert(place + 1, (file, replace(event, seq=99_999, delivery=event.delivery + MUCH)))


def a_letter_of_what_was_never_pushed(bus: Bus) -> None:
    bus.change(bus.pick(Letter), seq=99_999, attempts=5)


CORRUPTIONS: list[tuple[Callable[[Bus], None], Kind]] = [
    (never_given_though_on_disk, Kind.LOST),
    (never_given_though_nothing_remained, Kind.LOST),
    (more_remained_than_was_said, Kind.LOST),
    (done_but_not_handled, Kind.LOST),
    (given_to_two_under_one_attempt, Kind.SHARED),
    (one_delivery_given_to_two, Kind.SHARED),
    (one_delivery_given_twice, Kind.SHARED),
    (given_again_out_of_the_blue, Kind.REPEATED),
    (never_said_to_have_failed, Kind.REPEATED),
    (said_to_have_failed_afterwards, Kind.REPEATED),
    (two_places_give_it_out, Kind.REPEATED),
    (given_again_after_it_was_confirmed, Kind.REDELIVERED),
    (given_by_a_later_life_after_it_was_confirmed, Kind.REDELIVERED),
    (given_again_after_its_dead_letter, Kind.REDELIVERED),
    (a_lower_attempt_than_before, Kind.ATTEMPTS),
    (a_lower_attempt_in_a_later_life, Kind.ATTEMPTS),
    (a_sixth_attempt, Kind.ATTEMPTS),
    (buried_too_early, Kind.BURIED),
    (buried_though_nobody_rejected_it, Kind.BURIED),
    (given_but_never_pushed, Kind.UNEXPECTED),
    (a_letter_of_what_was_never_pushed, Kind.UNEXPECTED),
]
ALONE = {
    never_given_though_on_disk, more_remained_than_was_said, done_but_not_handled, given_to_two_under_one_attempt,
    one_delivery_given_twice, a_sixth_attempt, buried_too_early, buried_though_nobody_rejected_it,
    given_but_never_pushed,
}  # fmt: skip


@given(st.integers(0, 1 << 64))
def test_clean_histories_pass(seed: int) -> None:
    Bus(seed).verdict().raise_if_broken()


def test_the_histories_are_worth_checking() -> None:
    """Everything that is allowed happens in them; else it would prove little that they pass."""
    total = sum((Bus(seed).verdict().counts for seed in range(60)), start=Counter[str]())
    assert total["given"] > 1.5 * total["handled"] > 5000
    assert total["letter"] > 500
    for cause in ("failed", "left", "killed", "expired", "parted", "the owner started anew"):
        assert total[f"again because {cause}"] > 10, cause


@pytest.mark.parametrize(("spoil", "kind"), CORRUPTIONS, ids=lambda case: getattr(case, "__name__", ""))
def test_corruption_is_found_and_named(spoil: Callable[[Bus], None], kind: Kind) -> None:
    spoilt = 0
    for seed in range(60):
        bus = Bus(seed)
        try:
            spoil(bus)
        except NotApplicable:
            continue
        spoilt += 1
        report = bus.verdict()
        assert kind in report.kinds, f"seed {seed}: {report}"
        if spoil in ALONE:
            assert report.kinds == {kind}, f"seed {seed}: {report}"
        with pytest.raises(Broken, match=kind):
            report.raise_if_broken()
    assert spoilt >= 10, f"too few histories could be spoilt in this way: {spoilt}"


def test_every_kind_has_a_corruption() -> None:
    assert {kind for _, kind in CORRUPTIONS} == set(Kind)


# --- the fine print, one case each -----------------------------------------------------------------------

OWNER, FIRST, OTHER = 7, "worker-0001/0", "other-0001/0"
JOB = Job(OWNER, 1, "jobs", 1, 1)


def at(seconds: float, event: Event, file: str = "worker-0001") -> tuple[str, Event]:
    event.time_ns = round(seconds * SECOND)
    return file, event


def again(*causes: tuple[str, Event], lease: float = 600.0, after: float = 1.0) -> set[str]:
    """What is said of a message that is given to a worker after 0.1 s, and to another one after `after`."""
    lines = [
        at(0, Pushing("jobs", 1, 1, 1), "producer-0001"),
        at(0, Joining(FIRST, lease)),
        at(0, Joining(OTHER, lease), "other-0001"),
        at(0, Met(OWNER, "producer-0001")),
        at(0.1, Given(FIRST, OWNER, 1, 1, "jobs", 1, 1)),
        *causes,
        at(after, Given(OTHER, OWNER, 2, 2, "jobs", 1, 1), "other-0001"),
        at(after, Handled(OTHER, [Job(OWNER, 2, "jobs", 1, 1)]), "other-0001"),
    ]
    return verdict(lines)


def verdict(lines: list[tuple[str, Event]]) -> set[str]:
    history = [Line(event, file, number) for number, (file, event) in enumerate(lines)]
    return {str(kind) for kind in check(sorted(history, key=lambda line: line.event.time_ns)).kinds}


CAUSES: dict[str, list[tuple[str, Event]]] = {
    "it failed": [at(0.5, Failing(FIRST, JOB, "nack"))],
    "it left": [at(0.5, Leaving(FIRST))],
    "it was killed": [at(0.5, Killed("worker-0001"), "director")],
    "it was stopped for long": [at(0.2, Stopped("worker-0001"), "director"), at(9, Continued("worker-0001"))],
    "it was stopped for good": [at(0.2, Stopped("worker-0001"), "director")],
    "its owner was": [at(0.2, Stopped("producer-0001"), "director"), at(9, Continued("producer-0001"), "director")],
    "it was lost sight of": [at(5, Parted("producer-0001", "worker-0001"), "producer-0001")],
    "it lost sight": [at(5, Parted("worker-0001", "producer-0001"))],
    "that was written down late": [at(15, Parted("producer-0001", "worker-0001"), "producer-0001")],
    "it was extended for less": [at(0.2, Extending(FIRST, OWNER, 1, 3.0))],
}  # fmt: skip
NO_CAUSES: dict[str, list[tuple[str, Event]]] = {
    "nothing": [],
    "it failed afterwards": [at(11, Failing(FIRST, JOB, "nack"))],
    "it left afterwards": [at(11, Leaving(FIRST))],
    "another was killed": [at(0.5, Killed("other-0001"), "director")],
    "it was killed afterwards": [at(11, Killed("worker-0001"), "director")],
    "it was stopped for a moment": [
        at(0.2, Stopped("worker-0001"), "director"),
        at(3, Continued("worker-0001"), "director"),
    ],
    "it was stopped just now": [at(8, Stopped("worker-0001"), "director")],
    "another was stopped": [at(0.2, Stopped("other-0001"), "director")],
    "others lost sight of it": [at(5, Parted("other-0001", "worker-0001"), "other-0001")],
    "it was lost sight of much later": [at(30, Parted("producer-0001", "worker-0001"), "producer-0001")],
    "it was extended": [at(0.2, Extending(FIRST, OWNER, 1, 20.0))],
    "another delivery was extended for less": [at(0.2, Extending(FIRST, OWNER, 3, 3.0))],
}


@pytest.mark.parametrize("causes", CAUSES.values(), ids=CAUSES)
def test_causes(causes: list[tuple[str, Event]]) -> None:
    assert again(*causes, after=10) == set()


@pytest.mark.parametrize("causes", NO_CAUSES.values(), ids=NO_CAUSES)
def test_what_is_no_cause(causes: list[tuple[str, Event]]) -> None:
    assert again(*causes, after=10) == {"repeated"}


def test_a_lease_runs_from_when_it_was_sent_at_the_earliest() -> None:
    assert again(lease=2.0, after=1.9) == {"repeated"}
    assert again(lease=2.0, after=2.0) == set()


@pytest.mark.parametrize(
    ("later", "said"),
    [(at(1.5, Pushing("jobs", 1, 2, 2)), {"repeated"}), (at(0.0, Pushing("jobs", 1, 2, 2)), set())],
)
def test_what_was_sent_before_bounds_when_it_was_sent(later: tuple[str, Event], said: set[str]) -> None:
    """Delivery 2 is of a message that was pushed after 1.5 s: so delivery 3 was not sent before that."""
    lines = [
        at(0, Pushing("jobs", 1, 1, 1)),
        later,
        at(0, Joining(FIRST, 2.0)),
        at(1.6, Given(FIRST, OWNER, 2, 1, "jobs", 1, 2)),
        at(1.6, Given(FIRST, OWNER, 3, 1, "jobs", 1, 1)),
        at(2.1, Given(FIRST, OWNER, 4, 2, "jobs", 1, 1)),
    ]
    assert verdict(lines) == said


def test_what_was_begun_late_was_not_given_again() -> None:
    """A worker comes to what it was sent long ago when another has done it."""
    lines = [
        at(0, Pushing("jobs", 1, 1, 1)),
        at(0, Joining(FIRST, 2.0)),
        at(0, Joining(OTHER, 2.0), "other-0001"),
        at(3, Given(OTHER, OWNER, 2, 2, "jobs", 1, 1), "other-0001"),
        at(3, Handled(OTHER, [Job(OWNER, 2, "jobs", 1, 1)]), "other-0001"),
        at(4, Confirmed(OTHER, [Job(OWNER, 2, "jobs", 1, 1)]), "other-0001"),
        at(5, Given(FIRST, OWNER, 1, 1, "jobs", 1, 1)),
    ]
    assert verdict(lines) == set()


def test_a_returned_attempt_does_not_count() -> None:
    lines = [
        at(0, Pushing("jobs", 1, 1, 1)),
        at(0, Joining(FIRST, 600.0)),
        at(0, Joining(OTHER, 600.0), "other-0001"),
        at(1, Given(FIRST, OWNER, 1, 1, "jobs", 1, 1)),
        at(2, Failing(FIRST, JOB, "return")),
        at(3, Given(OTHER, OWNER, 2, 1, "jobs", 1, 1), "other-0001"),
    ]
    assert verdict(lines) == set()
    lines[4] = at(2, Failing(FIRST, JOB, "nack"))
    assert verdict(lines) == {"shared"}


def test_what_a_killed_producer_had_is_gone_with_it() -> None:
    lines = [at(0, Pushing("jobs", 1, 1, 1)), at(1, Killed("producer-0001"), "director")]
    assert verdict(lines) == set()
    assert verdict([*lines, at(2, Pushed("jobs", 1, 1, 1))]) == {"lost"}
    assert verdict([*lines, at(2, Closed(1, 1))]) == set()
    assert verdict([*lines, at(2, Closed(1, 0))]) == {"lost"}


def test_what_had_no_room_was_not_pushed() -> None:
    lines = [at(0, Pushing("jobs", 1, 1, 3)), at(1, Refused("jobs", 1, 3, 3)), at(2, Closed(1, 2))]
    assert verdict(lines) == set()
    assert verdict([*lines[:2], at(2, Closed(1, 1))]) == {"lost"}


@pytest.mark.parametrize(("killed", "said"), [(1.5, set()), (4.0, {"attempts"})])
def test_a_forwarder_has_a_moment_to_write_attempts_down(killed: float, said: set[str]) -> None:
    lines = [
        at(0, Pushing("jobs", 1, 1, 1)),
        at(0, Joining(FIRST, 600.0)),
        at(0, Met(8, "forwarder-0001")),
        at(0, Met(9, "forwarder-0002")),
        at(1, Given(FIRST, 8, 2, 2, "jobs", 1, 1)),
        at(killed, Killed("forwarder-0001"), "director"),
        at(9, Given(FIRST, 9, 1, 1, "jobs", 1, 1)),
    ]
    assert verdict(lines) == said


@pytest.mark.parametrize(("killed", "said"), [(1.5, set()), (4.0, {"redelivered"})])
def test_a_forwarder_has_a_moment_to_write_down_that_it_is_dead(killed: float, said: set[str]) -> None:
    letter = Job(8, 3, "$dead.jobs", 8, 1)
    lines = [
        at(0, Pushing("jobs", 1, 1, 1)),
        at(0, Joining(FIRST, 600.0)),
        at(0, Met(8, "forwarder-0001")),
        at(0, Met(9, "forwarder-0002")),
        at(0.5, Given(FIRST, 8, 2, 5, "jobs", 1, 1)),
        at(0.6, Failing(FIRST, Job(8, 2, "jobs", 1, 1), "nack")),
        at(1, Given(FIRST, 8, 3, 1, "$dead.jobs", 8, 1)),
        at(1, Letter(letter, "jobs", 1, 1, 5, "not done")),
        at(killed, Killed("forwarder-0001"), "director"),
        at(9, Given(FIRST, 9, 1, 5, "jobs", 1, 1)),
    ]
    assert verdict(lines) == said


@pytest.mark.parametrize(("writer", "said"), [(8, {"redelivered"}), (7, set())])
def test_a_letter_of_an_earlier_life_says_nothing_of_this_one(writer: int, said: set[str]) -> None:
    """That life may have been killed between the letter and the note that it is written."""
    lines = [
        at(0, Pushing("jobs", 1, 1, 1)),
        at(0, Joining(FIRST, 600.0)),
        at(1, Given(FIRST, 8, 3, 1, "$dead.jobs", writer, 1)),
        at(1, Letter(Job(8, 3, "$dead.jobs", writer, 1), "jobs", 1, 1, 5, "not done")),
        at(2, Given(FIRST, 8, 4, 5, "jobs", 1, 1)),
        at(2, Handled(FIRST, [Job(8, 4, "jobs", 1, 1)])),
    ]
    assert verdict(lines) == said


@pytest.mark.parametrize(
    "events",
    [
        [Pushing("jobs", 1, 1, 1, time_ns=1), Pushing("jobs", 1, 1, 1, time_ns=2)],
        [Pushed("jobs", 1, 1, 1)],
        [Refused("jobs", 1, 1, 1)],
        [Given("nobody", 1, 1, 1, "jobs", 1, 1)],
        [Joining(FIRST, 1.0), Joining(FIRST, 1.0)],
        [Joining(FIRST, 1.0), Handled(FIRST, [JOB])],
        [Joining(FIRST, 1.0), Pushing("jobs", 1, 1, 1), Given(FIRST, *JOB[:2], 1, *JOB[2:]), Confirmed(FIRST, [JOB])],
        [Letter(JOB, "jobs", 1, 1, 5, "")],
    ],
)
def test_histories_that_are_the_fault_of_the_test(events: list[Event]) -> None:
    with pytest.raises(HistoryError):
        check(parse(b"".join(encode(event) + b"\n" for event in sorted(events, key=lambda e: e.time_ns))))
