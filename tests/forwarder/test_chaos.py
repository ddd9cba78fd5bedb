"""kill -9 in a loop: whatever was promised before is kept, and everything comes to a good end. See chaos.py."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORLDS, KILLS = 3, 90  # one of each kind, at the same time
CAMPAIGN_WORLDS, CAMPAIGN_KILLS, CAMPAIGN_AT_ONCE = 36, 300, 2
WORLD_TIMEOUT = 400.0  # seconds; of a world that ends, even if not well


def world(seed: int, folder: Path, kills: int) -> dict[str, Any]:
    """What came of one. What is found wrong is left in the folder."""
    folder.mkdir()
    argv = [sys.executable, "-m", "tests.forwarder.chaos", str(folder), str(seed), str(kills)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=WORLD_TIMEOUT)
    assert done.returncode == 0, f"ZMQBUS_SEED={seed}: {done.stderr}"
    facts: dict[str, Any] = json.loads(done.stdout)
    if not facts["broken"]:
        shutil.rmtree(folder)
    return facts


def worlds(seeds: Iterator[int], folder: Path, kills: int, at_once: int) -> Counter[str]:
    """What came of all; those that went wrong are told of together."""
    kinds: Counter[str] = Counter()
    broken: list[str] = []
    with ThreadPoolExecutor(at_once) as threads:
        for facts in threads.map(lambda seed: world(seed, folder / f"world-{seed}", kills), seeds):
            print(json.dumps(facts))
            if facts["broken"]:
                broken.append(f"ZMQBUS_SEED={facts['seed']}, see {folder}/world-{facts['seed']}:")
                broken += facts["broken"]
            else:
                kinds.update(facts["kills"])
                kinds.update({f"{count} events": number for count, number in facts["counts"].items()})
    assert not broken, "\n".join(broken)
    return kinds


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
