"""Discovery by real multicast on loopback, in one process; and what strangers announce there."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from zeroconf import DNSOutgoing, DNSQuestion  # type: ignore[attr-defined]
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from zmqbus.net import clock, mdns
from zmqbus.net.discovery import Discovery, Found
from zmqbus.net.mdns import SERVICE_TYPE, Session

PATIENCE_S = 60.0  # a bound on waiting; what is waited for takes milliseconds, or at most two seconds
LOOPBACK = ("127.0.0.1",)
CLONE_NEWNET = 0x40000000  # linux/sched.h


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario; whatever task or socket it leaves behind is an error."""

    async def checked() -> None:
        await scenario
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(checked())
    gc.collect()  # an open socket is reported when it is collected: here, not in some later test


def run_alone(scenario: Coroutine[Any, Any, None]) -> None:
    """The same, on a loopback of its own where that is permitted: what it announces is heard on every bus, and would
    have the nodes of tests that run at the same time warn of it."""

    def on_a_thread() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) == 0:  # this thread only, and what it starts
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        run(scenario)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(on_a_thread).result()


class Ear:
    """Hears what one Discovery reports."""

    def __init__(self) -> None:
        self.found: list[Found] = []
        self.gone: list[int] = []
        self.found_before_gone = 0  # how many were, at the first goodbye
        self.warnings: list[str] = []
        self._news = asyncio.Event()

    def on_found(self, found: Found) -> None:
        self.found.append(found)
        self._news.set()

    def on_gone(self, origin: int) -> None:
        if not self.gone:
            self.found_before_gone = len(self.found)
        self.gone.append(origin)
        self._news.set()

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)
        self._news.set()

    @property
    def origins(self) -> set[int]:
        return {found.origin for found in self.found}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def finds(self, origin: int) -> Found:
        """The latest that was found of this node; waits for the first."""
        await self.until(lambda: origin in self.origins)
        return next(found for found in reversed(self.found) if found.origin == origin)


@pytest.fixture
def bus() -> str:
    """A name of its own for each test: others may run on this machine's loopback at the same time."""
    return f"tést-{uuid.uuid4().hex}"


def make(bus: str, origin: int, addresses: Sequence[str] = LOOPBACK) -> tuple[Discovery, Ear]:
    ear = Ear()
    node = Discovery(
        bus=bus,
        origin=origin,
        inbox_port=10_000 + origin,
        pub_port=20_000 + origin,
        epoch=30_000 + origin,
        addresses=addresses,
        on_found=ear.on_found,
        on_gone=ear.on_gone,
        on_warning=ear.on_warning,
    )
    return node, ear


@contextlib.asynccontextmanager
async def started(bus: str, origin: int, addresses: Sequence[str] = LOOPBACK) -> AsyncIterator[tuple[Discovery, Ear]]:
    node, ear = make(bus, origin, addresses)
    try:
        await node.start()
        yield node, ear
    finally:
        await node.close()


def expected(origin: int, addresses: Sequence[str] = LOOPBACK) -> Found:
    return Found(origin, tuple(addresses), 10_000 + origin, 20_000 + origin, 30_000 + origin, 1)


# --- nodes on loopback ---------------------------------------------------------------------------


def test_two_nodes_find_each_other(bus: str) -> None:
    async def scenario() -> None:
        async with started(bus, 1) as (_, ear1), started(bus, 2) as (_, ear2):
            assert await ear1.finds(2) == expected(2)
            assert await ear2.finds(1) == expected(1)
            assert ear1.warnings == ear2.warnings == []
            assert ear1.origins == {2}  # not itself
            assert ear2.origins == {1}

    run(scenario())


def test_another_bus_is_not_seen(bus: str) -> None:
    async def scenario() -> None:
        async with started(bus, 1) as (_, ear), started(f"{bus}x", 2), started(bus, 3):
            await ear.finds(3)
            assert ear.origins == {3}
            assert ear.warnings == []

    run(scenario())


