"""`zmqbus request`: ask one of those who respond to a service, or all of them, and print what they answer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

import click

from zmqbus.cli import shell
from zmqbus.cli.messages.forms import parse_value, value_to_json
from zmqbus.cli.shell import remark, stopping
from zmqbus.cli.shell.bus import SETTLE, Bus, Duration, Watch, settle
from zmqbus.cli.shell.input import parse_headers
from zmqbus.errors import NoResponders, RemoteError, WaitTimeout, ZmqbusError
from zmqbus.net.clock import now
from zmqbus.protocol.topics import encode_topic

if TYPE_CHECKING:
    from zmqbus.node.faces.node import Node
    from zmqbus.node.faces.requests.values import Reply

T = TypeVar("T")
TIMEOUT_MIN = 0.001


@click.command()
@click.argument("service")
@click.argument("value", required=False)
@click.option("--json", "as_json", is_flag=True, help="VALUE is JSON, not text, and so is what is printed.")
@click.option("-H", "--headers", multiple=True, metavar="KEY=VALUE", help="A header; may be repeated.")
@click.option("--all", "everybody", is_flag=True, help="Ask all who respond to it, and print a line for each.")
@click.option(
    "--timeout", type=Duration(TIMEOUT_MIN), default="5s", show_default=True, help="How long to wait for the answer."
)
@click.option(
    "--wait",
    "patience",
    type=Duration(),
    default=SETTLE,
    show_default=True,
    help="How long to look for somebody who responds; with --all, for all of them.",
)
@click.pass_obj
def request(
    bus: Bus,
    service: str,
    value: str | None,
    as_json: bool,
    headers: tuple[str, ...],
    everybody: bool,
    timeout: float,
    patience: float,
) -> int:
    """Ask one of the nodes that respond to a service, and print its answer.

    Without a VALUE, null is sent. A request is sent once: when the responder dies over it, that is an error.

    \b
    Examples:
      zmqbus request time.now
      zmqbus request images.resize --json '{"image": 7, "width": 200}'
      zmqbus request cache.flush --all --timeout 1s
    """
    encode_topic(service)
    given = None if value is None else parse_value(value, as_json)
    marks = parse_headers(headers)
    with bus.join("request") as (node, watch):
        if everybody:
            settle(node, watch, patience)
            ask = lambda: node.request_many(service, given, headers=marks, timeout=timeout)  # noqa: E731
            return _show_all(service, _patiently(ask, watch), as_json, timeout)
        _await_responder(node, watch, service, patience)
        try:
            answer = _patiently(lambda: node.request(service, given, headers=marks, timeout=timeout), watch)
        except RemoteError as error:
            remark(_escaped(error))
            return shell.code_of(error)
        click.echo(_line(answer, as_json))
    return shell.OK


def _await_responder(node: Node, watch: Watch, service: str, patience: float) -> None:
    """Raises NoResponders, if there is none in time."""
    until = now() + patience
    while True:
        try:
            node.wait_for_responders(service, 1, max(0.001, min(stopping.PEEK, until - now())))
            return
        except WaitTimeout:
            stopping.check()
            watch.poll()
            if now() >= until:
                watch.conclude()
                raise NoResponders(service, "--wait 30s") from None


def _patiently(ask: Callable[[], T], watch: Watch) -> T:
    """Have it asked, and look meanwhile whether the command is to stop: then the node is closed, which ends it."""
    pool = ThreadPoolExecutor(1)
    try:
        future = pool.submit(ask)
        while not wait([future], stopping.PEEK).done:
            stopping.check()
            watch.poll()
        return future.result()
    finally:
        pool.shutdown(wait=False)  # it may still ask: closing the node ends that


def _line(value: Any, as_json: bool) -> str:
    from zmqbus.cli.messages.render import compact

    return value_to_json(value) if as_json else compact(value)


def _show_all(service: str, replies: list[Reply], as_json: bool, timeout: float) -> int:
    """A line for each, errors among the remarks. Returns the exit code."""
    from zmqbus.cli.messages.render import escape

    for reply in replies:
        if as_json:
            click.echo(_as_json(reply))
        elif reply.error is None:
            click.echo(f"{escape(reply.responder)}  {_line(reply.value, False)}")
        else:
            remark(_escaped(reply.error))
    if not replies:
        remark(f"no answer to {service} within {timeout:g} s")
        return shell.TIMED_OUT
    return shell.OK if any(reply.error is None for reply in replies) else shell.FAILED


def _as_json(reply: Reply) -> str:
    who = {"responder": reply.responder, "origin": f"{reply.origin:016x}"}
    if reply.error is None:
        return value_to_json({**who, "value": reply.value})
    kind = reply.error.type if isinstance(reply.error, RemoteError) else type(reply.error).__name__
    text = reply.error.text if isinstance(reply.error, RemoteError) else str(reply.error)
    return value_to_json({**who, "error": {"type": kind, "text": text}})


def _escaped(error: ZmqbusError) -> str:
    """What an error says; the words may be a peer's."""
    from zmqbus.cli.messages.render import escape

    return escape(str(error))
