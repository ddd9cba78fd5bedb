"""The socket factory: who may bind and connect where, what every socket is born with, and what libzmq then does."""

import ast
import contextlib
import os
import re
import socket as plain_socket
import struct
from pathlib import Path

import pytest
import zmq
from hypothesis import example, given
from hypothesis import strategies as st

import zmqbus
from zmqbus.errors import AuthError, SetupError
from zmqbus.net import sockets
from zmqbus.net.keys import BusKey
from zmqbus.net.sockets import SocketFactory, parse_endpoint, parse_monitor

KEY = BusKey(bytes(range(32)))
PATIENCE_MS = 10_000  # how long a test waits for a condition before it fails; never reached in good health
ROLES = {
    "pub": lambda factory: factory.pub(1000),
    "router": lambda factory: factory.router(),
    "dealer": lambda factory: factory.dealer(),
    "sub": lambda factory: factory.sub(1000),
}


class KeepingFactory(SocketFactory):
    """Keeps its sockets alive until `close`: a forgotten one is a ResourceWarning, and so a failed test."""

    def _socket(self, *args):
        self.__dict__.setdefault("kept", []).append(socket := super()._socket(*args))
        return socket

    def _monitor(self, *args):
        self.kept.append(monitor := super()._monitor(*args))
        return monitor


@pytest.fixture(params=[None, KEY], ids=["no key", "key"])
def factory(request):
    factory = KeepingFactory(request.param)
    yield factory
    factory.close()


@pytest.fixture
def open_factory():
    factory = KeepingFactory(None)
    yield factory
    factory.close()


@pytest.fixture
def secure_factory():
    factory = KeepingFactory(KEY)
    yield factory
    factory.close()


def admit_everybody(factory):
    """A stand-in for the ZAP handler where the handler is not what is tested. `step()` answers what waits."""
    zap = factory.router()
    factory.bind_inproc(zap, "zeromq.zap.01")

    def step(*_):
        while zap.poll(0):
            identity, _, version, request_id, *_ = zap.recv_multipart()
            zap.send_multipart([identity, b"", version, request_id, b"200", b"", b"", b""])

    return step


def receive(socket, step=lambda: None):
    """The next message, answering ZAP meanwhile."""
    for _ in range(PATIENCE_MS // 10):
        step()
        if socket.poll(10):
            return socket.recv_multipart()
    raise AssertionError("nothing came")


def writable(socket, step=lambda: None):
    for _ in range(PATIENCE_MS // 10):
        step()
        if socket.poll(10, zmq.POLLOUT):
            return
    raise AssertionError("never became writable")


# --- who may go where --------------------------------------------------------------------------


NOT_SOCKETS = {
    "factory",
    "feed",
    "heartbeats",
    "intake",
    "peering",
    "self",
}  # whose `bind` or `connect` is our own, and ends in the factory's


def test_nothing_else_binds_or_connects():
    """Rule 1: whatever binds or connects goes through the factory, and nobody else makes contexts."""
    package = Path(zmqbus.__file__).parent
    offenders = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name in ("net/sockets.py", "net/interfaces.py"):  # the latter asks the kernel for a route, by plain UDP
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            through = ast.unparse(node.func.value).split(".")[-1].strip("_") in NOT_SOCKETS
            made = ast.unparse(node.func).startswith(("zmq.Context", "zmq.asyncio", "zmq.Socket"))
            if made or (node.func.attr in ("bind", "connect") and not through):
                offenders.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert offenders == []
    assert "zmq" not in (package / "net" / "interfaces.py").read_text().replace("zmqbus", "")


FOREIGN = ["192.168.1.5", "0.0.0.0", "8.8.8.8", "128.0.0.1", "126.255.255.255", "example.org", "127.0.0.1.evil.org"]


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("role", ["pub", "router"])
def test_without_a_key_binding_beyond_loopback_is_refused(open_factory, role, host):
    socket = ROLES[role](open_factory)
    with pytest.raises(AuthError, match=r"without a bus key zmqbus stays on this machine: .*--key-file/key="):
        open_factory.bind(socket, host)
    assert socket.getsockopt(zmq.LAST_ENDPOINT).strip(b"\0") == b""


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("role", ["dealer", "sub"])
def test_without_a_key_connecting_beyond_loopback_is_refused(open_factory, role, host):
    socket = ROLES[role](open_factory)
    with pytest.raises(AuthError, match=r"without a bus key zmqbus stays on this machine: .*'zmqbus keygen FILE'"):
        open_factory.connect(socket, f"tcp://{host}:5555")
    assert socket.getsockopt(zmq.LAST_ENDPOINT).strip(b"\0") == b""


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "127.255.255.254", "localhost", "LocalHost"])
def test_loopback_is_open_without_a_key(open_factory, host):
    endpoint = open_factory.bind(open_factory.router(), host)
    shown, port = parse_endpoint(endpoint)
    assert shown == ("127.0.0.1" if host.lower() == "localhost" else host)
    assert port > 0
    dealer = open_factory.dealer()
    open_factory.connect(dealer, f"tcp://{host}:{port}")
    writable(dealer)


