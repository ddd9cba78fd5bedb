"""kill -9 in a loop: whatever was promised before is kept, and everything comes to a good end. See chaos.py."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.worlds import worlds as run_worlds

WORLDS, KILLS = 3, 90  # one of each kind, at the same time
CAMPAIGN_WORLDS, CAMPAIGN_KILLS, CAMPAIGN_AT_ONCE = 36, 300, 2


def worlds(seeds: Iterator[int], folder: Path, kills: int, at_once: int) -> Counter[str]:
    """What came of all."""
    return run_worlds("tests.forwarder.chaos", seeds, folder, kills, at_once, [Path(__file__).parent])


@pytest.mark.timeout(300)
def test_killed_at_any_instant(tmp_path: Path) -> None:
    """ZMQBUS_SEED=n: the first of the worlds."""
    first = int(os.environ.get("ZMQBUS_SEED") or secrets.randbits(32))
    print(f"ZMQBUS_SEED={first}")
    seen = worlds(iter(range(first, first + WORLDS)), tmp_path, KILLS, WORLDS)
    assert sum(seen[kind] for kind in ("forwarder", "publisher", "outbox", "consumer")) >= WORLDS * KILLS
    assert min(seen[kind] for kind in ("forwarder", "publisher", "outbox", "consumer")) > 0
    assert seen["acked events"] > 300, "the worlds should have got somewhere"
    assert seen["failed events"] > 10, "there should have been trouble"
    assert seen["redeliveries events"] > 100, "consumers should have been killed in the midst of something"


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_killed_at_any_instant_campaign(tmp_path: Path) -> None:
    """36 worlds of 300 kills, two at a time: 10,800 kills. Takes 20 to 25 minutes on two processors.

    ZMQBUS_SEEDS=first:last, for other worlds and another number of them."""
    first = secrets.randbits(32)
    seeds = os.environ.get("ZMQBUS_SEEDS") or f"{first}:{first + CAMPAIGN_WORLDS}"
    print(f"ZMQBUS_SEEDS={seeds}")
    begin, end = map(int, seeds.split(":"))
    print(worlds(iter(range(begin, end)), tmp_path, CAMPAIGN_KILLS, CAMPAIGN_AT_ONCE))
