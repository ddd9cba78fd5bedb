"""Crashes: enumerated on a simulated disk. A failure prints its seed; `Simulation(seed).run()` replays it."""

from __future__ import annotations

import os

import pytest
from checks import DIRECTED, Check, crash_simulations
from simulation import Simulation


@pytest.mark.parametrize("block", range(12))
def test_crash_states(block: int) -> None:
    crash_simulations(range(block * 60, block * 60 + 60))


@pytest.mark.parametrize("block", range(4))
def test_crash_states_with_retention(block: int) -> None:
    first = 100_000 + block * 60
    crash_simulations(range(first, first + 60), retention=True, steps=60)


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_crash_states_campaign() -> None:
    """ZMQBUS_SEEDS=first:last, by default 400,000 seeds of four lives each: a million power cuts, and as many kills
    as make up the rest."""
    first, last = map(int, os.environ.get("ZMQBUS_SEEDS", "1000000:1400000").split(":"))
    crash_simulations(range(first, last))


@pytest.mark.parametrize("check", DIRECTED)
def test_directed(check: Check) -> None:
    check()


@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "short", "cut"])
@pytest.mark.parametrize("block", range(4))
def test_fault_at_each_of_the_first_200_file_calls(fault: str, block: int) -> None:
    reached = 0
    for call in range(block * 50 + 1, block * 50 + 51):
        simulation = Simulation(4711, steps=200, lives=2, plan={call: fault})
        first_disk = simulation.disk
        try:
            simulation.run()
        except Exception as error:
            error.add_note(f"{fault} at call {first_disk.trace[call - 1 : call]}")
            raise
        assert first_disk.calls >= call, "the first life was too short for this call"
        reached = max(reached, len(simulation.seen))
    assert reached > 10, "the workload should have got somewhere"


def test_the_simulation_simulates() -> None:
    """It rotates, quarantines, retires and loses power: else it would prove nothing."""
    segments, quarantined, offsets, calls = set(), 0, 0, 0
    for seed in range(60):
        simulation = Simulation(seed).run()
        names = simulation.disk.list("/data/journal")
        segments.add(sum(name.endswith(".zbj") for name in names))
        quarantined += "quarantine" in names
        offsets += len(simulation.seen)
        calls += simulation.disk.calls
    assert max(segments) >= 3
    assert quarantined >= 5
    assert offsets > 1000
