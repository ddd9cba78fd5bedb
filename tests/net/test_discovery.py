"""Discovery over real multicast: on loopback in one process and in two, and in namespaces across a LAN."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import queue
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from tests.netns import Host, Lan
from zmqbus.errors import SetupError
from zmqbus.net import clock, discovery, mdns
from zmqbus.net.discovery import Discovery, Found, check_bus
from zmqbus.net.mdns import SERVICE_TYPE, Announcement, Session

PATIENCE_S = 20.0  # a bound on waiting; everything here takes milliseconds, or at most two seconds
LOOPBACK = ("127.0.0.1",)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a scenario; whatever task or socket it leaves behind is an error."""

    async def checked() -> None:
        await scenario
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(checked())
    gc.collect()  # an open socket is reported when it is collected: here, not in some later test


class Ear:
    """Hears what one Discovery reports."""

    def __init__(self) -> None:
        self.found: list[Found] = []
        self.gone: list[int] = []
        self.warnings: list[str] = []
        self._news = asyncio.Event()

    def on_found(self, found: Found) -> None:
        self.found.append(found)
        self._news.set()

    def on_gone(self, origin: int) -> None:
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


def test_two_processes_find_each_other(bus: str) -> None:
    with Child(bus, 1) as one:
        one.expect(event="started")
        with Child(bus, 2) as two:
            found = one.expect(event="found", origin=2)
            assert found["found"] == [2, ["127.0.0.1"], 10_002, 20_002, 30_002, 1]
            # A unicast answer may go to any process on this host; two has its answer when it asks by multicast.
            two.expect(event="found", origin=1)
            two.tell("close")
            one.expect(event="gone", origin=2)


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


def test_a_node_that_closes_at_once_is_not_announced_after_its_goodbye(bus: str) -> None:
    async def scenario() -> None:
        async with started(bus, 1) as (_, ear):
            async with started(bus, 2):
                await ear.finds(2)
                announced = len(ear.found)
            await ear.until(lambda: ear.gone == [2])
            async with started(bus, 3):
                await ear.finds(3)
            assert [found.origin for found in ear.found[announced:]].count(2) == 0

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
        async with started(bus, 1) as (node, ear):
            while ear.origins != {2}:
                # As quiet as one whose packets were all lost: it answers questions only.
                monkeypatch.setattr(Session, "_announce", lambda *_: None)
                async with started(bus, 2):
                    monkeypatch.undo()
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
            assert any("no discovery on 203.0.113.7" in text for text in ear.warnings)
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
            monkeypatch.setattr(deaf, "_heard_ourselves", False)
            later = clock.now() + mdns.DEAF_S + 1
            monkeypatch.setattr(clock, "now", lambda: later)
            await node.refresh()
            monkeypatch.undo()
            assert "does not hear its own announcements on 127.0.0.1" in ear1.warnings[0]
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
            assert node._session._heard_ourselves

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

    run(scenario())


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
            out = mdns_packet(info)
            aio.zeroconf.async_send(out)
            assert (await ear.finds(0xFF)).inbox_port == 1

    run(scenario())


def mdns_packet(info: AsyncServiceInfo) -> Any:
    """An announcement of nothing but the PTR record."""
    from zeroconf import DNSOutgoing  # type: ignore[attr-defined]

    out = DNSOutgoing(0x8400)  # an authoritative response
    out.add_answer_at_time(info.dns_pointer(), 0)
    return out


