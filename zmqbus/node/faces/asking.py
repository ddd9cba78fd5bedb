"""Questions to peers, in the words of the protocol: for programs that look after a bus. Any thread but the engine's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from zmqbus.node.engine import Engine
from zmqbus.node.faces.node import Node
from zmqbus.protocol.commands import Body, QueueFigures


def ask(node: Node, questions: Mapping[int, Body], timeout: float) -> dict[int, Body]:
    """Ask peers, by origin, all at the same time. Whoever does not answer within `timeout` seconds is missing.

    Raises:
        NodeClosed: the node has been closed.
    """
    return node._call(_ask(node._engine, questions, timeout))


def own_queues(node: Node) -> list[QueueFigures]:
    """What is to be done of what this node itself has pushed, and of what groups share of its messages."""
    node._engine.outlet.flush_all()  # what a burst gathers is given out as soon as it is sent
    return node._call(_own_queues(node._engine))


async def _own_queues(engine: Engine) -> list[QueueFigures]:
    return engine.jobs.figures()


async def _ask(engine: Engine, questions: Mapping[int, Body], timeout: float) -> dict[int, Body]:
    async def one(origin: int, question: Body) -> Body | None:
        link = engine.peering.links.get(origin)
        answer = await link.question(question, timeout) if link is not None else None
        return None if answer is None else answer.body

    answers = await asyncio.gather(*(one(origin, question) for origin, question in questions.items()))
    return {origin: answer for origin, answer in zip(questions, answers, strict=True) if answer is not None}
