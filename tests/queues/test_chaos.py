"""kill -9 and SIGSTOP in a loop: what was pushed is done, and nothing is done again without cause. See chaos.py."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from tests.chaos.worlds import worlds

MODULE = "tests.queues.chaos"
WORLDS, KILLS = 2, 40  # one without a forwarder and one with it, at the same time
CAMPAIGN_WORLDS, CAMPAIGN_KILLS, CAMPAIGN_AT_ONCE = 40, 250, 2
KINDS = ("forwarder", "producer", "outbox", "worker")
CAUSES = ("failed", "killed", "expired", "the owner started anew")


@pytest.mark.timeout(300)
def test_killed_at_any_instant(tmp_path: Path) -> None:
    """ZMQBUS_SEED=n: the first of the worlds."""
    first = int(os.environ.get("ZMQBUS_SEED") or secrets.randbits(32))
    print(f"ZMQBUS_SEED={first}")
    seen = worlds(MODULE, iter(range(first, first + WORLDS)), tmp_path, KILLS, WORLDS)
    assert sum(seen[kind] for kind in KINDS) >= WORLDS * KILLS
    assert seen["handled events"] > 300, "the worlds should have got somewhere"
    assert seen["again events"] > 10, "workers should have been killed in the midst of something"


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_killed_at_any_instant_campaign(tmp_path: Path) -> None:
    """40 worlds of 250 kills, two at a time: 10,000 kills. Takes 25 to 30 minutes on two processors.

    ZMQBUS_SEEDS=first:last, for other worlds and another number of them."""
    first = secrets.randbits(32)
    seeds = os.environ.get("ZMQBUS_SEEDS") or f"{first}:{first + CAMPAIGN_WORLDS}"
    print(f"ZMQBUS_SEEDS={seeds}")
    begin, end = map(int, seeds.split(":"))
    seen = worlds(MODULE, iter(range(begin, end)), tmp_path, CAMPAIGN_KILLS, CAMPAIGN_AT_ONCE)
    print(seen)
    for cause in CAUSES:
        assert seen[f"again because {cause} events"], f"nothing was given again because {cause}"
