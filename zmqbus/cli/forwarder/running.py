"""A forwarder in the foreground, until it is asked to stop or its journal breaks.

It says what it is when it starts, what goes wrong as it happens, and now and then, on a terminal or to systemd, how
it is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from zmqbus.cli.forwarder.log import Log
from zmqbus.cli.forwarder.systemd import Notifier
from zmqbus.cli.messages.forms import human_age, human_bytes, human_rate
from zmqbus.cli.messages.render import escape
from zmqbus.cli.shell.output import plural
from zmqbus.cli.shell.stopping import handed_to
from zmqbus.forwarder import Forwarder
from zmqbus.net.adapter import run_main
from zmqbus.node.events import AsyncEventStream, Warned
from zmqbus.protocol.members.peers import DuplicateName, PeerJoined
from zmqbus.protocol.streams.stream import Gap

STATUS_PERIOD = 1.0  # seconds between two lines at the bottom of a terminal
TOLD_PERIOD = 10.0  # … and between two that systemd is told

Figures = dict[str, Any]


def opening(forwarder: Forwarder, bus: str) -> str:
    """What it is, on one line."""
    figures: Figures = forwarder.statistics()
    first, following = figures["journal_first_offset"], figures["journal_next_offset"]
    if following > first:
        offsets = f"offsets {first} to {following - 1} recovered"
    else:
        offsets = f"empty, the next offset is {following}" if following else "new"
    torn = forwarder.quarantined
    return (
        f"forwarder {escape(forwarder.name)} on bus {bus!r} claims {escape(' '.join(forwarder.topics))}; "
        f"journal {escape(forwarder.path)}: {offsets}, {_journal(figures)}"
        + (f"; a torn end, of which nobody was promised anything, is in {escape(', '.join(torn))}" if torn else "")
        + f"; inbox {forwarder.endpoints['inbox']}, pub {forwarder.endpoints['pub']}"
    )


def _journal(figures: Figures) -> str:
    most = f" of {human_bytes(figures['journal_bytes_max'])}" if figures["journal_bytes_max"] else ""
    return f"{human_bytes(figures['journal_bytes'])}{most} in {plural(figures['journal_segments'], 'segment')}"


def condition(figures: Figures) -> str:
    """How it is, on one line."""
    full = "FULL, " if figures["journal_full"] else ""
    size = human_bytes(int(figures["journal_bytes_in_per_s"]))
    return (
        f"{full}{human_rate(figures['journal_messages_per_s'])}, {size}/s in; "
        f"next offset {figures['journal_next_offset']}, {_journal(figures)}; "
        f"{plural(figures['journal_streams'], 'stream')}, {plural(figures['cursors'], 'cursor')}, "
        f"{plural(figures['readings'], 'reading')}; fsync {human_age(figures['fsync_p50_ms'] / 1e3)}, "
        f"at most {human_age(figures['fsync_max_ms'] / 1e3)}"
    )


def closing(figures: Figures) -> str:
    """What this run has done, on one line."""
    return (
        f"stopped after {human_age(figures['uptime_s'])}; {plural(figures['journal_messages'], 'message')} taken, "
        f"next offset {figures['journal_next_offset']}"
    )


def run(forwarder: Forwarder, bus: str) -> None:
    """Run it until it is asked to stop. Raises what opening it, or its journal, raises."""
    log, notifier = Log(), Notifier()
    try:
        run_main(_run(forwarder, bus, log, notifier))
    finally:
        notifier.close()
        log.close()


async def _run(forwarder: Forwarder, bus: str, log: Log, notifier: Notifier) -> None:
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal(again: bool) -> None:
        loop.call_soon_threadsafe((hurry if again else stop).set)

    with handed_to(on_signal):
        notifier.tell("STATUS=recovering the journal")
        await forwarder.open()
        try:
            log.line(opening(forwarder, bus))
            notifier.tell("READY=1", f"STATUS={condition(forwarder.statistics())}")
            await _first_of(
                stop.wait(), forwarder.failed(), _pass_on(forwarder, log), _tell(forwarder, log), _live(notifier),
                _inform(forwarder, notifier),
            )  # fmt: skip
        finally:
            notifier.tell("STOPPING=1", "STATUS=leaving the bus, committing what was received")
            log.status("")
            await _close(forwarder, hurry)
        log.line(closing(forwarder.statistics()))


async def _first_of(*works: Any) -> None:
    """Until one of them ends; raises what it raises."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _close(forwarder: Forwarder, hurry: asyncio.Event) -> None:
    """In good order: readers and publishers hear of it, and what was received is committed; unless there is a hurry."""
    closing = asyncio.ensure_future(forwarder.close())
    hurried = asyncio.ensure_future(hurry.wait())
    await asyncio.wait([closing, hurried], return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not closing.done():
        closing.cancel()  # the drain; what then has to be done is done
    with contextlib.suppress(asyncio.CancelledError):
        await closing


# --- meanwhile ---------------------------------------------------------------------------------


async def _pass_on(forwarder: Forwarder, log: Log) -> None:
    """Say what goes wrong."""
    names: dict[int, str] = {}
    events: AsyncEventStream = forwarder.events()
    async for event in events:
        match event:
            case PeerJoined(peer=peer):
                names[peer.origin] = peer.name
            case Warned(reason=reason):
                log.line(f"warning: {escape(reason)}")
            case Gap(topic=topic, origin=origin, first=first, last=last):
                span = f"#{first}" if first == last else f"#{first} to #{last}"
                who = escape(names.get(origin) or f"{origin:016x}")
                log.line(
                    f"lost: {plural(event.count, 'message')} on {escape(topic)} from {who}, {span}: "
                    "neither their publisher nor another forwarder has them"
                )
            case DuplicateName(name=name, origins=origins):
                log.line(
                    f"warning: {len(origins)} nodes are named {escape(name)}: give each a name of its own (--name)"
                )
    await asyncio.Event().wait()  # the node is closed; somebody else says why


async def _each(seconds: float, do: Callable[[], None]) -> None:
    while True:
        do()
        await asyncio.sleep(seconds)


async def _tell(forwarder: Forwarder, log: Log) -> None:
    if not log.on_terminal:
        await asyncio.Event().wait()
    await _each(STATUS_PERIOD, lambda: log.status(condition(forwarder.statistics())))


async def _inform(forwarder: Forwarder, notifier: Notifier) -> None:
    await _each(TOLD_PERIOD, lambda: notifier.tell(f"STATUS={condition(forwarder.statistics())}"))


async def _live(notifier: Notifier) -> None:
    """Show that this loop turns: it is what serves everybody."""
    if notifier.watchdog is None:
        await asyncio.Event().wait()
    else:
        await _each(notifier.watchdog / 3, lambda: notifier.tell("WATCHDOG=1"))