def test_a_goodbye_is_reported(bus: str) -> None:
    async def scenario() -> None:
        async with started(bus, 1) as (_, ear):
            async with started(bus, 2):
                await ear.finds(2)
                assert ear.gone == []
            await ear.until(lambda: ear.gone == [2])

    run(scenario())


def test_nothing_is_heard_of_a_node_after_its_goodbye(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(mdns, "GOODBYE_PAUSES_S", (0.0, 1.2))  # time enough for whatever was to be sent
        async with started(bus, 1) as (_, ear), stranger() as aio:
            async with started(bus, 2) as (node, _):
                await ear.finds(2)
                assert node._session is not None
                assert node._session._aio is not None
                zeroconf = node._session._aio.zeroconf
                aio.zeroconf.async_send(question())
                async with asyncio.timeout(PATIENCE_S):
                    while not zeroconf.out_queue.queue and not zeroconf.out_delay_queue.queue:
                        await asyncio.sleep(0)
                await node.close()  # with an answer still waiting to be sent
            await ear.until(lambda: 2 in ear.gone)
            async with started(bus, 3):
                await ear.finds(3)
            assert {found.origin for found in ear.found[ear.found_before_gone :]} == {3}

    run(scenario())


def test_refresh_announces_anew_and_reports_anew(bus: str) -> None:
    async def scenario() -> None:
        async with started(bus, 1) as (node, ear1), started(bus, 2) as (_, ear2):
            await ear1.finds(2)
            await ear2.finds(1)
            ear1.found.clear()
            ear2.found.clear()
            await node.refresh()
            assert await ear1.finds(2) == expected(2)  # remembered
            assert await ear2.finds(1) == expected(1)  # announced

    run(scenario())


def test_refresh_asks_for_a_node_whose_announcement_was_lost(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack, started(bus, 1) as (node, ear):
            with monkeypatch.context() as patch:
                # As quiet as one whose packets were all lost: it answers questions only.
                patch.setattr(Session, "_announce", lambda *_, **__: None)
                patch.setattr(Session, "_ask_who", lambda *_, **__: None)
                await stack.enter_async_context(started(bus, 2))
            assert ear.found == []
            await node.refresh()
            await ear.finds(2)

    run(scenario())


def test_without_a_network_it_waits_for_one(bus: str) -> None:
    async def scenario() -> None:
        async with started(bus, 1) as (_, ear1), started(bus, 2, []) as (node, ear2):
            await node.refresh()
            await node.set_addresses([])
            assert ear2.warnings == []
            await node.set_addresses(LOOPBACK)
            await ear1.finds(2)
            await ear2.finds(1)
            await node.set_addresses([])
            await node.set_addresses(LOOPBACK)
            assert ear1.gone == []  # it moved; it did not leave
        assert ear2.warnings == []

    run(scenario())


def test_the_same_addresses_again_change_nothing(bus: str) -> None:
    async def scenario() -> None:
        async with started(bus, 1) as (node, _):
            session = node._session
            await node.set_addresses(list(LOOPBACK))
            assert node._session is session

    run(scenario())


def test_an_address_that_is_not_ours_is_a_warning_and_does_not_spoil_the_others(bus: str) -> None:
    async def scenario() -> None:
        async with started(bus, 1, ["203.0.113.7"]) as (node, ear), started(bus, 2) as (_, ear2):
            assert ear.warnings == [
                "mDNS: 203.0.113.7 is not an address of this machine now",
                "mDNS: no discovery on 203.0.113.7: no address could join the multicast group",
            ]
            await node.refresh()
            await node.set_addresses(["203.0.113.7", "127.0.0.1"])
            assert (await ear2.finds(1)).host_addresses == LOOPBACK  # what is not loopback is not for a node on it

    run(scenario())


def test_a_taken_port_is_a_warning_and_is_tried_again(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(**_: object) -> AsyncZeroconf:
        raise OSError(98, "Address already in use")

    async def scenario() -> None:
        monkeypatch.setattr(mdns, "AsyncZeroconf", taken)
        async with started(bus, 1) as (node, ear1):
            assert ear1.warnings == ["mDNS: no discovery on 127.0.0.1: [Errno 98] Address already in use"]
            monkeypatch.undo()
            async with started(bus, 2) as (_, ear2):
                await node.refresh()
                await ear2.finds(1)

    run(scenario())


def test_a_node_that_does_not_hear_itself_says_so_and_begins_again(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with started(bus, 1) as (node, ear1), started(bus, 2) as (_, ear2):
            await ear1.finds(2)
            deaf = node._session
            assert deaf is not None
            monkeypatch.setattr(deaf, "_heard", False)
            later = clock.now() + mdns.DEAF_S + 1
            monkeypatch.setattr(clock, "now", lambda: later)
            await node.refresh()
            monkeypatch.undo()
            assert "hears no announcement on 127.0.0.1, not even its own" in ear1.warnings[0]
            assert node._session is not deaf
            ear2.found.clear()
            await ear2.finds(1)
            assert ear2.gone == []

    run(scenario())


def test_a_node_hears_itself(bus: str) -> None:
    async def scenario() -> None:
        async with started(bus, 1) as (node, _), started(bus, 2) as (_, ear2):
            await ear2.finds(1)
            assert node._session is not None
            assert node._session._heard

    run(scenario())


def test_closing_is_final_and_may_come_at_any_time(bus: str) -> None:
    async def scenario() -> None:
        never, _ = make(bus, 1)
        await never.close()
        await never.start()
        await never.refresh()
        await never.set_addresses([])
        assert never._session is None

        node, ear = make(bus, 2)
        async with started(bus, 3):
            await asyncio.gather(node.start(), node.refresh(), node.set_addresses(LOOPBACK), node.close(), node.close())
            heard = list(ear.found)
            await node.refresh()
            await node.close()
            assert ear.found == heard
            assert ear.gone == []  # 3 said goodbye to nobody

    run(scenario())


def test_a_cancelled_start_leaves_nothing(bus: str) -> None:
    async def scenario() -> None:
        task = None
        turns = 0
        while task is None or task.cancelled():  # cancelled at each await of `start` in turn, until it came too late
            node, _ = make(bus, 1)
            task = asyncio.create_task(node.start())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await node.close()
            turns += 1
        assert turns > 3

    run(scenario())


def test_a_node_on_loopback_sends_nothing_on_this_machines_interfaces(bus: str) -> None:
    """By the routing table's word: the one socket option that decides where a multicast leaves is set to loopback."""

    async def scenario() -> None:
        async with started(bus, 1) as (node, _):
            assert node._session is not None
            assert node._session._aio is not None
            senders = node._session._aio.zeroconf.engine.senders
            leaving = [sender.sock.getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, 4) for sender in senders]
            assert leaving == [socket.inet_aton("127.0.0.1")]

    run(scenario())


# --- strangers -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def stranger() -> AsyncIterator[AsyncZeroconf]:
    """A bare zeroconf on loopback, to announce things no node would."""
    aio = AsyncZeroconf(interfaces=list(LOOPBACK))
    try:
        yield aio
    finally:
        await aio.async_close()


def txt(bus: str, **changes: str | None) -> dict[str, str]:
    fields = {"txtvers": "1", "id": "00000000000000ff", "pub": "2", "pv": "1", "bus": bus, "epoch": "4"} | changes
    return {key: value for key, value in fields.items() if value is not None}


def service(properties: dict[str, str] | bytes, port: int = 1, addresses: Sequence[str] = LOOPBACK) -> AsyncServiceInfo:
    return AsyncServiceInfo(
        SERVICE_TYPE,
        f"{uuid.uuid4().hex}.{SERVICE_TYPE}",
        port=port,
        properties=properties,
        server=f"{uuid.uuid4().hex}.local.",
        parsed_addresses=list(addresses),
    )


def bare_pointer(info: AsyncServiceInfo) -> DNSOutgoing:
    """An announcement of nothing but the PTR record."""
    out = DNSOutgoing(0x8400)  # an authoritative response
    out.add_answer_at_time(info.dns_pointer(), 0)
    return out


def question() -> DNSOutgoing:
    """Asks for all instances of our service type, to be answered by multicast."""
    out = DNSOutgoing(0)
    out.add_question(DNSQuestion(SERVICE_TYPE, 12, 1))
    return out


async def publish(aio: AsyncZeroconf, info: AsyncServiceInfo) -> None:
    await (await aio.async_register_service(info, cooperating_responders=True))


def test_bad_announcements_are_ignored_with_one_warning_each(bus: str) -> None:
    async def scenario() -> None:
        async with started(bus, 1) as (node, ear), stranger() as aio:
            bad = [
                service(txt(bus, id="00000000000000FF")),
                service(txt(bus, pub="0")),
                service(txt(bus), addresses=["192.0.2.1"]),
                service(txt(bus, id=f"{1:016x}")),  # our own
                service(b"\xff"),
            ]
            await asyncio.gather(*(publish(aio, info) for info in bad))
            await ear.until(lambda: len(ear.warnings) == len(bad))
            for info in bad:
                assert sum(info.name in text for text in ear.warnings) == 1
            await node.refresh()  # looks at all of them once more
            async with started(bus, 2):
                await ear.finds(2)
            assert ear.origins == {2}
            assert len(ear.warnings) == len(bad)
            assert not any(character < " " for text in ear.warnings for character in text)

    run_alone(scenario())


def test_a_sound_announcement_by_another_implementation_is_accepted(bus: str) -> None:
    async def scenario() -> None:
        async with started(bus, 1) as (_, ear), stranger() as aio:
            await publish(aio, service(txt(bus, epoch="0", pv="9", future="field"), port=65535))
            assert await ear.finds(0xFF) == Found(0xFF, LOOPBACK, 65535, 2, 0, 9)

    run(scenario())


def test_an_announcement_that_came_incomplete_is_asked_for(bus: str) -> None:
    async def scenario() -> None:
        async with started(bus, 1) as (_, ear), stranger() as aio:
            await aio.zeroconf.async_wait_for_start()
            info = service(txt(bus))
            info.async_clear_cache()
            aio.zeroconf.registry.async_add(info)  # answers questions, and announces nothing
            out = bare_pointer(info)
            aio.zeroconf.async_send(out)
            assert (await ear.finds(0xFF)).inbox_port == 1

    run(scenario())


def test_a_name_without_records_is_forgotten_at_refresh(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be named as known in every question, and nobody of that name would ever answer."""

    async def scenario() -> None:
        monkeypatch.setattr(mdns, "ASKING_MAX", 0)
        async with started(bus, 1) as (node, ear), stranger() as aio, started(bus, 2):
            await aio.zeroconf.async_wait_for_start()
            dead = service(txt(bus))
            aio.zeroconf.async_send(bare_pointer(dead))
            await ear.finds(2)
            session = node._session
            assert session is not None
            assert session._aio is not None
            cache = session._aio.zeroconf.cache

            def known() -> set[str]:
                return {getattr(record, "alias", "") for record in cache.async_entries_with_name(SERVICE_TYPE)}

            async with asyncio.timeout(PATIENCE_S):
                while dead.name not in known():
                    await asyncio.sleep(0)
            before = known()
            await node.refresh()
            assert known() == before - {dead.name}

    run(scenario())


def test_a_goodbye_under_a_borrowed_id_is_not_that_nodes_goodbye(bus: str) -> None:
    async def scenario() -> None:
        async with started(bus, 1) as (_, ear):
            async with started(bus, 2), stranger() as aio:
                await ear.finds(2)
                thief = service(txt(bus, id=f"{2:016x}"), port=9)
                await publish(aio, thief)
                await ear.until(lambda: any(found.inbox_port == 9 for found in ear.found))
                for pending in (aio.zeroconf.out_queue, aio.zeroconf.out_delay_queue):
                    pending.queue.clear()  # an answer after the goodbye would bring it back to life
                await (await aio.async_unregister_service(thief))
                other = service(txt(bus))
                await publish(aio, other)
                await ear.finds(0xFF)
                assert ear.gone == []
            await ear.until(lambda: 2 in ear.gone)

    run(scenario())