def test_with_a_key_every_interface_may_be_bound(secure_factory):
    endpoint = secure_factory.bind(secure_factory.router(), "0.0.0.0")  # CURVE, and nobody knows of it
    assert re.fullmatch(r"tcp://0\.0\.0\.0:\d+", endpoint)


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "127.0.0.1:5555",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:99999999",
        "tcp://127.0.0.1:+5",
        "tcp://127.0.0.1:\u0665",
        "tcp://127.0.0.1:5555\n",
        "tcp://127.0.0.1:5555/x",
        "tcp://:5555",
        "tcp://*:5555",
        "tcp://127.0.0.1;10.0.0.1:5555",
        "tcp://127.0.0.1:0;10.0.0.1:5555",
        "tcp://[::1]:5555",
        "tcp://::1:5555",
        "tcp://127.1:5555",
        "tcp://0x7f000001:5555",
        "tcp://2130706433:5555",
        "tcp://127.0.0.01:5555",
        "tcp://256.0.0.1:5555",
        "tcp://a b:5555",
        "tcp://a..b:5555",
        "tcp://" + "a" * 64 + ":5555",
        "ipc:///tmp/x",
        "udp://127.0.0.1:5555",
        "pgm://eth0;239.0.0.1:5555",
        "TCP://127.0.0.1:5555",
    ],
)
def test_malformed_endpoints_are_refused(factory, endpoint):
    with pytest.raises(SetupError, match=r"bad (endpoint|host)"):
        factory.connect(factory.dealer(), endpoint)
    with pytest.raises(SetupError, match=r"bad (endpoint|host)"):
        factory.disconnect(factory.dealer(), endpoint)


@given(st.text(alphabet="tcp:/127.0;localhost@[]*#? \n\0aZ_-", max_size=40).map(lambda text: "tcp://" + text))
@example("tcp://127.0.0.1:1")
@example("tcp://localhost:65535")
def test_any_text_is_an_endpoint_or_a_setup_error(text):
    try:
        host, port = parse_endpoint(text)
    except SetupError:
        return
    assert re.fullmatch(r"[A-Za-z0-9._-]+", host)
    assert 1 <= port <= 65535


def test_host_names_need_a_key(open_factory, secure_factory):
    with pytest.raises(AuthError, match="is not on this machine"):
        open_factory.connect(open_factory.sub(10), "tcp://web1.invalid:5555")
    assert parse_endpoint("tcp://web1.lan-2.example:5555") == ("web1.lan-2.example", 5555)
    with pytest.raises(SetupError, match="IPv4 addresses"):
        secure_factory.bind(secure_factory.router(), "web1.invalid")


def test_port_in_use_is_named(factory):
    endpoint = factory.bind(factory.router(), "127.0.0.1")
    port = parse_endpoint(endpoint)[1]
    with pytest.raises(SetupError, match=rf"port {port} on 127\.0\.0\.1 is in use"):
        factory.bind(factory.router(), "127.0.0.1", port)


