"""Strangers stay out, whatever state the ZAP handler is in; members get in; the self-test knows the difference.

The strangers here are plain pyzmq sockets in a context of their own: they share no code with what keeps them out.
"""

import asyncio
import contextlib
import functools
from contextlib import closing

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from zmqbus.errors import AuthError, SetupError
from zmqbus.net import zap
from zmqbus.net.keys import BusKey
from zmqbus.net.sockets import SocketFactory, parse_monitor
from zmqbus.net.zap import ZapHandler, answer, strangers_are_refused

KEY = BusKey(bytes(range(32)))
OTHER_KEY = BusKey(bytes(range(1, 33)))
MEMBER = z85.decode(KEY.client.public)
PATIENCE_S = 10.0  # how long a test waits for a condition before it fails; never reached in good health
SHORT_HANDSHAKE_MS = 150  # where a test must see a handshake time out

HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
)


def on_loop(test):
    """Run an `async def` test on a loop of its own."""

    @functools.wraps(test)
    def run(**fixtures):
        asyncio.run(test(**fixtures))

    return run


async def until(condition):
    """Wait for a condition, leaving the loop to the handler meanwhile."""
    async with asyncio.timeout(PATIENCE_S):
        while not (found := condition()):
            await asyncio.sleep(0.001)
    return found


# --- the decision ------------------------------------------------------------------------------

REQUEST = [b"peer", b"", b"1.0", b"7", b"zmqbus", b"127.0.0.1", b"", b"CURVE", MEMBER]


def changed(at, value):
    return [*REQUEST[:at], value, *REQUEST[at + 1 :]]


def test_a_member_is_admitted_under_its_user_id():
    assert answer(REQUEST, MEMBER) == [b"peer", b"", b"1.0", b"7", b"200", b"OK", b"member", b""]


@pytest.mark.parametrize(
    "request_",
    [
        changed(4, b""),
        changed(4, b"other"),
        changed(7, b"NULL"),
        changed(7, b"PLAIN"),
        changed(7, b"curve"),
        changed(8, z85.decode(OTHER_KEY.client.public)),
        changed(8, z85.decode(KEY.server.public)),
        changed(8, MEMBER[:-1]),
        changed(8, MEMBER + b"\0"),
        changed(8, KEY.client.public),
        changed(8, b""),
        REQUEST[:8],
        [*REQUEST, b"more"],
        [*REQUEST, MEMBER],
    ],
)
def test_others_are_refused(request_):
    identity, _, version, request_id, status, _, user_id, metadata = answer(request_, MEMBER)
    assert (identity, version, request_id, status) == (b"peer", b"1.0", b"7", b"400")
    assert user_id == metadata == b""


@pytest.mark.parametrize(
    "request_", [[], *(REQUEST[:length] for length in range(1, 8)), changed(1, b"x"), changed(2, b"2.0")]
)
def test_malformed_requests_are_answered(request_):
    reply = answer(request_, MEMBER)
    assert len(reply) == 8
    assert reply[4] == b"500"


@given(st.lists(st.one_of(st.sampled_from(REQUEST), st.binary(max_size=40)), max_size=12))
def test_nothing_raises_and_nothing_but_a_member_is_admitted(request_):
    reply = answer(request_, MEMBER)
    assert len(reply) == 8
    if reply[4] == b"200":
        assert [request_[at] for at in (1, 2, 4, 7, 8)] == [REQUEST[at] for at in (1, 2, 4, 7, 8)]
        assert len(request_) == 9


# --- over TCP ----------------------------------------------------------------------------------


class House:
    """A node's lower half: factory, handler, and one bound socket."""

    def __init__(self, role, handler, key=KEY, handshake_ms=SHORT_HANDSHAKE_MS):
        loop = asyncio.get_running_loop()
        self.reports = []
        loop.set_exception_handler(lambda _, context: self.reports.append(str(context["exception"])))
        self.factory = SocketFactory(key)
        self.handler = None if handler == "never made" else ZapHandler(self.factory, key, loop)
        if handler == "stopped":
            self.handler.close()
        elif handler == "stalled":
            self.handler._watch.close()  # bound, but nobody reads: a loop that hangs
        self.socket = self.factory.router() if role == "inbox" else self.factory.pub(1000)
        if handler in ("stopped", "stalled", "crashed"):  # just stopped, too, may leave one newcomer hanging
            self.socket.setsockopt(zmq.HANDSHAKE_IVL, handshake_ms)
        self.endpoint = self.factory.bind(self.socket, "127.0.0.1")

    def close(self):
        if self.handler is not None:
            self.handler.close()
        self.factory.close()


