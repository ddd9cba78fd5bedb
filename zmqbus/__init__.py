"""Brokerless messaging for Python programs on a LAN, over ZeroMQ.

with zmqbus.Node("web1") as node:
    node.publish("logs.web1.nginx", {"status": 200})
    for message in node.subscribe("logs.>"):
        print(message.topic, message.value)
"""

from zmqbus.errors import (
    AuthError,
    DecodeError,
    ForkedProcess,
    GapError,
    KeyFileError,
    MessageTooLarge,
    NodeClosed,
    RemoteProtocolError,
    SetupError,
    TooManyStreams,
    TopicError,
    UnsupportedValue,
    WaitTimeout,
    ZmqbusError,
)
from zmqbus.net.keys import BusKey
from zmqbus.node import RELEASE as __version__
from zmqbus.node.aio import AsyncEventStream, AsyncNode, AsyncPublisher, AsyncSubscription
from zmqbus.node.events import Event, EventStream, Undelivered, Warned
from zmqbus.node.node import Node, Subscription
from zmqbus.node.publishing import Publisher
from zmqbus.protocol.message import Message
from zmqbus.protocol.peers import DuplicateName, Peer, PeerJoined, PeerLeft
from zmqbus.protocol.tracking import Gap

__all__ = [
    "AsyncEventStream",
    "AsyncNode",
    "AsyncPublisher",
    "AsyncSubscription",
    "AuthError",
    "BusKey",
    "DecodeError",
    "DuplicateName",
    "Event",
    "EventStream",
    "ForkedProcess",
    "Gap",
    "GapError",
    "KeyFileError",
    "Message",
    "MessageTooLarge",
    "Node",
    "NodeClosed",
    "Peer",
    "PeerJoined",
    "PeerLeft",
    "Publisher",
    "RemoteProtocolError",
    "SetupError",
    "Subscription",
    "TooManyStreams",
    "TopicError",
    "Undelivered",
    "UnsupportedValue",
    "WaitTimeout",
    "Warned",
    "ZmqbusError",
    "__version__",
]
