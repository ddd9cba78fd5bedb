"""Brokerless messaging for Python programs on a LAN, over ZeroMQ.

with zmqbus.Node("web1") as node:
    node.publish("logs.web1.nginx", {"status": 200})
    for message in node.subscribe("logs.>"):
        print(message.topic, message.value)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zmqbus.node import RELEASE as __version__

if TYPE_CHECKING:
    from zmqbus.errors import (
        AuthError,
        BufferFull,
        DecodeError,
        ForkedProcess,
        GapError,
        JobSettled,
        JournalCorrupt,
        JournalError,
        JournalFailed,
        JournalLocked,
        JournalUnavailable,
        JournalVersion,
        KeyFileError,
        LogGapError,
        LogUnavailable,
        MessageTooLarge,
        NodeClosed,
        NoResponders,
        NoSpace,
        NotDurable,
        NotSettled,
        RemoteError,
        RemoteProtocolError,
        ReplyMismatch,
        RequestTimeout,
        ResponderBusy,
        ResponderLost,
        SetupError,
        SubscriptionTaken,
        TooManyStreams,
        TopicError,
        UnsupportedValue,
        WaitTimeout,
        WrongLoop,
        ZmqbusError,
    )
    from zmqbus.forwarder.forwarder import Forwarder
    from zmqbus.net.keys import BusKey
    from zmqbus.node.events import (
        AsyncEventStream,
        CaughtUp,
        Event,
        EventStream,
        ForwarderDown,
        ForwarderUp,
        JobRefused,
        KeyMismatch,
        LogGap,
        TopicInfo,
        Undelivered,
        Warned,
    )
    from zmqbus.node.faces.aio import AsyncNode, AsyncPublisher
    from zmqbus.node.faces.aio_subscription import AsyncSubscription
    from zmqbus.node.faces.aio_worker import AsyncWorker
    from zmqbus.node.faces.node import Node
    from zmqbus.node.faces.requests.aio import AsyncRequest, AsyncRequests
    from zmqbus.node.faces.requests.sync import Request, Requests
    from zmqbus.node.faces.requests.values import Reply
    from zmqbus.node.faces.subscription import Subscription
    from zmqbus.node.faces.worker import Worker
    from zmqbus.node.publishing.publisher import Publisher
    from zmqbus.node.receiving.replay import Position
    from zmqbus.node.work.queues.job import Job
    from zmqbus.protocol.members.peers import DuplicateName, Peer, PeerJoined, PeerLeft
    from zmqbus.protocol.message import Message
    from zmqbus.protocol.streams.stream import Gap

# Where the names live. They are loaded when first used: `zmqbus --help` needs neither sockets nor mDNS.
_HOMES = {
    "AsyncEventStream": "node.events",
    "AsyncNode": "node.faces.aio",
    "AsyncPublisher": "node.faces.aio",
    "AsyncRequest": "node.faces.requests.aio",
    "AsyncRequests": "node.faces.requests.aio",
    "AsyncSubscription": "node.faces.aio_subscription",
    "AsyncWorker": "node.faces.aio_worker",
    "AuthError": "errors",
    "BufferFull": "errors",
    "BusKey": "net.keys",
    "CaughtUp": "node.events",
    "DecodeError": "errors",
    "DuplicateName": "protocol.members.peers",
    "Event": "node.events",
    "EventStream": "node.events",
    "ForkedProcess": "errors",
    "Forwarder": "forwarder.forwarder",
    "ForwarderDown": "node.events",
    "ForwarderUp": "node.events",
    "Gap": "protocol.streams.stream",
    "GapError": "errors",
    "Job": "node.work.queues.job",
    "JobRefused": "node.events",
    "JobSettled": "errors",
    "JournalCorrupt": "errors",
    "JournalError": "errors",
    "JournalFailed": "errors",
    "JournalLocked": "errors",
    "JournalUnavailable": "errors",
    "JournalVersion": "errors",
    "KeyFileError": "errors",
    "KeyMismatch": "node.events",
    "LogGap": "node.events",
    "LogGapError": "errors",
    "LogUnavailable": "errors",
    "Message": "protocol.message",
    "MessageTooLarge": "errors",
    "NoResponders": "errors",
    "NoSpace": "errors",
    "Node": "node.faces.node",
    "NodeClosed": "errors",
    "NotDurable": "errors",
    "NotSettled": "errors",
    "Peer": "protocol.members.peers",
    "PeerJoined": "protocol.members.peers",
    "PeerLeft": "protocol.members.peers",
    "Position": "node.receiving.replay",
    "Publisher": "node.publishing.publisher",
    "RemoteError": "errors",
    "RemoteProtocolError": "errors",
    "Reply": "node.faces.requests.values",
    "ReplyMismatch": "errors",
    "Request": "node.faces.requests.sync",
    "RequestTimeout": "errors",
    "Requests": "node.faces.requests.sync",
    "ResponderBusy": "errors",
    "ResponderLost": "errors",
    "SetupError": "errors",
    "Subscription": "node.faces.subscription",
    "SubscriptionTaken": "errors",
    "TooManyStreams": "errors",
    "TopicError": "errors",
    "TopicInfo": "node.events",
    "Undelivered": "node.events",
    "UnsupportedValue": "errors",
    "WaitTimeout": "errors",
    "Warned": "node.events",
    "Worker": "node.faces.worker",
    "WrongLoop": "errors",
    "ZmqbusError": "errors",
}

__all__ = [
    "AsyncEventStream",
    "AsyncNode",
    "AsyncPublisher",
    "AsyncRequest",
    "AsyncRequests",
    "AsyncSubscription",
    "AsyncWorker",
    "AuthError",
    "BufferFull",
    "BusKey",
    "CaughtUp",
    "DecodeError",
    "DuplicateName",
    "Event",
    "EventStream",
    "ForkedProcess",
    "Forwarder",
    "ForwarderDown",
    "ForwarderUp",
    "Gap",
    "GapError",
    "Job",
    "JobRefused",
    "JobSettled",
    "JournalCorrupt",
    "JournalError",
    "JournalFailed",
    "JournalLocked",
    "JournalUnavailable",
    "JournalVersion",
    "KeyFileError",
    "KeyMismatch",
    "LogGap",
    "LogGapError",
    "LogUnavailable",
    "Message",
    "MessageTooLarge",
    "NoResponders",
    "NoSpace",
    "Node",
    "NodeClosed",
    "NotDurable",
    "NotSettled",
    "Peer",
    "PeerJoined",
    "PeerLeft",
    "Position",
    "Publisher",
    "RemoteError",
    "RemoteProtocolError",
    "Reply",
    "ReplyMismatch",
    "Request",
    "RequestTimeout",
    "Requests",
    "ResponderBusy",
    "ResponderLost",
    "SetupError",
    "Subscription",
    "SubscriptionTaken",
    "TooManyStreams",
    "TopicError",
    "TopicInfo",
    "Undelivered",
    "UnsupportedValue",
    "WaitTimeout",
    "Warned",
    "Worker",
    "WrongLoop",
    "ZmqbusError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
