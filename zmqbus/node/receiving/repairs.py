"""What a subscription missed: asked for at peers, or taken from our own history. On the engine's loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from zmqbus.errors import RemoteProtocolError
from zmqbus.node.peers.links import Link
from zmqbus.node.publishing.outlet import Outlet
from zmqbus.node.receiving.intake import Intake
from zmqbus.node.storing.fetching import FETCH_BYTES
from zmqbus.protocol import commands
from zmqbus.protocol.commands import Command
from zmqbus.protocol.frames import decode_batches
from zmqbus.protocol.streams.stream import Fetch

FETCH_TIMEOUT = 20.0  # after this an answer is of no use to the tracker any more

OnGarbage = Callable[[RemoteProtocolError], None]


def fetch_all(
    outlet: Outlet, links: Mapping[int, Link], intake: Intake, fetches: Sequence[Fetch], on_garbage: OnGarbage
) -> None:
    """Ask for these, and tell the intake what comes of it."""
    for asked in fetches:
        if asked.source == outlet.origin:
            answer = outlet.fetch(asked.topic, asked.first, asked.last, FETCH_BYTES)
            intake.fetched(asked, answer.last, decode_batches(answer.parts))
            continue
        link = links.get(asked.source)
        body = commands.Fetch(asked.topic, asked.origin, asked.first, asked.last, FETCH_BYTES)
        if link is None or not link.ask(body, _fetched(intake, asked, on_garbage), FETCH_TIMEOUT):
            intake.refused(asked)


def _fetched(intake: Intake, asked: Fetch, on_garbage: OnGarbage) -> Callable[[Command | None], None]:
    def answered(command: Command | None) -> None:
        if command is None or not isinstance(command.body, commands.Batches):
            intake.refused(asked)
            return
        try:
            batches = decode_batches(command.batches)
        except RemoteProtocolError as error:
            on_garbage(error)
            intake.refused(asked)
            return
        intake.fetched(asked, command.body.last, batches)

    return answered