def test_a_name_without_records_is_forgotten_at_refresh(bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be named as known in every question, and nobody of that name would ever answer."""

    async def scenario() -> None:
        monkeypatch.setattr(mdns, "ASKING_MAX", 0)
        async with started(bus, 1) as (node, ear), stranger() as aio, started(bus, 2):
            await aio.zeroconf.async_wait_for_start()
            dead = service(txt(bus))
            aio.zeroconf.async_send(mdns_packet(dead))
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
                await (await aio.async_unregister_service(thief))
                other = service(txt(bus))
                await publish(aio, other)
                await ear.finds(0xFF)
                assert ear.gone == []
            await ear.until(lambda: 2 in ear.gone)

    run(scenario())


def announcement(**changes: Any) -> Announcement:
    fields: dict[bytes, bytes | None] = {
        b"txtvers": b"1",
        b"id": b"0123456789abcdef",
        b"pub": b"65535",
        b"pv": b"255",
        b"bus": b"b",
        b"epoch": b"18446744073709551615",
    }
    good = Announcement("i." + SERVICE_TYPE, 1, ("10.0.0.9", "10.0.0.10"), fields, 100)
    if "txt" in changes:
        changes["txt"] = fields | changes["txt"]
    return good._replace(**changes)


def test_a_sound_announcement_is_read() -> None:
    assert discovery._validated(announcement()) == Found(
        0x0123456789ABCDEF, ("10.0.0.9", "10.0.0.10"), 1, 65535, 2**64 - 1, 255
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"port": 0}, "it has no port"),
        ({"addresses": ()}, "it has no usable IPv4 address"),
        ({"addresses": ("0.0.0.0", "224.0.0.251", "255.255.255.255")}, "it has no usable IPv4 address"),
        ({"txt_size": 1025}, "its TXT record is 1025 bytes long"),
        ({"txt": {b"txtvers": b"2"}}, "its txtvers is not 1"),
        ({"txt": {b"txtvers": None}}, "its txtvers is not 1"),
        ({"txt": {b"bus": None}}, "it names no bus"),
        *(
            ({"txt": {b"id": value}}, "its id is not 16 hexadecimal digits")
            for value in (
                None, b"", b"0123456789abcde", b"0123456789abcdef0", b"0123456789ABCDEF", b"0x23456789abcdef",
                b"0123456789abcdef\n",
            )
        ),
        *(
            ({"txt": {b"pub": value}}, "its pub is not a number from 1 to 65535")
            for value in (
                None, b"", b"0", b"65536", b"-1", b"+1", b"01", b" 1", b"1\n", b"1_0", b"\xd9\xa1", b"9" * 5000
            )
        ),
        ({"txt": {b"pv": b"0"}}, "its pv is not a number from 1 to 255"),
        ({"txt": {b"pv": b"256"}}, "its pv is not a number from 1 to 255"),
        ({"txt": {b"epoch": b"18446744073709551616"}}, "its epoch is not a number from 0 to 18446744073709551615"),
        ({"txt": {b"epoch": b""}}, "its epoch is not a number from 0 to 18446744073709551615"),
    ],
)  # fmt: skip
def test_each_field_is_checked(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        discovery._validated(announcement(**changes))


def test_the_addresses_of_one_peer_are_limited_and_in_order() -> None:
    many = tuple(f"10.0.0.{number}" for number in range(200, 0, -1))
    found = discovery._validated(announcement(addresses=many))
    assert found.host_addresses == tuple(f"10.0.0.{number}" for number in range(1, 17))


KEYS = st.sampled_from([b"txtvers", b"id", b"pub", b"pv", b"bus", b"epoch", b"other"])
VALUES = st.none() | st.binary(max_size=30) | st.text("0123456789abcdef", max_size=21).map(str.encode)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(st.dictionaries(KEYS, VALUES), st.integers(0, 0xFFFF), st.lists(st.ip_addresses(v=4).map(str), max_size=40))
def test_nothing_from_the_network_gets_past_its_limits(
    fields: dict[bytes, bytes | None], port: int, addresses: list[str]
) -> None:
    try:
        found = discovery._validated(announcement(txt=fields, port=port, addresses=tuple(addresses)))
    except ValueError:
        return
    assert 0 <= found.origin < 2**64
    assert 1 <= found.inbox_port <= 65535
    assert 1 <= found.pub_port <= 65535
    assert 0 <= found.epoch < 2**64
    assert 1 <= found.version <= 255
    assert 1 <= len(found.host_addresses) <= 16


# --- names and warnings --------------------------------------------------------------------------


@pytest.mark.parametrize("bus", ["default", "b", "Köln Süd", "a" * 63, "é" * 31])
def test_names_a_bus_may_have(bus: str) -> None:
    assert check_bus(bus) == bus


@pytest.mark.parametrize(
    ("bus", "reason"),
    [
        ("", "is 0 bytes long"),
        ("a" * 64, "is 64 bytes long"),
        ("é" * 32, "is 64 bytes long"),
        ("a\nb", "control character"),
        ("a\x7f", "control character"),
        ("a\x85", "control character"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_names_a_bus_may_not_have(bus: str, reason: str) -> None:
    with pytest.raises(SetupError, match=reason):
        check_bus(bus)
    with pytest.raises(SetupError, match=reason):
        make(bus, 1)


def test_warnings_cannot_be_made_into_a_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(clock, "now", lambda: now)
    told: list[str] = []
    warnings = discovery._Warnings(told.append)

    warnings.say("one", "first")
    warnings.say("one", "again")
    assert told == ["mDNS: first"]
    for number in range(10_000):
        warnings.say(f"source {number}", "flood")
    assert len(told) == discovery.WARNINGS_PER_MINUTE

    now = 61.0
    warnings.say("one", "too soon")
    warnings.say("two", "a minute later")
    assert told[-1] == "mDNS: a minute later"
    now = 601.0
    warnings.say("one", "ten minutes later")
    assert told[-1] == "mDNS: ten minutes later"

    while now < 10_000:
        now += 60.0
        for number in range(discovery.WARNINGS_PER_MINUTE):
            warnings.say(f"{now} {number}", "steady")
    assert len(warnings._told_at) <= discovery.WARNED_MAX


def test_a_warning_is_one_printable_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    discovery._Warnings(told.append).say("x", "\x1b[31mred\nline" + "é" * 1000)
    assert told[0].startswith("mDNS: ?[31mred?lineéé")
    assert len(told[0]) == len("mDNS: ") + discovery.WARNING_CHARACTERS_MAX


# --- nodes in processes of their own -------------------------------------------------------------

NODE = """
import asyncio, json, sys
from zmqbus.net.discovery import Discovery

def say(event, **facts):
    print(json.dumps({"event": event} | facts), flush=True)

async def main(bus, origin, addresses):
    node = Discovery(
        bus=bus, origin=origin, inbox_port=10_000 + origin, pub_port=20_000 + origin, epoch=30_000 + origin,
        addresses=addresses,
        on_found=lambda found: say("found", origin=found.origin, found=found),
        on_gone=lambda origin: say("gone", origin=origin),
        on_warning=lambda text: say("warning", text=text),
    )
    await node.start()
    say("started")
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while command := (await commands.readline()).decode().split():
        if command[0] == "refresh":
            await node.refresh()
        elif command[0] == "addresses":
            await node.set_addresses(command[1:])
        elif command[0] == "close":
            await node.close()
        say("done")

asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
"""


class Child:
    """A node in a process of its own, on this machine's loopback or on a host of a Lan."""

    def __init__(self, bus: str, origin: int, addresses: Sequence[str] = LOOPBACK, host: Host | None = None) -> None:
        argv = [sys.executable, "-c", NODE, bus, str(origin), *addresses]
        start = subprocess.Popen if host is None else host.popen
        self._process: subprocess.Popen[str] = start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put(json.loads(line))

    def expect(self, **facts: Any) -> dict[str, Any]:
        """The next event with these facts; what comes before it is dropped."""
        while True:
            event = self._events.get(timeout=PATIENCE_S)
            if facts.items() <= event.items():
                return event

    def tell(self, *command: str) -> None:
        """Have a command executed, to its end."""
        assert self._process.stdin is not None
        print(*command, file=self._process.stdin, flush=True)

    def drain(self) -> list[dict[str, Any]]:
        """All events up to now."""
        events = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._events.get_nowait())
        return events

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