class Caller:
    """Somebody who dials with plain pyzmq. `server` is the public server key it believes in, if it does CURVE."""

    def __init__(self, role, endpoint, *, pair=None, server=None, plain=False):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER if role == "inbox" else zmq.SUB)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 10)
        if role == "pub":
            self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        if pair is not None:
            self.socket.setsockopt(zmq.CURVE_SERVERKEY, server)
            self.socket.setsockopt(zmq.CURVE_PUBLICKEY, pair[0])
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, pair[1])
        if plain:
            self.socket.setsockopt(zmq.PLAIN_USERNAME, b"admin")
            self.socket.setsockopt(zmq.PLAIN_PASSWORD, b"admin")
        self.socket.monitor("inproc://monitor", HANDSHAKES)
        self.monitor = self.context.socket(zmq.PAIR)
        self.monitor.connect("inproc://monitor")
        self.socket.connect(endpoint)
        if role == "inbox":
            with contextlib.suppress(zmq.Again):  # refused for good already: then there is no pipe to send into
                self.socket.send(b"let me in", zmq.NOBLOCK)

    async def event(self):
        await until(lambda: self.monitor.poll(0))
        return parse_monitor(self.monitor.recv_multipart())

    async def verdict(self):
        """The first event that is final: a handshake that broke off or timed out (…_NO_DETAIL) is tried anew."""
        while (name := (await self.event())[0]) == "HANDSHAKE_FAILED_NO_DETAIL":
            pass
        return name

    def close(self):
        self.socket.disable_monitor()
        self.context.destroy(linger=0)


def member(key=KEY):
    return {"pair": (key.client.public, key.client.secret), "server": key.server.public}


STRANGERS = {
    "CURVE, knows our public server key": lambda: {"pair": zmq.curve_keypair(), "server": KEY.server.public},
    "CURVE, member of another bus": lambda: member(OTHER_KEY),
    "CURVE, another bus's pair for our server": lambda: {**member(OTHER_KEY), "server": KEY.server.public},
    "CURVE, our public client key without its secret": lambda: {
        "pair": (KEY.client.public, zmq.curve_keypair()[1]),
        "server": KEY.server.public,
    },
    "NULL": dict,
    "PLAIN": lambda: {"plain": True},
}
HANDLERS = ["running", "stopped", "never made", "stalled", "crashed"]


@contextlib.asynccontextmanager
async def house_and_caller(role, handler, credentials, **options):
    house = House(role, handler, **options)
    caller = Caller(role, house.endpoint, **credentials)
    try:
        yield house, caller
    finally:
        caller.close()
        house.close()


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("role", ["inbox", "pub"])
@on_loop
async def test_strangers_stay_out(role, handler, stranger, monkeypatch):
    if handler == "crashed":
        monkeypatch.setattr(zap, "answer", crash)
    async with house_and_caller(role, handler, STRANGERS[stranger]()) as (house, caller):
        events = [(await caller.event())[0]]
        while events[-1] == "HANDSHAKE_FAILED_NO_DETAIL" and len(events) < 3:
            events.append((await caller.event())[0])  # it dials anew: its second and third try fail as well
        assert set(events) <= {
            "HANDSHAKE_FAILED_NO_DETAIL",
            "HANDSHAKE_FAILED_PROTOCOL",
            "HANDSHAKE_FAILED_AUTH",
        }
        if role == "inbox":
            assert not house.socket.poll(0)
        else:
            house.socket.send(b"secret")
            assert not caller.socket.poll(10)
        if house.handler is not None:
            assert house.handler.statistics()["admitted"] == 0


def crash(*_):
    raise RuntimeError("a bug of ours")


@pytest.mark.parametrize("handler", ["stopped", "never made", "stalled", "crashed"])
@pytest.mark.parametrize("role", ["inbox", "pub"])
@on_loop
async def test_without_a_working_handler_members_stay_out_too(role, handler, monkeypatch):
    if handler == "crashed":
        monkeypatch.setattr(zap, "answer", crash)
    async with house_and_caller(role, handler, member()) as (house, caller):
        assert (await caller.event())[0] == "HANDSHAKE_FAILED_NO_DETAIL"
        if handler == "crashed":
            await until(lambda: house.reports)
            assert house.handler.statistics()["failed"] >= 1


