"""Who may speak CURVE to us: the ZAP handler (ZeroMQ RFC 27), and the self-test that strangers stay out.

libzmq asks, once for every connection to one of our bound sockets, over inproc://zeromq.zap.01 of the node's context;
the connection waits for the answer. Admitted is the client that proved the bus key's `client` secret (CURVE does the
proving) in our domain. Everything else is answered 400, and what cannot be understood 500.

Contract: nothing in here raises because of what a stranger sent, and no failure in here admits anybody: without an
answer of 200 libzmq refuses (sockets.py enforces the domain). A stalled loop only makes newcomers wait: their
handshake times out after 3 s and libzmq dials anew, as it does while no handler is bound. Only a 400 or 500 makes
a client give up (see `SocketFactory.handshake_monitor`).

One node, one context, one handler: several nodes in one process do not meet here.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping, Sequence

import zmq
from zmq.utils import z85

from zmqbus.errors import AuthError, SetupError
from zmqbus.net.adapter import FdWatch
from zmqbus.net.interfaces import loopback_is_up
from zmqbus.net.keys import BusKey, CurvePair
from zmqbus.net.sockets import ZAP_DOMAIN, Role, Socket, SocketFactory, parse_monitor

__all__ = ["USER_ID", "ZapHandler", "strangers_are_refused"]

ZAP_INPROC = "zeromq.zap.01"  # fixed by the RFC
VERSION = b"1.0"
USER_ID = b"member"  # what `frame.get("User-Id")` says of every message from a holder of the bus key
REQUESTS_A_TURN = 64  # a crowd knocking at once must not keep the loop from its other work
SELF_TEST_S = 3.0  # 5 ms in good health; after this a node does not open

Reply = list[bytes]


def answer(request: Sequence[bytes], client_public: bytes) -> Reply:
    """The reply to one ZAP request, both as a ROUTER sees them. Never raises for anything in `request`.

    request: identity | "" | version | request id | domain | address | routing id | mechanism | credentials …
    reply:   identity | "" | version | request id | status | text | user id | metadata

    `client_public` is the one public key that is admitted, as 32 raw bytes.
    """
    identity = request[0] if request else b""
    request_id = request[3] if len(request) > 3 else b""

    def reply(status: bytes, text: bytes, user_id: bytes = b"") -> Reply:
        return [identity, b"", VERSION, request_id, status, text, user_id, b""]

    if len(request) < 8 or request[1] != b"" or request[2] != VERSION:
        return reply(b"500", b"malformed request")
    domain, mechanism, credentials = request[4], request[7], request[8:]
    if domain != ZAP_DOMAIN:
        return reply(b"400", b"unknown domain")
    if mechanism != b"CURVE":
        return reply(b"400", b"CURVE only")
    if len(credentials) != 1 or not hmac.compare_digest(credentials[0], client_public):
        return reply(b"400", b"not a member of this bus")
    return reply(b"200", b"OK", USER_ID)


class ZapHandler:
    """Answers libzmq's question for one node, on its loop. Make it before the first `bind`; close it after the last.

    Raises SetupError when the factory's context has a handler already.
    """

    def __init__(self, factory: SocketFactory, key: BusKey, loop: asyncio.AbstractEventLoop) -> None:
        self._client_public = z85.decode(key.client.public)
        self._admitted = 0
        self._refused = 0
        self._failed = 0
        self._socket = factory.router()
        try:
            factory.bind_inproc(self._socket, ZAP_INPROC)
        except Exception:
            self._socket.close()
            raise
        self._watch = FdWatch(loop, self._socket, self._drain)

    def statistics(self) -> dict[str, int]:
        """Handshakes `admitted`, `refused` (400), and `failed` (500, or an error of ours), since the start."""
        return {"admitted": self._admitted, "refused": self._refused, "failed": self._failed}

    def close(self) -> None:
        """Stop answering: from now on nobody new is admitted. Living connections stay. May be called twice."""
        self._watch.close()
        self._socket.close()

    def _drain(self) -> bool:
        for _ in range(REQUESTS_A_TURN):
            try:
                request = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._serve(request)
        return True

    def _serve(self, request: list[bytes]) -> None:
        try:
            reply = answer(request, self._client_public)
        except Exception:
            self._failed += 1
            raise  # to the loop's exception handler, by way of the watch. Without an answer, libzmq refuses.
        try:
            self._socket.send_multipart(reply, zmq.NOBLOCK)
        except zmq.ZMQError:
            return  # whoever asked has hung up meanwhile
        if reply[4] == b"200":
            self._admitted += 1
        elif reply[4] == b"400":
            self._refused += 1
        else:
            self._failed += 1


async def strangers_are_refused(factory: SocketFactory, key: BusKey, endpoints: Mapping[Role, str]) -> None:
    """Prove, by trying it over TCP, that our own bound `endpoints` admit members and nobody else.

    Three clients dial each, all at once: a stranger without any security, a stranger with a CURVE pair of its own who
    knows our public server key, and a member. The roles say which of our sockets it is: "inbox" (ROUTER), or "pub",
    "tap" and "trail" (PUB). Their ZAP handler must be running, on this loop if it is ours. Takes about 5 ms.

    Raises AuthError when a stranger is let in, when the member is not, or when there is no verdict within 3 s; and
    SetupError when loopback is down, by which even a machine's other addresses reach itself.
    """
    if not loopback_is_up():
        raise SetupError(
            "loopback is down, and without it a node cannot prove that it keeps strangers out (switch it on: ip link "
            "set lo up)"
        )
    callers: tuple[tuple[str, CurvePair | None, bool], ...] = (
        ("a stranger without a key", None, False),
        ("a stranger with a key of its own", CurvePair(*zmq.curve_keypair()), False),
        ("a member", key.client, True),
    )
    probes = {
        asyncio.ensure_future(_verdict(factory, endpoint, role, pair)): (endpoint, who, belongs)
        for role, endpoint in endpoints.items()
        for who, pair, belongs in callers
    }
    try:
        decided, _ = await asyncio.wait(probes, timeout=SELF_TEST_S)
        for probe in filter(decided.__contains__, probes):
            endpoint, who, belongs = probes[probe]
            if (admitted := probe.result()) != belongs:
                done = "was let in" if admitted else "holding our bus key was refused"
                raise AuthError(f"the security self-test of {endpoint} failed: {who} {done}. The node must not be used")
        for endpoint, who, _ in (probes[probe] for probe in probes if probe not in decided):
            raise AuthError(
                f"the security self-test of {endpoint} got no verdict on {who} within {SELF_TEST_S:g} s: "
                "is the event loop blocked, or does another program answer there?"
            )
    finally:
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)  # their sockets are closed when this is over


async def _verdict(factory: SocketFactory, endpoint: str, role: Role, pair: CurvePair | None) -> bool:
    """True when a client with this pair (None: without CURVE) is let in at `endpoint`, False when it is refused."""
    loop = asyncio.get_running_loop()
    verdict: asyncio.Future[bool] = loop.create_future()
    socket, monitor = factory.probe(endpoint, role, pair)
    watch = FdWatch(loop, monitor, lambda: _read_verdict(monitor, verdict))
    try:
        return await verdict
    finally:
        watch.close()
        factory.close_monitored(socket, monitor)


def _read_verdict(monitor: Socket, verdict: asyncio.Future[bool]) -> bool:
    while True:
        try:
            event, _, _ = parse_monitor(monitor.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return False
        # A connection that broke off during the handshake (…_NO_DETAIL) proves nothing: libzmq is dialling again.
        if event != "HANDSHAKE_FAILED_NO_DETAIL" and not verdict.done():
            verdict.set_result(event == "HANDSHAKE_SUCCEEDED")
