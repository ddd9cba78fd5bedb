"""The forwarder of the demo, and the consumer that reads its log under a durable name. Both are killed, and come back.

What the consumer has dealt with must be known also of one that was killed. So it writes an index, one line for each
message, before it asks for the next one, which is when the message counts as dealt with; what kill -9 leaves of it is
in the file. A line that is cut short was no message yet.

They report over pipes and are told what to do as in members.py: ("where",), ("finish", offset), ("stop",).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from zmqbus.cli.demo.members import IDLE, REPORT, member
from zmqbus.net.adapter import run_main
from zmqbus.net.clock import now

if TYPE_CHECKING:
    from zmqbus.node.faces.subscription import Subscription

CLAIMS = "logs.>"
NAME = "indexer"  # the durable one


def keep(pipe: Connection, bus: str, name: str, journal: str) -> None:
    """Run a forwarder until told to stop."""
    try:
        run_main(_keep(pipe, bus, name, journal))
    except (EOFError, ConnectionError):
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send({"failed": f"{type(error).__name__}: {error}"})


async def _keep(pipe: Connection, bus: str, name: str, journal: str) -> None:
    from zmqbus.forwarder import Forwarder
    from zmqbus.protocol.streams.stream import Gap

    gaps: list[tuple[str, int, int, int]] = []
    async with Forwarder(journal, topics=[CLAIMS], name=name, bus=bus, interface="127.0.0.1") as forwarder:
        events = forwarder.events()
        offset = forwarder.counters()["journal_next_offset"]
        pipe.send({"up": now(), "recovered": offset, "torn": len(forwarder.quarantined), "journaled": offset})
        going = True
        while going:
            while (event := await events.get(0)) is not None:
                if isinstance(event, Gap):
                    gaps.append((event.topic, event.origin, event.first, event.last))
            work = [one for one in forwarder.queues() if one.group]
            worked, left = sum(one.done for one in work), sum(one.waiting + one.in_flight + one.delayed for one in work)
            offset = forwarder.counters()["journal_next_offset"]
            pipe.send({"journaled": offset, "gaps": list(gaps), "worked": worked, "left": left})
            await asyncio.sleep(REPORT / 2)
            match pipe.recv() if pipe.poll() else None:
                case ("where",):
                    pipe.send({"where": forwarder.counters()["journal_next_offset"]})
                case ("stop",):
                    going = False
    figures = forwarder.counters()  # when all is committed
    pipe.send(
        {
            "journaled": figures["journal_next_offset"],
            "journal_bytes": figures["journal_bytes_in"],
            "fsync_p50_ms": figures["fsync_p50_ms"],
            "stopped": True,
        }
    )
    with contextlib.suppress(EOFError):
        pipe.recv()


def index(pipe: Connection, bus: str, name: str, path: Path) -> None:
    """Read the log under a durable name and write the index, until told how far the log goes."""
    with member(pipe, bus, name) as node, open(path, "ab", buffering=0) as file:
        subscription = node.subscribe(CLAIMS, durable=NAME, start="first")
        prefixes: dict[tuple[str, int], bytes] = {}
        end: int | None = None
        consumed = 0
        began = heard_at = now()
        report_at = 0.0
        while end is None or now() - heard_at < IDLE:
            message = subscription.get(REPORT / 2)
            while message is not None:
                key = (message.topic, message.origin)
                prefix = prefixes.get(key)
                if prefix is None:
                    prefix = prefixes[key] = f"{message.topic} {message.origin:x} ".encode()
                file.write(b"%b%d\n" % (prefix, message.seq))
                consumed += 1
                heard_at = now()
                if heard_at >= report_at:
                    break
                message = subscription.get(0)
            if now() >= report_at:
                report_at = now() + REPORT
                gaps = [(gap.topic, gap.origin, gap.first, gap.last) for gap in subscription.gaps]
                places = [(one.begin, one.next, one.end) for one in subscription.positions]
                facts = {"consumed": consumed, "lost": subscription.lost, "gaps": gaps, "places": places}
                pipe.send(facts | {"seconds": heard_at - began})
            if end is not None and message is None and _has_passed(subscription, end):
                break
            match pipe.recv() if pipe.poll() else None:
                case ("finish", int(offset)):
                    end, heard_at = offset, now()
        gaps = [(gap.topic, gap.origin, gap.first, gap.last) for gap in subscription.gaps]
        facts = {"consumed": consumed, "lost": subscription.lost, "gaps": gaps, "seconds": heard_at - began}
        subscription.close()  # which commits the last message, too
        pipe.send(facts | {"finished": True})
        with contextlib.suppress(EOFError):
            pipe.recv()


def _has_passed(subscription: Subscription, offset: int) -> bool:
    positions = subscription.positions
    return bool(positions) and all(one.next >= offset for one in positions)


def read_index(path: Path) -> Iterator[tuple[bytes, int]]:
    """Stream (see `stream_of`) and seq of each message in an index, in the order in which they were dealt with."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                stream, _, seq = line.rpartition(b" ")
                yield stream, int(seq)


def stream_of(text: bytes) -> tuple[str, int]:
    """Topic and origin of a stream, as an index has it."""
    topic, origin = text.decode().split(" ")
    return topic, int(origin, 16)