@pytest.mark.parametrize("role", ["inbox", "pub"])
@on_loop
async def test_members_get_in(role):
    async with house_and_caller(role, "running", member()) as (house, caller):
        assert await caller.verdict() == "HANDSHAKE_SUCCEEDED"
        if role == "inbox":
            await until(lambda: house.socket.poll(0))
            identity, frame = house.socket.recv_multipart(copy=False)
            assert frame.bytes == b"let me in"
            assert frame.get("User-Id") == "member"
            house.socket.send_multipart([identity.bytes, b"welcome"])
            await until(lambda: caller.socket.poll(0))
            assert caller.socket.recv() == b"welcome"
        else:

            def heard():
                house.socket.send(b"news")
                return caller.socket.poll(1)

            await until(heard)
            assert caller.socket.recv() == b"news"
        assert house.handler.statistics() == {"admitted": 1, "refused": 0, "failed": 0}


@on_loop
async def test_strangers_are_told_and_counted():
    stranger = {"pair": zmq.curve_keypair(), "server": KEY.server.public}
    async with house_and_caller("inbox", "running", stranger) as (house, caller):
        assert await caller.event() == ("HANDSHAKE_FAILED_AUTH", house.endpoint, 400)
        assert house.handler.statistics() == {"admitted": 0, "refused": 1, "failed": 0}


@on_loop
async def test_another_bus_key_shows_as_a_peer_that_hangs_up():
    """The server cannot even read the greeting, and CURVE gives it no way to say so: no …_AUTH, ever."""
    async with house_and_caller("inbox", "running", member(OTHER_KEY)) as (house, caller):
        assert [(await caller.event())[0] for _ in range(3)] == ["HANDSHAKE_FAILED_NO_DETAIL"] * 3
        assert house.handler.statistics() == {"admitted": 0, "refused": 0, "failed": 0}


@on_loop
async def test_members_get_in_once_a_stalled_handler_runs_again():
    async with house_and_caller("inbox", "stalled", member()) as (house, caller):
        assert (await caller.event())[0] == "HANDSHAKE_FAILED_NO_DETAIL"
        assert not house.socket.poll(0)
        house.handler._watch = zap.FdWatch(asyncio.get_running_loop(), house.handler._socket, house.handler._drain)
        assert await caller.verdict() == "HANDSHAKE_SUCCEEDED"
        await until(lambda: house.socket.poll(0))


@on_loop
async def test_one_failure_does_not_shut_the_door(monkeypatch):
    healthy = zap.answer

    def fail_once(*arguments):
        monkeypatch.setattr(zap, "answer", healthy)
        raise RuntimeError("once")

    monkeypatch.setattr(zap, "answer", fail_once)
    async with house_and_caller("inbox", "crashed", member(), handshake_ms=1000) as (house, caller):
        assert await caller.verdict() == "HANDSHAKE_SUCCEEDED"
        assert house.reports == ["once"]
        assert house.handler.statistics() == {"admitted": 1, "refused": 0, "failed": 1}


@on_loop
async def test_living_connections_survive_a_stopped_handler():
    async with house_and_caller("inbox", "running", member()) as (house, caller):
        await until(lambda: house.socket.poll(0))
        house.handler.close()
        house.handler.close()
        house.socket.recv_multipart()
        caller.socket.send(b"still here")
        await until(lambda: house.socket.poll(0))
        assert house.socket.recv_multipart()[1] == b"still here"


@on_loop
async def test_a_crowd_of_malformed_requests_is_answered():
    """More than fit in one turn, by way of inproc: the only way in, and ours alone."""
    count = 3 * zap.REQUESTS_A_TURN
    with closing(House("inbox", "running")) as house, closing(house.factory.dealer()) as asker:
        house.factory.connect(asker, "inproc://zeromq.zap.01")
        for number in range(count):
            asker.send_multipart([b"", b"1.0", b"%d" % number, b"garbage"])
        for number in range(count):
            await until(lambda: asker.poll(0))
            _, _, request_id, status, *_ = asker.recv_multipart()
            assert (request_id, status) == (b"%d" % number, b"500")
        assert house.handler.statistics() == {"admitted": 0, "refused": 0, "failed": count}
        assert house.reports == []


