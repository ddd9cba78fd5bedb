"""The counters of a node, as `statistics()` and STATISTICS tell them."""

from __future__ import annotations

from collections.abc import Collection

from zmqbus.node.peers.serving import Service
from zmqbus.node.publishing.durability import unacked
from zmqbus.node.publishing.outlet import Outlet
from zmqbus.node.receiving.intake import Intake
from zmqbus.node.receiving.replays import Replays
from zmqbus.node.work.queues.workers import Workers


def count(
    outlet: Outlet, intakes: Collection[Intake], replays: Replays, workers: Workers, service: Service
) -> dict[str, int | float]:
    """What was published, received, lost, done, and served since the start."""
    trackers = [intake.tracker for intake in intakes]
    return {
        "subscriptions": len(intakes) + len(replays),
        "streams": len(outlet.publishers),
        "messages_published": outlet.messages,
        "frames_sent": outlet.frames,
        "bytes_published": outlet.bytes,
        "history_bytes": outlet.history.bytes,
        "subscriber_stalls": outlet.broadcast.stalls,
        "messages_received": sum(intake.messages for intake in intakes) + replays.messages,
        "messages_repaired": sum(tracker.repaired for tracker in trackers),
        "messages_lost": sum(tracker.lost for tracker in trackers) + replays.lost,
        "messages_duplicated": sum(tracker.duplicates for tracker in trackers),
        "messages_unacked": unacked(outlet),
        "unacked_bytes_pinned": outlet.history.pinned_bytes,
        **workers.counters(),
        "fetches_served": service.fetches,
        "fetch_bytes_served": service.fetch_bytes,
    }
