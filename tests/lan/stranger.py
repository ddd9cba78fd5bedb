"""Raw libzmq at the door of a node: `stranger.py PUB INBOX SERVER_PUBLIC CLIENT_PUBLIC CLIENT_SECRET`, keys in Z85.

Dials PUB (as SUB to everything) and INBOX (as DEALER, saying HELLO) once for each way to pretend, until a line comes
on stdin. Then prints, as JSON, for each way how many frames came and how many handshakes succeeded.
"""

from __future__ import annotations

import json
import struct
import sys

import zmq

HELLO = struct.pack("<BBQII", 1, 1, 7, 0, 1) + b"\x80"  # readable enough to be answered by ERROR
POLL_MS = 20


def main(pub: str, inbox: str, server_public: str, client_public: str, client_secret: str) -> None:
    """Try all ways at once."""
    public, secret = zmq.curve_keypair()
    ways: dict[str, tuple[bytes, bytes, bytes] | None] = {
        "nothing": None,
        "a pair of its own": (server_public.encode(), public, secret),
        "a guess at the server": (zmq.curve_keypair()[0], public, secret),
    }
    if client_secret:
        ways["the key"] = (server_public.encode(), client_public.encode(), client_secret.encode())
    context = zmq.Context()
    sockets: list[tuple[str, zmq.Socket[bytes], zmq.Socket[bytes]]] = []
    counts = {f"{role} with {way}": {"frames": 0, "handshakes": 0} for role in ("SUB", "DEALER") for way in ways}
    for way, pair in ways.items():
        for role, kind, endpoint in (("SUB", zmq.SUB, pub), ("DEALER", zmq.DEALER, inbox)):
            socket = context.socket(kind)
            socket.linger = 0
            socket.reconnect_ivl = 50
            if pair is not None:
                socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = pair
            monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            if kind == zmq.SUB:
                socket.subscribe(b"")
            socket.connect(endpoint)
            if kind == zmq.DEALER:
                socket.send(HELLO)
            sockets.append((f"{role} with {way}", socket, monitor))
    poller = zmq.Poller()
    poller.register(sys.stdin, zmq.POLLIN)
    print("knocking", flush=True)
    while sys.stdin.fileno() not in dict(poller.poll(POLL_MS)):
        for name, socket, monitor in sockets:
            while socket.poll(0):
                socket.recv()
                counts[name]["frames"] += 1
            while monitor.poll(0):
                monitor.recv_multipart()
                counts[name]["handshakes"] += 1
    print(json.dumps(counts), flush=True)
    for _, socket, _ in sockets:
        socket.disable_monitor()
    context.destroy(linger=0)


if __name__ == "__main__":
    main(*sys.argv[1:6])