def test_an_address_that_is_not_ours(secure_factory):
    with pytest.raises(SetupError, match=r"192\.0\.2\.77 is not an address of this machine"):
        secure_factory.bind(secure_factory.router(), "192.0.2.77")


@pytest.mark.parametrize("port", [-1, 65536])
def test_ports_out_of_range(factory, port):
    with pytest.raises(SetupError, match=r"0 \(any free one\) to 65535"):
        factory.bind(factory.router(), "127.0.0.1", port)


def test_inproc_name_taken(factory):
    factory.bind_inproc(factory.pub(1), "here")
    with pytest.raises(SetupError, match="inproc://here"):
        factory.bind_inproc(factory.pub(1), "here")


def test_factories_do_not_share_inproc_names():
    one, other = KeepingFactory(KEY), KeepingFactory(KEY)
    assert one.bind_inproc(one.router(), "zeromq.zap.01") == other.bind_inproc(other.router(), "zeromq.zap.01")
    one.close()
    other.close()


# --- what every socket is born with ------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_limits_of_every_socket(factory, role):
    socket = ROLES[role](factory)
    limits = {
        zmq.LINGER: 0,
        zmq.IPV6: 0,
        zmq.HANDSHAKE_IVL: 3000,
        zmq.CONNECT_TIMEOUT: 2000,
        zmq.TCP_MAXRT: 15000,
        zmq.TCP_KEEPALIVE: 1,
        zmq.TCP_KEEPALIVE_IDLE: 5,
        zmq.TCP_KEEPALIVE_INTVL: 3,
        zmq.RECONNECT_IVL_MAX: 0,  # else libzmq would not spread reconnects
        zmq.HEARTBEAT_IVL: 0,  # see the top of sockets.py
        zmq.MAXMSGSIZE: 64 * 1024 if role == "pub" else (64 << 20) + (64 << 10),
    }
    assert {option: socket.getsockopt(option) for option in limits} == limits
    assert 100 <= socket.getsockopt(zmq.RECONNECT_IVL) <= 200


def test_high_water_marks(factory):
    def marks(socket):
        return socket.getsockopt(zmq.SNDHWM), socket.getsockopt(zmq.RCVHWM)

    assert marks(factory.pub(123)) == (123, sockets.SUBSCRIPTIONS_WAITING_MAX)
    assert marks(factory.sub(77)) == (0, 77)
    assert marks(factory.router()) == marks(factory.dealer()) == (1000, 1000)
    assert marks(factory.router(frames_max=5)) == marks(factory.dealer(frames_max=5)) == (5, 5)
    assert factory.dealer().getsockopt(zmq.IMMEDIATE) == 1


def test_inbox_may_be_narrower_but_not_wider():
    factory = KeepingFactory(None, frame_bytes_max=1000)
    assert factory.router().getsockopt(zmq.MAXMSGSIZE) == 1000
    assert factory.router(frame_bytes_max=10).getsockopt(zmq.MAXMSGSIZE) == 10
    assert factory.router(frame_bytes_max=10_000).getsockopt(zmq.MAXMSGSIZE) == 1000
    factory.close()


@pytest.mark.parametrize("role", ROLES)
def test_mechanism(open_factory, secure_factory, role):
    assert ROLES[role](open_factory).getsockopt(zmq.MECHANISM) == zmq.NULL
    socket = ROLES[role](secure_factory)
    assert socket.getsockopt(zmq.MECHANISM) == zmq.CURVE
    if role in ("pub", "router"):
        assert socket.getsockopt(zmq.CURVE_SERVER) == 1
        assert socket.getsockopt(zmq.ZAP_DOMAIN).strip(b"\0") == b"zmqbus"
        assert socket.getsockopt(zmq.ZAP_ENFORCE_DOMAIN) == 1