@on_loop
async def test_two_nodes_in_one_process_do_not_meet():
    with closing(House("inbox", "running")) as one, closing(House("inbox", "running", OTHER_KEY)) as other:
        for house, key, wrong_key in ((one, KEY, OTHER_KEY), (other, OTHER_KEY, KEY)):
            with closing(Caller("inbox", house.endpoint, **member(key))) as guest:
                assert await guest.verdict() == "HANDSHAKE_SUCCEEDED"
            with closing(Caller("inbox", house.endpoint, **member(wrong_key))) as stranger:
                assert (await stranger.event())[0] != "HANDSHAKE_SUCCEEDED"
        assert [house.handler.statistics()["admitted"] for house in (one, other)] == [1, 1]


@on_loop
async def test_one_handler_per_context():
    with closing(House("inbox", "running")) as house, pytest.raises(SetupError, match=r"zeromq\.zap\.01"):
        ZapHandler(house.factory, KEY, asyncio.get_running_loop())


# --- the self-test -----------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["inbox", "pub"])
@on_loop
async def test_self_test_passes_on_a_safe_endpoint(role):
    with closing(House(role, "running")) as house:
        await strangers_are_refused(house.factory, KEY, {role: house.endpoint})
        assert house.handler.statistics() == {"admitted": 1, "refused": 1, "failed": 0}  # NULL never gets to ask
        if role == "inbox":
            assert not house.socket.poll(0)  # nothing was sent


class CarelessServer:
    """Rightful key, wrong options: what a node would be without the factory."""

    def __init__(self, *, curve):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        if curve:
            self.socket.setsockopt(zmq.CURVE_SERVER, 1)
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, KEY.server.secret)
        self.socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self.socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()

    def close(self):
        self.context.destroy(linger=0)


@pytest.mark.parametrize(("curve", "who"), [(True, "with a key of its own"), (False, "without a key")])
@on_loop
async def test_self_test_fails_where_strangers_get_in(curve, who):
    with (
        closing(CarelessServer(curve=curve)) as server,
        closing(SocketFactory(KEY)) as factory,
        pytest.raises(AuthError, match=rf"{server.endpoint} failed: a stranger {who} was let in"),
    ):
        await strangers_are_refused(factory, KEY, {"inbox": server.endpoint})


@on_loop
async def test_self_test_fails_where_members_are_refused():
    with closing(House("inbox", "running")) as house:
        house.handler._client_public = z85.decode(OTHER_KEY.client.public)
        with pytest.raises(AuthError, match="a member holding our bus key was refused"):
            await strangers_are_refused(house.factory, KEY, {"inbox": house.endpoint})


@pytest.mark.parametrize("handler", ["stopped", "never made", "stalled"])
@on_loop
async def test_self_test_is_bounded_when_nobody_decides(handler, monkeypatch):
    monkeypatch.setattr(zap, "SELF_TEST_S", 0.5)
    with (
        closing(House("inbox", handler)) as house,
        pytest.raises(AuthError, match="got no verdict on a stranger with"),
    ):
        await strangers_are_refused(house.factory, KEY, {"inbox": house.endpoint})


@on_loop
async def test_self_test_needs_a_key():
    with closing(SocketFactory(None)) as factory, pytest.raises(AuthError, match="without a bus key"):
        await strangers_are_refused(factory, KEY, {"inbox": "tcp://127.0.0.1:5555"})


@on_loop
async def test_self_test_says_at_once_that_loopback_is_down(monkeypatch):
    monkeypatch.setattr(zap, "loopback_is_up", lambda: False)
    with closing(House("inbox", "running")) as house, pytest.raises(SetupError, match="loopback is down"):
        await strangers_are_refused(house.factory, KEY, {"inbox": house.endpoint})


@on_loop
async def test_self_test_of_two_endpoints_names_the_one_that_fails():
    with (
        closing(House("pub", "running")) as house,
        closing(CarelessServer(curve=True)) as server,
        pytest.raises(AuthError, match=rf"{server.endpoint} failed: a stranger with a key of its own was let in"),
    ):
        await strangers_are_refused(house.factory, KEY, {"pub": house.endpoint, "inbox": server.endpoint})