# --- a LAN ---------------------------------------------------------------------------------------


@pytest.mark.netns
def test_two_hosts_find_each_other_and_again_after_the_link_was_down(bus: str) -> None:
    with Lan(hosts=2) as lan:
        a, b = lan.hosts
        with Child(bus, 1, [a.address], a) as one, Child(bus, 2, [b.address], b) as two:
            assert one.expect(event="found", origin=2)["found"] == [2, [b.address], 10_002, 20_002, 30_002, 1]
            two.expect(event="found", origin=1)

            b.link_down()
            two.tell("refresh")  # nobody hears it
            two.expect(event="done")
            b.link_up()
            one.drain()
            two.drain()
            two.tell("refresh")
            one.expect(event="found", origin=2)
            two.expect(event="found", origin=1)


@pytest.mark.netns
def test_nodes_that_started_apart_meet_after_the_partition(bus: str) -> None:
    with Lan(hosts=2) as lan:
        a, b = lan.hosts
        a.block(b)
        with Child(bus, 1, [a.address], a) as one, Child(bus, 2, [b.address], b) as two:
            one.expect(event="started")
            two.expect(event="started")
            a.unblock(b)
            one.tell("refresh")
            two.expect(event="found", origin=1)
            one.expect(event="found", origin=2)


@pytest.mark.netns
def test_a_new_address_replaces_the_old(bus: str) -> None:
    with Lan(hosts=2) as lan:
        a, b = lan.hosts
        with Child(bus, 1, [a.address], a) as one, Child(bus, 2, [b.address], b) as two:
            one.expect(event="found", origin=2)
            two.expect(event="found", origin=1)
            old = b.address
            two.tell("addresses")  # none while DHCP thinks
            two.expect(event="done")
            b.set_address(old, "10.77.0.99")
            two.tell("addresses", b.address)
            two.expect(event="found", origin=1)
            # What was heard less than a second ago is kept beside the new, until the last packet of the announcement.
            while one.expect(event="found", origin=2)["found"][1] != ["10.77.0.99"]:
                pass
            assert [event for event in one.drain() if event["event"] == "gone"] == []


