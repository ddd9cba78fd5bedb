"""Questions to peers, in the words of the protocol: for programs that look after a bus. Any thread but the engine's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from zmqbus.node.engine import Engine
from zmqbus.node.faces.node import Node
from zmqbus.node.peers.serving import key_of
from zmqbus.protocol.commands import Body, QueueFigures, Statistics, Stats


def ask(node: Node, questions: Mapping[int, Body], timeout: float) -> dict[int, Body]:
    """Ask peers, by origin, all at the same time. Whoever does not answer within `timeout` seconds is missing.

    Raises:
        NodeClosed: the node has been closed.
    """
    return node._call(_ask(node._engine, questions, timeout))


def queues_of(
    node: Node, origins: Iterable[int], timeout: float, topic: str | None = None
) -> dict[int, list[QueueFigures]]:
    """The queues of peers, by origin: all, or those of one topic. Whoever leaves a question unanswered for `timeout`
    seconds is missing.

    Raises:
        NodeClosed: the node has been closed.
    """
    return node._call(_queues_of(node._engine, list(origins), timeout, topic))


def own_queues(node: Node) -> list[QueueFigures]:
    """What is to be done of what this node itself has pushed, and of what groups share of its messages."""
    node._engine.outlet.flush_all()  # what a burst gathers is given out as soon as it is sent
    return node._call(_own_queues(node._engine))


async def _own_queues(engine: Engine) -> list[QueueFigures]:
    return engine.jobs.figures()


async def _queues_of(
    engine: Engine, origins: Sequence[int], timeout: float, topic: str | None
) -> dict[int, list[QueueFigures]]:
    told = await asyncio.gather(*(_queues_of_one(engine, origin, timeout, topic) for origin in origins))
    return {origin: queues for origin, queues in zip(origins, told, strict=True) if queues is not None}


async def _queues_of_one(engine: Engine, origin: int, timeout: float, topic: str | None) -> list[QueueFigures] | None:
    queues: list[QueueFigures] = []
    first = (topic or "", "")
    while True:
        answer = (await _ask(engine, {origin: Stats(queue=first[0], group=first[1])}, timeout)).get(origin)
        if not isinstance(answer, Statistics):
            return None
        queues = [one for one in queues if key_of(one) != first] + answer.queues  # which begins with all of `first`
        last = key_of(queues[-1]) if queues else first
        if not answer.more_queues or last <= first or topic not in (None, last[0]):
            return [one for one in queues if topic in (None, one.topic)]
        first = last


async def _ask(engine: Engine, questions: Mapping[int, Body], timeout: float) -> dict[int, Body]:
    async def one(origin: int, question: Body) -> Body | None:
        link = engine.peering.links.get(origin)
        answer = await link.question(question, timeout) if link is not None else None
        return None if answer is None else answer.body

    answers = await asyncio.gather(*(one(origin, question) for origin, question in questions.items()))
    return {origin: answer for origin, answer in zip(questions, answers, strict=True) if answer is not None}
