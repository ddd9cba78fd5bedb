"""The account of the demo: for each who received, what was sent to it against what it got and what it reported as lost.

What the journal holds is read from its files, and what its consumer dealt with from the consumer's index: nobody's
counters are believed. Numbers only; how they are shown is in stage.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from zmqbus.cli.demo.storing import NAME, read_index, stream_of

if TYPE_CHECKING:
    from zmqbus.cli.demo.crew import Actor

Key = tuple[str, int]
"""A stream: topic and origin."""
Lost = tuple[str, int, int, int]
"""Topic, origin, first and last seq that were reported as lost."""


class Account(msgspec.Struct):
    """One receiver's: `sent` is what it was owed; `unreported` what is missing without a word, or came twice.

    `redelivered`: what a durable consumer got again after it was killed, which is its right; or what was given to a
    worker again.
    """

    name: str
    sent: int
    received: int
    repaired: int
    lost: int
    unreported: int
    rate: float
    redelivered: int = 0


class Stream(msgspec.Struct):
    """One stream: how many messages of it were published, and how many different ones are stored, were consumed, and,
    where workers share it, done."""

    topic: str
    origin: str
    published: int
    journaled: int
    consumed: int
    redelivered: int
    done: int | None


class Share(msgspec.Struct):
    """What one of the workers did."""

    name: str
    done: int
    killed: bool


class Settled(NamedTuple):
    """All of it."""

    aggregators: list[Account]
    journal: Account
    consumer: Account
    workers: Account
    shares: list[Share]
    streams: list[Stream]
    cursor: int
    """Where the forwarder has the consumer in the end."""
    end: int
    """… of its journal."""

    @property
    def accounts(self) -> list[Account]:
        """Everybody's."""
        return [*self.aggregators, self.journal, self.consumer, self.workers]


# --- aggregators ---------------------------------------------------------------------------------


def settle(actor: Actor, heads: Mapping[Key, int], starts: Mapping[Key, int]) -> Account:
    """Hold what an aggregator reports against what was sent: up to `heads`, and from `starts` at the latest."""
    facts = actor.facts
    sent = unreported = disorder = explained = 0
    for key, last in heads.items():
        ranges = [(first, end) for topic, origin, first, end in facts["gaps"] if (topic, origin) == key]
        first, received, doubled = facts["streams"].get(key, (starts[key], 0, 0))
        first = min([first, starts[key], *(gap_first for gap_first, _ in ranges)])
        lost = sum(end - gap_first + 1 for gap_first, end in ranges)
        sent += last - first + 1
        unreported += abs(last - first + 1 - received - lost)
        disorder += doubled
        explained += lost
    if explained < facts["lost"]:  # so many gaps that not every range is kept: the sum must do
        unreported = abs(sent - facts["received"] - facts["lost"])
    rate = round(facts["received"] / max(facts["seconds"], 1e-3), 1)
    return Account(actor.name, sent, facts["received"], facts["repaired"], facts["lost"], unreported + disorder, rate)


# --- the journal and its consumer ------------------------------------------------------------------


class Seqs:
    """Which messages of one stream somebody got, in one life: ranges, in order. `disorder`: what came twice or late."""

    __slots__ = ("disorder", "spans")

    def __init__(self) -> None:
        self.spans: list[list[int]] = []
        self.disorder = 0

    def note(self, first: int, last: int) -> None:
        """These."""
        if self.spans and first <= self.spans[-1][1]:
            self.disorder += last - first + 1
        elif self.spans and first == self.spans[-1][1] + 1:
            self.spans[-1][1] = last
        else:
            self.spans.append([first, last])


Life = dict[Key, Seqs]


def count(lives: Sequence[Life], key: Key, head: int) -> tuple[int, int, int]:
    """Of one stream: how many different messages up to `head` were got, how many once more in another life, and how
    many that were never sent, or came in disorder."""
    different = total = strange = reached = 0
    spans = sorted(tuple(span) for life in lives if key in life for span in life[key].spans)
    for first, last in spans:
        strange += max(0, last - max(first - 1, head)) + max(0, min(0, last) - first + 1)
        first, last = max(first, 1), min(last, head)
        total += max(0, last - first + 1)
        different += max(0, last - max(first, reached + 1) + 1)
        reached = max(reached, last)
    return different, total - different, strange + sum(life[key].disorder for life in lives if key in life)


def settle_stored(
    name: str, heads: Mapping[Key, int], lives: Sequence[Life], gaps: Iterable[Lost], lost: int, seconds: float
) -> Account:
    """Hold what was got in one or several lives against what was sent: everything up to `heads`."""
    ranges = set(gaps)
    received = again = unreported = explained = 0
    for key, head in heads.items():
        different, redelivered, strange = count(lives, key, head)
        reported = sum(last - first + 1 for topic, origin, first, last in ranges if (topic, origin) == key)
        received += different
        again += redelivered
        explained += reported
        unreported += abs(head - different - reported) + strange
    sent = sum(heads.values())
    if explained < lost:  # not every range is known: the sum must do
        unreported = abs(sent - received - lost)
    rate = round((received + again) / max(seconds, 1e-3), 1)
    return Account(name, sent, received, 0, max(lost, explained), unreported, rate, again)


def journaled(path: str, start: int, heads: Mapping[Key, int]) -> tuple[Life, int, int]:
    """What a journal holds of these streams from an offset on, where the durable consumer's cursor is, and its end.

    Raises:
        JournalCorrupt: it is damaged.
    """
    from zmqbus.journal.inspect import View
    from zmqbus.journal.records import Batch

    view = View(path)
    life: Life = {}
    for batch in view.batches(start):
        if isinstance(batch, Batch):
            key = (batch.topic.decode(errors="replace"), batch.origin)
            if key in heads:
                life.setdefault(key, Seqs()).note(batch.first_seq, batch.last_seq)
    cursor = view.cursors.get(NAME)
    return life, cursor.offset if cursor is not None else 0, view.durable_offset


def consumed(path: Path) -> Life:
    """What a consumer's index says it dealt with."""
    streams: dict[bytes, Seqs] = {}
    for stream, seq in read_index(path):
        seqs = streams.get(stream)
        if seqs is None:
            seqs = streams[stream] = Seqs()
        seqs.note(seq, seq)
    return {stream_of(stream): seqs for stream, seqs in streams.items()}


def done(path: Path) -> list[Life]:
    """What a worker's index says it has done. What it was given once more, later, is of another life."""
    streams: dict[bytes, list[Seqs]] = {}
    for stream, seq in read_index(path):
        lives = streams.setdefault(stream, [Seqs()])
        if lives[-1].spans and seq <= lives[-1].spans[-1][1]:
            lives.append(Seqs())
        lives[-1].note(seq, seq)
    most = max(map(len, streams.values()), default=0)
    return [{stream_of(stream): lives[i] for stream, lives in streams.items() if i < len(lives)} for i in range(most)]


def by_stream(
    heads: Mapping[Key, int], journal: Life, consumer: Sequence[Life], workers: Sequence[Life]
) -> list[Stream]:
    """Stream by stream."""
    streams = []
    for key, head in heads.items():
        stored, _, _ = count([journal], key, head)
        different, again, _ = count(consumer, key, head)
        worked = count(workers, key, head)[0] if any(key in life for life in workers) else None
        streams.append(Stream(key[0], f"{key[1]:016x}", head, stored, different, again, worked))
    return streams