@pytest.mark.netns
def test_closing_without_a_network_ends(bus: str) -> None:
    with Lan(hosts=1) as lan:
        (a,) = lan.hosts
        with Child(bus, 1, [a.address], a) as one:
            one.expect(event="started")
            a.link_down()
            one.tell("refresh")
            one.expect(event="done")
            one.tell("close")
            one.expect(event="done")


# Asks every way for our service type and prints how many answered before its standard input says "enough".
ASKER = """
import socket, struct, sys
source, *targets = sys.argv[1:]
question = struct.pack("!6H", 7, 0, 1, 0, 0, 0) + b"\\7_zmqbus\\4_tcp\\5local\\0" + struct.pack("!2H", 12, 1)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((source, 0))
s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(source))
for target in targets:
    s.sendto(question, (target, 5353))
print("asked", flush=True)
if sys.stdin.readline().strip() == "wait":
    s.settimeout(20)
else:
    s.setblocking(False)
try:
    print("answered by", s.recvfrom(9000)[1][0])
except BlockingIOError:
    print("silence")
"""

# Stands in for avahi: joins the group on the wire, so that the kernel offers its packets to sockets on 0.0.0.0:5353.
BYSTANDER = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
s.bind(("224.0.0.251", 5353))
group = socket.inet_aton("224.0.0.251") + socket.inet_aton(sys.argv[1])
s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
print("joined", flush=True)
while True:
    print("heard", s.recvfrom(9000)[1][0], flush=True)
"""


@pytest.mark.netns
@pytest.mark.parametrize("confined", [True, False])
def test_a_node_on_loopback_answers_nobody_outside(bus: str, confined: bool) -> None:
    with Lan(hosts=2) as lan:
        a, b = lan.hosts
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        bystander = a.popen([sys.executable, "-c", BYSTANDER, a.address], **pipes)
        assert bystander.stdout.readline() == "joined\n"
        with Child(bus, 1, LOOPBACK if confined else [a.address], a) as node:
            node.expect(event="started")
            asker = b.popen([sys.executable, "-c", ASKER, b.address, "224.0.0.251", a.address], **pipes)
            assert asker.stdout.readline() == "asked\n"
            while bystander.stdout.readline() != f"heard {b.address}\n":
                pass
            if confined:
                # By the time it has answered this, it is through with whatever came before.
                near = a.popen([sys.executable, "-c", ASKER, "127.0.0.1", "224.0.0.251"], **pipes)
                assert near.communicate("wait\n", timeout=PATIENCE_S)[0] == "asked\nanswered by 127.0.0.1\n"
                assert asker.communicate("enough\n", timeout=PATIENCE_S)[0] == "silence\n"
            else:
                assert asker.communicate("wait\n", timeout=PATIENCE_S)[0] == f"answered by {a.address}\n"


@pytest.mark.netns
def test_a_node_on_loopback_sends_nothing_outside(bus: str) -> None:
    with Lan(hosts=1) as lan:
        (a,) = lan.hosts
        with Child(bus, 1, LOOPBACK, a) as one, Child(bus, 2, LOOPBACK, a) as two:
            one.expect(event="found", origin=2)
            two.tell("refresh")
            one.expect(event="found", origin=2)
            two.tell("close")
            one.expect(event="gone", origin=2)
        assert a.sent_packets() == 0
        with Child(bus, 3, [a.address], a) as three:  # so much for the counter
            three.expect(event="started")
            three.tell("close")
            three.expect(event="done")
        assert a.sent_packets() > 0


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