@pytest.mark.parametrize(
    ("option", "value"), [(zmq.ZAP_DOMAIN, b"other"), (zmq.ZAP_ENFORCE_DOMAIN, 0), (zmq.CURVE_SERVER, 0)]
)
@pytest.mark.parametrize("role", ["pub", "router"])
def test_a_weakened_server_is_not_bound(secure_factory, role, option, value):
    socket = ROLES[role](secure_factory)
    socket.setsockopt(option, value)
    with pytest.raises(AuthError, match="not protected by CURVE"):
        secure_factory.bind(socket, "127.0.0.1")


def test_sockets_made_elsewhere_are_not_used(secure_factory, open_factory):
    with pytest.raises(AuthError, match="not protected by CURVE"):
        secure_factory.bind(open_factory.router(), "127.0.0.1")
    with pytest.raises(AuthError, match="not protected by CURVE"):
        secure_factory.connect(open_factory.dealer(), "tcp://127.0.0.1:5555")
    with pytest.raises(AuthError, match="not protected by CURVE"):
        secure_factory.bind(secure_factory.dealer(), "127.0.0.1")


# --- what libzmq then does ---------------------------------------------------------------------


def test_inproc_works_under_both_policies(factory):
    pub, sub = factory.pub(10), factory.sub(10)
    factory.connect(sub, factory.bind_inproc(pub, "own-pub"))
    sub.setsockopt(zmq.SUBSCRIBE, b"topic")
    for _ in range(PATIENCE_MS // 10):
        pub.send(b"topic\0value")
        if sub.poll(10):
            break
    assert sub.recv() == b"topic\0value"


def test_one_pub_serves_tcp_and_inproc(factory):
    step = admit_everybody(factory)
    pub, near, far = factory.pub(1000), factory.sub(1000), factory.sub(1000)
    factory.connect(far, factory.bind(pub, "127.0.0.1"))
    factory.connect(near, factory.bind_inproc(pub, "own-pub"))
    for sub in (near, far):
        sub.setsockopt(zmq.SUBSCRIBE, b"")
    missing = {near, far}
    for _ in range(PATIENCE_MS // 10):
        step()
        pub.send(b"hello", zmq.NOBLOCK)
        missing -= {sub for sub in missing if sub.poll(5)}
        if not missing:
            break
    assert missing == set()


def test_pub_at_its_mark_raises_and_sends_to_nobody(open_factory):
    pub, slow, quick = open_factory.pub(5), open_factory.sub(5), open_factory.sub(1000)
    endpoint = open_factory.bind_inproc(pub, "pub")
    for sub in (slow, quick):
        open_factory.connect(sub, endpoint)
        sub.setsockopt(zmq.SUBSCRIBE, b"")
    sent = 0
    while sent < 10_000:
        try:
            pub.send(b"%d" % sent, zmq.NOBLOCK)
        except zmq.Again:
            break
        sent += 1
    assert sent == 10  # by inproc the two marks add up
    assert [quick.recv() for _ in range(sent)] == [b"%d" % number for number in range(sent)]
    assert not quick.poll(0)
    assert [slow.recv() for _ in range(sent)] == [b"%d" % number for number in range(sent)]


def test_thousands_of_subscriptions_reach_an_idle_pub(open_factory):
    """libzmq's defaults lose every one beyond 1000 at the SUB, or leave them waiting at the PUB."""
    pub, sub = open_factory.pub(100_000), open_factory.sub(100_000)
    open_factory.connect(sub, open_factory.bind(pub, "127.0.0.1"))
    for number in range(5000):
        sub.setsockopt(zmq.SUBSCRIBE, b"t%d\0" % number)
    sub.setsockopt(zmq.SUBSCRIBE, b"last\0")
    for _ in range(PATIENCE_MS // 10):
        pub.send(b"last\0")
        if sub.poll(10):
            break
    for number in range(0, 5000, 100):
        pub.send(b"t%d\0" % number)
    pub.send(b"last\0end")
    seen = set()
    while (frame := receive(sub)[0]) != b"last\0end":
        seen.add(frame)
    assert seen >= {b"t%d\0" % number for number in range(0, 5000, 100)}


def test_router_tells_when_a_peer_is_not_there(factory):
    router = factory.router()
    factory.bind(router, "127.0.0.1")
    with pytest.raises(zmq.ZMQError) as refused:
        router.send_multipart([b"nobody", b"x"])
    assert refused.value.errno == zmq.EHOSTUNREACH


def test_dealer_holds_nothing_for_a_peer_that_is_away(open_factory):
    """IMMEDIATE: refused before the handshake, refused after the break, nothing stale afterwards."""
    router, dealer = open_factory.router(), open_factory.dealer()
    with plain_socket.socket() as mute:  # accepts, but never shakes hands
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        open_factory.connect(dealer, f"tcp://127.0.0.1:{mute.getsockname()[1]}")
        accepted, _ = mute.accept()
        with pytest.raises(zmq.Again):
            dealer.send(b"too early", zmq.NOBLOCK)
        accepted.close()
    dealer.close()

    dealer = open_factory.dealer()
    endpoint = open_factory.bind(router, "127.0.0.1")
    open_factory.connect(dealer, endpoint)
    writable(dealer)
    dealer.send(b"before")
    assert receive(router)[1] == b"before"
    router.close()
    for _ in range(PATIENCE_MS // 10):
        if not dealer.poll(0, zmq.POLLOUT):
            break
        dealer.poll(1)
    with pytest.raises(zmq.Again):
        dealer.send(b"while away", zmq.NOBLOCK)

    router = open_factory.router()
    rebind(open_factory, router, endpoint)
    writable(dealer)
    dealer.send(b"after")
    assert receive(router)[1] == b"after"


def test_oversized_frames_cut_the_connection():
    factory = KeepingFactory(None, frame_bytes_max=100_000)
    router = factory.router()
    endpoint = factory.bind(router, "127.0.0.1")
    dealer = factory.dealer()
    factory.connect(dealer, endpoint)
    writable(dealer)
    dealer.send(bytes(100_000))
    assert len(receive(router)[1]) == 100_000
    factory.kept.append(monitor := dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED))
    dealer.send(bytes(100_001))
    assert [parse_monitor(receive(monitor))[0] for _ in range(2)] == ["DISCONNECTED", "HANDSHAKE_SUCCEEDED"]
    dealer.disable_monitor()
    writable(dealer)  # dialled anew
    dealer.send(b"small")
    assert receive(router)[1] == b"small"
    factory.close()


def test_largest_message_passes_under_curve(secure_factory):
    """64 MiB of value, its envelope, and CURVE's own wrapping fit below MAXMSGSIZE."""
    step = admit_everybody(secure_factory)
    router, dealer = secure_factory.router(), secure_factory.dealer()
    secure_factory.connect(dealer, secure_factory.bind(router, "127.0.0.1"))
    writable(dealer, step)
    dealer.send(bytes(64 * 1024 * 1024 + 60 * 1024))
    assert len(receive(router)[1]) == 64 * 1024 * 1024 + 60 * 1024


def test_disconnect_tolerates_what_is_not_connected(factory):
    dealer = factory.dealer()
    factory.disconnect(dealer, "tcp://127.0.0.1:5555")
    factory.disconnect(dealer, "inproc://nobody")
    factory.connect(dealer, "tcp://localhost:5555")
    factory.disconnect(dealer, "tcp://127.0.0.1:5555")
    factory.disconnect(dealer, "tcp://127.0.0.1:5555")


# --- monitors and the end ----------------------------------------------------------------------


def test_monitor_is_silent_about_all_but_failures(open_factory):
    dealer = open_factory.dealer()
    monitor = open_factory.handshake_monitor(dealer)
    router = open_factory.router()
    open_factory.connect(dealer, open_factory.bind(router, "127.0.0.1"))
    writable(dealer)
    dealer.send(b"through")
    receive(router)
    assert not monitor.poll(0)
    open_factory.close_monitored(dealer, monitor)


def verdict(monitor):
    """The first event that is final. The server may hang up before the client has read why: then it dials anew."""
    while (event := parse_monitor(receive(monitor)))[0] == "HANDSHAKE_FAILED_NO_DETAIL":
        pass
    return event


def test_monitor_tells_of_a_mechanism_mismatch(open_factory, secure_factory):
    endpoint = secure_factory.bind(secure_factory.router(), "127.0.0.1")
    dealer = open_factory.dealer()
    monitor = open_factory.handshake_monitor(dealer)
    open_factory.connect(dealer, endpoint)
    name, where, value = verdict(monitor)
    assert (name, where) == ("HANDSHAKE_FAILED_PROTOCOL", endpoint)
    assert value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
    open_factory.close_monitored(dealer, monitor)


def test_disconnect_and_connect_revive_a_refused_client(open_factory, secure_factory):
    """After a refusal libzmq never dials again by itself; this is the cure."""
    refusing = secure_factory.router()
    endpoint = secure_factory.bind(refusing, "127.0.0.1")
    dealer = open_factory.dealer()
    monitor = open_factory.handshake_monitor(dealer)
    open_factory.connect(dealer, endpoint)
    assert verdict(monitor)[0] == "HANDSHAKE_FAILED_PROTOCOL"
    refusing.close()

    welcoming = open_factory.router()
    rebind(open_factory, welcoming, endpoint)
    open_factory.disconnect(dealer, endpoint)
    open_factory.connect(dealer, endpoint)
    writable(dealer)
    open_factory.close_monitored(dealer, monitor)


def rebind(factory, socket, endpoint):
    """Bind to an endpoint whose last socket is still being closed by its I/O thread."""
    for _ in range(1000):
        try:
            factory.bind(socket, *parse_endpoint(endpoint))
        except SetupError:
            socket.poll(1)
        else:
            return
    raise AssertionError(f"{endpoint} is not freed")


def test_parse_monitor_pins_libzmqs_layout():
    assert parse_monitor([struct.pack("=HI", 0x4000, 400), b"tcp://1.2.3.4:5"]) == (
        "HANDSHAKE_FAILED_AUTH",
        "tcp://1.2.3.4:5",
        400,
    )
    for frames in ([], [b"123456"], [b"12345", b""], [b"123456", b"", b""]):
        with pytest.raises(ValueError, match="not a monitor's message"):
            parse_monitor(frames)


def test_close_ends_everything_at_once_and_twice(factory):
    """Unsent messages, an unread monitor, open sockets: none of them holds the end up (the test would time out)."""
    dealer = factory.dealer()
    factory.handshake_monitor(dealer)
    pub = factory.pub(10)
    factory.bind(pub, "127.0.0.1")
    sub = factory.sub(10)
    factory.connect(sub, "tcp://127.0.0.1:9")
    sub.setsockopt(zmq.SUBSCRIBE, b"unsent")
    factory.close()
    assert dealer.closed
    assert pub.closed
    assert sub.closed
    factory.close()


def test_a_monitored_socket_may_linger(open_factory):
    """A last word, said while closing, arrives."""
    router, dealer = open_factory.router(), open_factory.dealer()
    monitor = open_factory.handshake_monitor(dealer)
    open_factory.connect(dealer, open_factory.bind(router, "127.0.0.1"))
    writable(dealer)
    for _ in range(500):
        dealer.send(bytes(10_000), zmq.NOBLOCK)
    open_factory.close_monitored(dealer, monitor, linger_ms=PATIENCE_MS)
    assert [len(receive(router)[1]) for _ in range(500)] == [10_000] * 500


def test_close_in_a_forked_child_leaves_the_parent_alone(open_factory):
    router, dealer = open_factory.router(), open_factory.dealer()
    open_factory.connect(dealer, open_factory.bind(router, "127.0.0.1"))
    writable(dealer)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(AttributeError):
            open_factory._context = None  # what close would have to touch
            open_factory.close()
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    dealer.send(b"still here")
    assert receive(router)[1] == b"still here"
