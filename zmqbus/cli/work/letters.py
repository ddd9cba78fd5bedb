"""The dead letters of a queue, as a worker takes them. What is not settled by then goes back in the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from zmqbus.cli.shell import remark, stopping
from zmqbus.cli.shell.bus import Watch
from zmqbus.cli.work.settling import give_back, unconfirmed
from zmqbus.net.clock import now
from zmqbus.protocol.queues.letters import ATTEMPTS, DEAD_PREFIX, ORIGIN, REASON, SEQ

if TYPE_CHECKING:
    from zmqbus.node.faces.node import Node
    from zmqbus.node.work.queues.job import Job

GROUP = "dead"
ANSWER = 2.0  # seconds that each node has to say how many there are
QUIET = 1.0  # seconds without a letter after which there are no more
LEASE = 60.0  # seconds that letters are held without a word
RENEW = 20.0
TOLD = 20  # of those that die with their owner
TOLD_VALUE = 60  # characters of each


def name_of(letter: Job) -> str:
    """Origin and seq of the job that died, as `tap` shows them."""
    headers = letter.headers or {}
    origin, seq = headers.get(ORIGIN), headers.get(SEQ)
    return f"{origin:016x}#{seq}" if isinstance(origin, int) and isinstance(seq, int) else f"?#{letter.seq}"


def own_headers(letter: Job) -> dict[str, Any]:
    """What it had when it was alive."""
    return {key: value for key, value in (letter.headers or {}).items() if not key.startswith("$")}


def attempts_of(letter: Job) -> str:
    """How many there were."""
    from zmqbus.cli.messages.render import compact

    return compact((letter.headers or {}).get(ATTEMPTS, "?"))


def reason_of(letter: Job) -> str:
    """Why it died."""
    from zmqbus.cli.messages.render import compact

    return compact((letter.headers or {}).get(REASON, ""))


class Letters:
    """Those of one queue."""

    def __init__(self, node: Node, watch: Watch, queue: str, most: int) -> None:
        """`most`: to be held at a time."""
        self.there = _number(node, DEAD_PREFIX + queue)
        """As their owners say."""
        self.came = 0
        self._watch = watch
        self._worker = node.pull(DEAD_PREFIX + queue, group=GROUP, credit=most, lease=LEASE)
        self._held: list[Job] = []
        self._quiet_at = now() + QUIET
        self._renew_at = now() + RENEW

    def __enter__(self) -> Letters:
        return self

    def __exit__(self, *_: object) -> None:
        for letter in self._held:
            if not letter.settled:
                give_back(letter)
        if unsure := unconfirmed(self._worker):
            remark(unsure.removeprefix("; "))
        self._worker.close()

    @property
    def over(self) -> bool:
        """Whether no more will come, as it seems."""
        return now() >= self._quiet_at

    def __iter__(self) -> Iterator[Job]:
        while self.came < self.there and not self.over:
            if (letter := self.get(stopping.PEEK)) is not None:
                yield letter

    def get(self, timeout: float) -> Job | None:
        """One more, if it comes within this time."""
        stopping.check()
        self._watch.poll()
        if now() >= self._renew_at:
            self._renew_at = now() + RENEW
            self._held = [letter for letter in self._held if not letter.settled]
            for letter in self._held:
                letter.extend(LEASE)
        if (found := self._worker.get(timeout)) is not None:
            self._quiet_at = now() + QUIET
            self._held.append(found)
            self.came += 1
        return found


def _number(node: Node, topic: str) -> int:
    from zmqbus.cli.messages.render import escape
    from zmqbus.node.faces.asking import queues_of

    peers = {peer.origin: peer for peer in node.peers()}
    told = queues_of(node, peers, ANSWER, topic)
    for origin in peers.keys() - told.keys():
        remark(f"{escape(peers[origin].name)} did not say within {ANSWER:g} s what it has")
    figures = [one for queues in told.values() for one in queues if not one.group]
    return sum(one.waiting + one.in_flight + one.delayed for one in figures)


def tell(node: Node, queue: str) -> None:
    """Say of dead letters that are this node's own, and gone when it is, which they are and why; of the first few."""
    from zmqbus.cli.messages.render import compact

    with node.pull(DEAD_PREFIX + queue, group=GROUP, credit=TOLD) as worker:
        taken: list[Job] = []
        while len(taken) < TOLD and (letter := worker.get(stopping.PEEK)) is not None:
            taken.append(letter)
            if (letter.headers or {}).get(ORIGIN) == node.origin:
                value = compact(letter.value, TOLD_VALUE)
                remark(f"given up after {attempts_of(letter)} attempt(s): {value}: {reason_of(letter)}")
                letter.ack()
        for letter in taken:
            if not letter.settled:
                give_back(letter)
